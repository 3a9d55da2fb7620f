"""What an adapter makes of SPEED on a real model: look-ups found by K, for stock weights, adapted ones, and a control.

    python3 study/adapted.py --control control.safetensors --adapted speed0.safetensors speed1.safetensors

The control was trained on the same data for as long, at full depth only. So what both learn is how to answer from a
passage, and what the adapted model does better is SPEED's. Nothing in questions.json and adapt_eval.json, whose
look-ups are asked here, is in the training data (study/adapt_data.py check).

Look-ups and chats are asked as in study/quality.py: each model answers greedily at full depth, then under each K, and
every K is compared with the same model's full depth on its full-depth answer. Drift is what training did to full depth
itself: stock's full-depth answers to chats are fed to every model at full depth, and the distributions of each next
token are compared with stock's by KL(stock || model).

Intervals are 95 %: of shares found by Wilson, else by bootstrap over questions. Each question adds one line to a file
in the cache folder, and a run that was cut off continues from there; --so-far writes the tables of what there is. The
plot needs matplotlib. Writes results.md, results.json and results.svg into docs/adapted.
"""

import argparse
import base64
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import quality
from common import Policy, Speed

STUDY = Path(__file__).parent
HIGH, LOW = (24, 22, 20), (19, 18, 15)  # K, of 30 layers. The high ones are measured first.
LAYERS = 30
STRONGEST = 16  # slots that a long trace keeps of a row
FIRST = 40  # look-ups, in a random order, that are asked before all else
CHATS = 40
TRACED = 8  # the shortest look-ups: a page of `speed trace` holds at most 1,000 tokens
FILES = "adapt_eval", "questions"
STYLES = {  # stock, control, adapted
    "stock": common.Style("#808080", "s", "--"),
    "control": common.Style("#e0782f", "^", ":"),
    "adapted": common.Style("#1f8fe0", "o", "-"),
}


# ---- questions -------------------------------------------------------------------------------------------------------


def look_ups(n):
    """The look-ups of both files; kind is the file's name."""
    out = []
    for name in FILES:
        for q in quality.written_questions(STUDY / f"{name}.json"):
            if q["answer"]:
                out.append(dict(kind=name, text=q["text"], answer=q["answer"], n=n))
    return out


def chats(n):
    """CHATS of the questions without a passage, by a fixed seed."""
    found = [dict(q, n=n) for q in quality.written_questions(STUDY / "questions.json") if not q["answer"]]
    return random.Random(0).sample(found, CHATS)


# ---- drift -----------------------------------------------------------------------------------------------------------


def log_probabilities(speed, ids, split):
    """Of the token after each of ids[split:], at full depth: float64 [len(ids) - split, vocabulary]."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder, "ids"), Path(folder, "logits.npy")
        tokens.write_text(" ".join(map(str, ids)))
        speed.run("logits", "-t", 1, "--policy", "full", "--tokens-file", tokens, "--split", split, "--out", out)
        x = np.load(out).astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def drift(stock, speed, q):
    """Over the tokens of stock's answer: KL from stock, summed; the number of most likely tokens that are stock's."""
    _, record = quality.generate(stock, q["text"], q["n"])
    prompt, new = record["prompt_ids"], record["new_ids"]
    ids, split = prompt + new[:-1], len(prompt) - 1  # the last prompt token predicts the first of the answer
    p, other = (log_probabilities(s, ids, split) for s in (stock, speed))
    kl = float((np.exp(p) * (p - other)).sum())
    if not np.isfinite(kl):
        common.fail(f"{speed.model}: the KL divergence from stock is {kl}")
    same = int((p.argmax(axis=1) == other.argmax(axis=1)).sum())
    return dict(tokens=len(new), rows={"drift": dict(kl=kl, same=same)}, **machine(record))


# ---- measuring -------------------------------------------------------------------------------------------------------


def machine(record):
    return dict(program=record["program"], device=record["device"])


def look_up(speed, q, specs):
    """The answer under each policy; whether it is right; FLOPs of the prompt."""
    texts, exact, flops = {}, {}, {}
    for spec in specs:
        texts[spec], record = quality.generate(speed, q["text"], q["n"], spec)
        exact[spec] = int(bool(re.search(q["answer"], texts[spec])))
        flops[spec] = record["result"]["prefill_flops"]
    return dict(texts=texts, exact=exact, flops=flops, **machine(record))


def slots_of(tokens, match):
    """Which of these tokens hold a part of the match in their joined text."""
    out, at = [], 0
    for slot, token in enumerate(tokens):
        if at < match.end() and at + len(token) > match.start():
            out.append(slot)
        at += len(token)
    return out


def looks(speed, q):
    """Where a full-depth answer finds the right word. weights: for each layer, the largest weight that a head gives to
    that word in the passage, in the row that predicts its first token in the answer. None if the answer is wrong."""
    flags = ["--chat", "-t", 1, "-n", q["n"], "--ks", 20, "-o", "json", "-f", "-"]
    document = json.loads(speed.run("trace", *flags, text=q["text"]))
    run, tokens, asked = document["full"], document["tokens"], document["request"]["tokens"]
    said = re.search(q["answer"], run["text"])
    if not said:
        return dict(weights=None, program=document["program"])
    answer = [*tokens[asked:], run["text"]]  # the answer's last token is not fed, so the whole text stands for it
    looking = asked + slots_of(answer, said)[0] - 1
    text = "".join(tokens)
    slots = slots_of(tokens, re.search(q["answer"], text[: text.index("Question:")]))
    data, at, weights = base64.b64decode(run["attention"]), 0, []
    for layer in range(len(run["caches"])):
        # Every row sees itself and all before it. docs/trace.md has the form: 255 times the root of the weight.
        for row in range(0 if layer < run["prompt_layers"] else run["split"], len(tokens)):
            n, size = (row + 1, 2) if run["dense"] else (min(STRONGEST, row + 1), 4)
            entries = [data[i : i + size] for i in range(at, at + n * size, size)]
            at += n * size
            if row == looking:
                seen = {i: e[0] for i, e in enumerate(entries)}
                if not run["dense"]:
                    seen = {e[0] + 256 * e[1]: e[2] for e in entries}
                strongest = max(seen.get(slot, 0) for slot in slots)
                weights.append(round((strongest / 255) ** 2, 4))
    if at != len(data):
        common.fail("the trace's attention has another length than docs/trace.md says")
    return dict(weights=weights, program=document["program"])


class Model(NamedTuple):
    name: str
    role: str  # stock, control, adapted
    digest: str
    speed: Speed


class Task(NamedTuple):
    """One line of the record: a question put to a model under some policies."""

    model: Model
    part: str  # look-ups, chats, drift
    question: dict
    specs: tuple
    run: Callable  # () -> dict

    def key(self):
        return common.digest([self.model.digest, self.part, self.question, self.specs])[:16]


def tasks(models, lookups, talk):
    """All tasks. What answers the main question comes first, and the models take turns, so that a run that was cut off
    has it, and compares them on the same questions."""
    stock, control, adapted, *seeds = models
    lookups = random.Random(0).sample(lookups, len(lookups))

    def ask(which, questions, part, ks):
        for q in questions:
            for m in which:
                specs = tuple(f"speed:{k}" for k in ks)
                if part == "look-ups":
                    if ks == HIGH:
                        specs = ("full", *specs)
                    yield Task(m, part, q, specs, partial(look_up, m.speed, q, specs))
                elif part == "chats":
                    yield Task(m, part, q, specs, partial(quality.ask, m.speed, q, specs))
                elif part == "drift":
                    yield Task(m, part, q, (), partial(drift, stock.speed, m.speed, q))
                else:
                    yield Task(m, part, q, (), partial(looks, m.speed, q))

    short = sorted(lookups, key=lambda q: len(q["text"]))[:TRACED]
    three, first, rest = (adapted, stock, control), lookups[:FIRST], lookups[FIRST:]
    yield from ask(three, first, "look-ups", HIGH)
    yield from ask((adapted,), talk, "drift", ())
    yield from ask((adapted,), first, "look-ups", LOW)
    yield from ask((adapted,), talk, "chats", HIGH + LOW)
    yield from ask(three, [dict(q, n=16) for q in short], "looks", ())
    yield from ask((control,), talk, "drift", ())
    yield from ask(three, rest, "look-ups", HIGH)
    yield from ask((adapted,), rest, "look-ups", LOW)
    yield from ask((stock, control), talk, "chats", HIGH + LOW)
    yield from ask(seeds, lookups, "look-ups", HIGH)
    yield from ask(seeds, talk, "drift", ())
    yield from ask(seeds, talk, "chats", HIGH + LOW)
    yield from ask((stock, control, *seeds), lookups, "look-ups", LOW)


def perform(planned, path, jobs, so_far):
    """What `path` holds of the tasks, and, unless so_far, what it did not hold. In their order."""

    def work(task):
        row = dict(model=task.model.name, part=task.part, question=common.digest(task.question)[:16])
        return row | dict(kind=task.question["kind"]) | task.run()

    def report(_, count, missing):
        if sys.stderr.isatty():
            print(f"\r{count} of {len(missing)} questions  ", end="", file=sys.stderr, flush=True)

    done = common.resume(path, "key", {task.key(): task for task in planned}, work, jobs, so_far, report)
    return [done[task.key()] for task in planned if task.key() in done]


def joined(rows):
    """One row for each model, part and question, with the policies of all its tasks."""
    out = {}
    for row in rows:
        kept = out.setdefault((row["model"], row["part"], row["question"]), dict(row))
        for key in ("texts", "exact", "flops"):
            if key in row:
                kept[key] = {**kept[key], **row[key]}
    return list(out.values())


# ---- numbers ---------------------------------------------------------------------------------------------------------


def bootstrap(rows, value):
    """[the value, the ends of its interval] over the rows."""
    rng = random.Random(0)
    samples = [value(rng.choices(rows, k=len(rows))) for _ in range(quality.RESAMPLES)]
    return [value(rows), *common.percentiles(samples)]


def found(rows, spec):
    right = sum(r["exact"][spec] for r in rows)
    return dict(found=right, asked=len(rows), share=[100 * right / len(rows), *common.wilson(right, len(rows))])


def kept(rows, spec):
    """Of full depth's right answers, how many a policy has in their place, in %."""
    full = sum(r["exact"]["full"] for r in rows)
    return 100 * sum(r["exact"][spec] for r in rows) / full if full else 0.0


def ratio(rows, key, measure):
    total = sum(r["rows"][key][measure] for r in rows) / sum(r["tokens"] for r in rows)
    return 100 * total if measure == "same" else total


def summarize(model, rows):
    """A row for full depth and every K that was measured. Each measure is [value, low, high]."""
    mine = [r for r in rows if r["model"] == model.name]
    out = []
    for spec in ["full", *(f"speed:{k}" for k in HIGH + LOW)]:
        row = dict(model=model.name, role=model.role, spec=spec)
        asked = [r for r in mine if r["part"] == "look-ups" and {"full", spec} <= r["exact"].keys()]
        talked = [r for r in mine if r["part"] == "chats" and spec in r["rows"]]
        if asked:
            row["work"] = 100 * sum(r["flops"][spec] for r in asked) / sum(r["flops"]["full"] for r in asked)
            row.update(found(asked, spec))
            for f in FILES:
                if some := [r for r in asked if r["kind"] == f]:
                    row[f] = found(some, spec)
            row["of_full"] = bootstrap(asked, lambda some, spec=spec: kept(some, spec))
        if talked:
            row.update(chats=len(talked), tokens=sum(r["tokens"] for r in talked))
            for m in ("same", "kl"):
                row[m] = bootstrap(talked, lambda some, m=m, spec=spec: ratio(some, spec, m))
        if asked or talked:
            out.append(row)
    drifted = [r for r in mine if r["part"] == "drift"]
    if drifted:
        out[0]["drift"] = {m: bootstrap(drifted, lambda some, m=m: ratio(some, "drift", m)) for m in ("kl", "same")}
        out[0]["drift"].update(chats=len(drifted), tokens=sum(r["tokens"] for r in drifted))
    return out


def looks_summary(models, rows):
    """For each traced model: the number of these questions that it answers right; the mean of its looks in them."""
    out = {}
    for m in models:
        weights = [r["weights"] for r in rows if r["part"] == "looks" and r["model"] == m.name and r["weights"]]
        if weights:
            out[m.name] = dict(questions=len(weights), mean=[float(x) for x in np.mean(weights, axis=0)])
    return out


# ---- tables and plot -------------------------------------------------------------------------------------------------


def cell(row, key, digits):
    return common.cell(*row[key], digits)


def k_of(row):
    return Policy.parse(row["spec"]).number or f"{LAYERS} (full)"


def missing(results, key, but=None):
    """The lines that name the models of which a measure is missing."""
    measured = {row["model"] for row in results["summary"] if key in row}
    names = [name for name in results["settings"]["models"] if name not in measured and name != but]
    return ["", f"Not measured: {', '.join(names)}."] if names else []


def markdown(results):
    summary = results["summary"]
    asked = max(row.get("asked", 0) for row in summary)
    lines = [
        "# Adapted to SPEED: the tables",
        "",
        "Made by `study/adapted.py`; each question is in [results.json](results.json). In brackets: 95 % intervals.",
        "",
        "## Look-ups found",
        "",
        f"Up to {asked} of 166, in a random order that is the same for all models: 136 are from "
        "`study/adapt_eval.json`, 30 from `study/questions.json`. Answers of at most 20 tokens. *of its full depth*: "
        "right answers at K for each right answer of the same model at full depth. Prompt work: share of full depth's.",
        "",
    ]
    rows = [
        [row["model"], k_of(row), f"{row['work']:.1f} %", f"{row['found']} of {row['asked']}"]
        + [cell(row, key, ".1f") for key in ("share", "of_full")]
        + [f"{row[f]['found']} of {row[f]['asked']}" if f in row else "-" for f in FILES]
        for row in summary
        if "asked" in row
    ]
    columns = ["model", "K", "prompt work", "found", "found, %", "of its full depth, %", *(f"{f}.json" for f in FILES)]
    lines += common.table(columns, rows)
    lines += missing(results, "asked")
    text = "Chats of `study/questions.json`, answers of at most {} tokens."
    text = text.format(results["settings"]["n"])
    lines += ["", "## Beside its own full depth", "", f"{text} Each K is fed the same model's full-depth answer.", ""]
    talked = [row for row in summary if "same" in row and row["spec"] != "full"]
    rows = [
        [row["model"], k_of(row), row["chats"], row["tokens"], cell(row, "same", ".1f"), cell(row, "kl", ".3f")]
        for row in talked
    ]
    lines += common.table(["model", "K", "chats", "tokens", "same top-1, %", "KL, nats a token"], rows)
    lines += missing(results, "same")
    lines += ["", "## Full depth beside stock's full depth", "", "The same chats; stock's answers are fed to all.", ""]
    rows = [
        [
            row["model"],
            row["drift"]["chats"],
            row["drift"]["tokens"],
            cell(row["drift"], "kl", ".4f"),
            cell(row["drift"], "same", ".1f"),
        ]
        for row in summary
        if "drift" in row
    ]
    lines += common.table(["model", "chats", "tokens", "KL, nats a token", "same top-1, %"], rows)
    lines += missing(results, "drift", but="stock")
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Look-ups found against prompt work, a line a model."""
    fig, ax = common.subplots(figsize=(7.4, 4.4))
    names = {"stock": "stock", "control": "control: as long, full depth only", "adapted": "adapted to SPEED"}
    drawn = set()
    for name in dict.fromkeys(row["model"] for row in results["summary"]):
        rows = [r for r in results["summary"] if r["model"] == name and "share" in r]
        if not rows:
            continue
        role = rows[0]["role"]
        style = STYLES[role]
        values = [r["share"][0] for r in rows]
        low, high = ([abs(r["share"][i] - r["share"][0]) for r in rows] for i in (1, 2))
        first = role not in drawn  # further seeds of the adapted model are thin and have no label
        drawn.add(role)
        ax.errorbar(
            [r["work"] for r in rows],
            values,
            yerr=[low, high] if first else None,
            color=style.color,
            marker=style.marker,
            ls=style.dash,
            lw=2 if first else 1,
            alpha=1 if first else 0.5,
            ms=6 if first else 4,
            capsize=2,
            elinewidth=1,
            label=names[role] if first else f"{names[role]}, another seed",
        )
        if role == "adapted" and first:
            for row in rows:
                k = Policy.parse(row["spec"]).number
                at = dict(xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points")
                ax.annotate(f"K={k}" if k else "full depth", (row["work"], 1), ha="center", fontsize=9, **at)
    ax.set_ylim(-2, 100)
    ax.set_xlabel("prompt work, % of full depth's FLOPs")
    ax.set_ylabel("look-ups found, %")
    ax.legend(loc="upper left")
    common.save(fig, path)


def plot_looks(results, path):
    """The strongest look at the right word, by layer, a line a model."""
    fig, ax = common.subplots(figsize=(7.4, 3.2))
    roles = {row["model"]: row["role"] for row in results["summary"]}
    for name, of in results["looks"].items():
        style, label = STYLES[roles[name]], f"{roles[name]}, {of['questions']} right answers"
        ax.plot(range(LAYERS), of["mean"], color=style.color, marker=style.marker, ls=style.dash, ms=4, label=label)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("layer (from 0)")
    ax.set_ylabel("strongest weight")
    ax.legend(loc="upper left")
    common.save(fig, path)


def write(results, out):
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(results)
    (out / "results.md").write_text(text)
    print(text, end="")
    plot(results, out / "results.svg")
    if results["looks"]:
        plot_looks(results, out / "looks.svg")
    head = json.dumps({key: value for key, value in results.items() if key != "answers"})
    lines = [json.dumps(row, ensure_ascii=False) for row in results["answers"]]
    (out / "results.json").write_text(head[:-1] + ', "answers": [\n' + ",\n".join(lines) + "]}\n")


# ---- main ------------------------------------------------------------------------------------------------------------


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--stock", type=Path, default=common.SMOLLM2, help="default: SmolLM2 from the cache folder")
    p.add_argument("--control", type=Path, required=True, help="trained at full depth only")
    p.add_argument(
        "--adapted", type=Path, nargs="+", required=True, help="trained for SPEED; the first is measured first"
    )
    p.add_argument("-n", type=int, default=32, help="tokens of an answer to a chat, at most (32)")
    p.add_argument("--look-up", type=int, default=20, help="tokens of an answer to a look-up, at most (20)")
    p.add_argument("--jobs", type=int, default=1, help="questions asked at once, one thread each (1)")
    p.add_argument("--speed", type=Path, default=common.ROOT / "speed", help="the program (./speed)")
    p.add_argument("--so-far", action="store_true", help="ask nothing; write the tables of a run that was cut off")
    p.add_argument("--cache", type=Path, default=common.CACHE, help="folder for the measurements of each question")
    p.add_argument("--out", type=Path, default=common.ROOT / "docs" / "adapted", help="folder for the results")
    a = p.parse_args()
    for path, hint in [(a.speed, "run make first"), (a.stock, "run ./run.sh first, it fetches the model")] + [
        (path, "export_weights.py CHECKPOINT FILE --adapter FOLDER makes it") for path in (a.control, *a.adapted)
    ]:
        if not path.exists():
            common.fail(f"{path}: no such file; {hint}")
    roles = [("stock", "stock", a.stock), (a.control.stem, "control", a.control)]
    roles += [(path.stem, "adapted", path) for path in a.adapted]
    models = [Model(name, role, common.file_digest(path), Speed(a.speed, path)) for name, role, path in roles]
    if len({m.name for m in models}) < len(models):
        common.fail("two files of weights have the same name; the tables could not tell them apart")
    a.cache.mkdir(parents=True, exist_ok=True)
    planned = list(tasks(models, look_ups(a.look_up), chats(a.n)))
    rows = perform(planned, a.cache / "adapted-1.jsonl", a.jobs, a.so_far)
    if not rows:
        common.fail("no question has been answered yet; leave out --so-far")
    record = dict(
        programs=sorted({r["program"] for r in rows}),
        devices=[json.loads(d) for d in sorted({json.dumps(r["device"]) for r in rows if "device" in r})],
    )
    rows = joined(rows)
    private = ("key", "question", "seconds", "program", "device")
    results = dict(
        settings=dict(n=a.n, look_up=a.look_up, models={m.name: m.digest for m in models}),
        record=record,
        summary=[row for m in models for row in summarize(m, rows)],
        looks=looks_summary(models, rows),
        answers=[{key: value for key, value in row.items() if key not in private} for row in rows],
    )
    write(results, a.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
