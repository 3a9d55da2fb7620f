"""What a skipped layer costs: quality kept against work saved, by policy, on a model's own answers to written questions.

    ./run.sh && python3 study/quality.py          # SmolLM2-135M-Instruct, study/questions.json
    python3 study/quality.py --small              # the bundled model, questions from study/stories.py

Every question is answered greedily at full depth. That answer is then fed to every policy (`speed perplexity`): how far
is its distribution of each next token from full depth's, and is the likeliest token the same? Where the answer stands
in a passage in the prompt, every policy also answers by itself, and is right if its text holds the answer's words (the
small model: if it is the answer). Intervals are 95 %, by bootstrap over questions.

One line a question is appended to a file in the cache folder; a run that was cut off goes on there. Needs matplotlib
(Debian: python3-matplotlib) for the plot alone. Writes NAME.md, NAME.svg and NAME.json into docs/quality.
"""

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import plots
from stories import KINDS, TEST_NAMES, Story

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(
    os.environ.get("SPEED_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed"
)
LINES = ["speed, BoS on", "speed, BoS off", "pop", "share"]
RESAMPLES = 2000
MEASURES = {"kl": "KL, nats a token", "same": "same top-1, %", "exact": "looked up, %"}
LEAST = 1e-4  # KL that is drawn


# ---- questions: dicts of kind, text, answer (a pattern or None), n (tokens), closed (the question without passage) ----


def written_questions(path):
    d = json.loads(path.read_text())
    out = []
    for q in d["questions"]:
        if q["kind"] != "retrieval":
            out.append(dict(kind=q["kind"], text=q["text"], answer=None))
            continue
        asked = d["paragraphs"][q["ask"]]
        passage = "\n\n".join(d["paragraphs"][i]["text"] for i in q["passage"])
        text = (
            f"Use this text to answer the question in one short sentence.\n\n{passage}\n\nQuestion: {asked['question']}"
        )
        out.append(
            dict(kind="retrieval", text=text, closed=asked["question"], answer=rf"(?i)\b(?:{asked['answer']})s?\b")
        )
    return out


def story_questions(n, seed):
    rng = random.Random(f"quality {seed}")
    out = []
    for kind in KINDS:
        for _ in range(n):
            story = Story(rng, 3, TEST_NAMES)
            _, question, answer, *_ = rng.choice([q for q in story.questions() if q[0] == kind])
            out.append(
                dict(
                    kind=dict(one="one-hop", two="two-hop", code="code word")[kind],
                    text=f"{story.text} {question}",
                    answer=rf"\A{re.escape(answer)}\Z",
                )
            )
    return out


# ---- asking ------------------------------------------------------------------------------------------------------------


class Speed:
    """The program on one model, one thread a run."""

    def __init__(self, program, model):
        self.program, self.model = program, model

    def run(self, mode, *flags, text=None):
        command = [self.program, mode, "-m", self.model, *map(str, flags)]
        r = subprocess.run(command, input=text, capture_output=True, text=True)
        if r.returncode:
            raise SystemExit(f"quality.py: {' '.join(map(str, command))[:300]}: {r.stderr.strip()}")
        return r.stdout

    def generate(self, text, n, spec="full"):
        """The answer to one question, and the run record."""
        method, *rest = spec.split(":")
        flags = ["--policy", method]
        for word in rest:
            flags += ["--no-bos"] if word == "no-bos" else ["--every" if method == "share" else "--k", word]
        with tempfile.NamedTemporaryFile() as record:
            said = self.run("generate", "--chat", "-n", n, "-t", 1, "--record", record.name, *flags, "-", text=text)
            return said[:-1], json.loads(Path(record.name).read_text())

    def score(self, ids, answer, split, specs):
        """Rows of `perplexity`, full depth's first."""
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(" ".join(map(str, ids)))
            file.flush()
            return json.loads(
                self.run(
                    "perplexity",
                    "-t",
                    1,
                    "--tokens-file",
                    file.name,
                    "--split",
                    split,
                    "--answer-tokens",
                    answer,
                    "--compare",
                    ",".join(specs),
                    "-o",
                    "json",
                )
            )["rows"]


def ask(speed, q, specs):
    """What is kept of one question: {"said", "tokens", "rows": {spec: [KL summed over tokens, same top-1 tokens, FLOPs of
    the prompt, KV bytes]}, "exact": {spec: 0 or 1}}."""
    began = time.monotonic()
    text, pattern, n = q["text"], q["answer"], q["n"]
    said, record = speed.generate(text, n)
    prompt, new, split = record["prompt_ids"], record["new_ids"], record["result"]["split"]
    out = dict(kind=q["kind"], said=said, prompt=len(prompt), tokens=len(new), rows={})
    # Under pop the last prompt token alone is decode-phase, in a chat too: a run of its own.
    pop = [s for s in specs if s.startswith("pop")]
    for group, at in (([s for s in specs if s not in pop], split), (pop, len(prompt) - 1)):
        if not group:
            continue
        for spec, row in zip(["full", *group], speed.score(prompt + new, len(new), at, group)):
            if spec not in out["rows"]:
                out["rows"][spec] = [
                    row["kl_mean"] * row["tokens"],
                    round(row["same_top1"] * row["tokens"]),
                    row["prefill_flops"],
                    row["kv_bytes"],
                ]
    if pattern:
        # Where every likeliest token is full depth's, so is the answer.
        texts = {s: said if out["rows"][s][1] == len(new) else speed.generate(text, n, s)[0] for s in ["full", *specs]}
        out["exact"] = {s: int(bool(re.search(pattern, t))) for s, t in texts.items()}
        out["texts"] = texts
        if "closed" in q:
            out["closed"] = int(bool(re.search(pattern, speed.generate(q["closed"], n)[0])))
    return dict(out, seconds=round(time.monotonic() - began, 2), program=record["program"], device=record["device"])


def digest(x):
    return hashlib.sha256(json.dumps(x).encode()).hexdigest()[:16]


def ask_all(speed, questions, specs, path, jobs, so_far):
    """Answers in the order of `questions`; those in `path` are not asked again, with so_far none is."""
    ids = [digest(q) for q in questions]
    done = {}
    if path.exists():
        kept = path.read_bytes().split(b"\n")[:-1]  # without half a line
        done = {r["id"]: r for r in map(json.loads, kept)}
        if not so_far:
            path.write_bytes(b"".join(line + b"\n" for line in kept))
    # In an order that mixes kinds, so that what there is of a run that was cut off is a fair sample; what a question
    # takes grows with its text, and doubles where every policy answers it.
    order = random.Random(0).sample(range(len(questions)), len(questions))
    weight = [(len(q["text"]) + 500) * (2 if q["answer"] else 1) for q in questions]
    left = [i for i in order if ids[i] not in done and not so_far]
    start, asked = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(ask, speed, questions[i], specs): i for i in left}
        try:
            for count, future in enumerate(as_completed(running), start=1):
                i = running[future]
                done[ids[i]] = dict(id=ids[i], **future.result())
                with open(path, "a") as f:
                    f.write(json.dumps(done[ids[i]]) + "\n")
                asked += weight[i]
                took = time.monotonic() - start
                rest = took / asked * (sum(weight[j] for j in left) - asked) / 60
                if count == 3:
                    print(
                        f"quality.py: {len(left)} questions, {len(specs)} policies: about {took / 60 + rest:.0f} minutes "
                        f"by the first three; stop it at any time, it goes on from {path}",
                        file=sys.stderr,
                    )
                if sys.stderr.isatty() and count >= 3:
                    print(
                        f"\r{count} of {len(left)} questions, about {rest:.0f} minutes left  ",
                        end="",
                        file=sys.stderr,
                        flush=True,
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if sys.stderr.isatty() and left:
        print("\r\033[K", end="", file=sys.stderr)
    return [done[i] for i in ids if i in done]


# ---- numbers -----------------------------------------------------------------------------------------------------------


def measures(answers, spec):
    """The three measures over these answers, each a ratio of sums."""
    tokens = sum(a["tokens"] for a in answers)
    looked = [a["exact"][spec] for a in answers if "exact" in a]
    return {
        "kl": sum(a["rows"][spec][0] for a in answers) / tokens,
        "same": 100 * sum(a["rows"][spec][1] for a in answers) / tokens,
        "exact": 100 * sum(looked) / len(looked) if looked else None,
    }


def interval(values):
    values = sorted(v for v in values if v is not None)
    if not values:
        return None
    at = (len(values) - 1) / 40  # 2.5 % at either end
    return [values[round(at)], values[round(39 * at)]]


def resamples(answers):
    rng = random.Random(0)
    return [rng.choices(answers, k=len(answers)) for _ in range(RESAMPLES)]


def summarize(answers, specs):
    """One row a policy: the measures with intervals, and its work as a share of full depth's."""
    drawn = resamples(answers)
    rows = []
    for spec in ["full", *specs]:
        samples = [measures(d, spec) for d in drawn]
        row = dict(spec=spec, **measures(answers, spec))
        for m in MEASURES:
            row[f"{m}_95"] = interval(s[m] for s in samples)
        for column, name in ((2, "flops"), (3, "kv")):
            row[name] = (
                100 * sum(a["rows"][spec][column] for a in answers) / sum(a["rows"]["full"][column] for a in answers)
            )
        rows.append(row)
    return rows


def by_kind(answers, specs):
    kinds = sorted({a["kind"] for a in answers})
    return {kind: summarize([a for a in answers if a["kind"] == kind], specs) for kind in kinds}


def line_and_k(spec, layers):
    method, *rest = spec.split(":")
    if method == "full":
        return "full", layers
    if method == "speed":
        return LINES["no-bos" in rest], int(rest[0])
    return method, int(rest[0])


# ---- tables and plot ---------------------------------------------------------------------------------------------------


def cell(row, m, digits):
    if row[m] is None:
        return "-"
    low, high = row[f"{m}_95"]
    return f"{row[m]:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def markdown(name, results):
    layers, lines = results["layers"], []
    looked = sum("exact" in a for a in results["answers"])
    lines += [
        f"{name}, {layers} layers: {len(results['answers'])} questions, {sum(a['tokens'] for a in results['answers'])} "
        f"tokens of full-depth answers, {looked} look-ups; 95 % intervals by bootstrap over questions. Prompt work "
        "and KV cache: share of full depth's.",
        "",
    ]
    closed = [a["closed"] for a in results["answers"] if "closed" in a]
    if closed:
        lines += [f"Asked without the passage, full depth is right in {sum(closed)} of the {len(closed)} look-ups.", ""]
    lines += [
        "| policy | K | prompt work | KV cache | " + " | ".join(MEASURES.values()) + " |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["summary"]:
        line, k = line_and_k(row["spec"], layers)
        lines.append(
            f"| {line} | {f'every {k}' if line == 'share' else k} | {row['flops']:.1f} % | {row['kv']:.1f} % | "
            f"{cell(row, 'kl', 3)} | {cell(row, 'same', 1)} | {cell(row, 'exact', 1)} |"
        )
    lines += ["", "Same top-1 in %, by kind of question (how many):", ""]
    kinds = results["kinds"]
    count = {kind: sum(a["kind"] == kind for a in results["answers"]) for kind in kinds}
    lines += [
        "| policy | K | " + " | ".join(f"{kind} ({count[kind]})" for kind in kinds) + " |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for i, row in enumerate(results["summary"][1:], start=1):
        line, k = line_and_k(row["spec"], layers)
        lines.append(
            f"| {line} | {f'every {k}' if line == 'share' else k} | "
            + " | ".join(cell(kinds[kind][i], "same", 1) for kind in kinds)
            + " |"
        )
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Rows: the measures; columns: prompt work and KV cache."""
    shown = [m for m in MEASURES if results["summary"][0][m] is not None]
    fig, axes = plots.subplots(len(shown), 2, figsize=(10, 2.9 * len(shown)), sharex="col", sharey="row", squeeze=False)
    for axrow, m in zip(axes, shown):
        for ax, x in zip(axrow, ("flops", "kv")):
            for line, (color, marker, dash) in plots.STYLES.items():
                rows = [r for r in results["summary"] if line_and_k(r["spec"], results["layers"])[0] == line]
                if not rows:
                    continue
                least = LEAST if m == "kl" else 0
                values = [max(r[m], least) for r in rows]
                error = [
                    [max(v - max(r[f"{m}_95"][0], least), 0) for v, r in zip(values, rows)],
                    [max(r[f"{m}_95"][1] - v, 0) for v, r in zip(values, rows)],
                ]
                ax.errorbar(
                    [r[x] for r in rows],
                    values,
                    yerr=error,
                    color=color,
                    marker=marker,
                    ls=dash or "none",
                    capsize=2,
                    lw=1.6,
                    ms=5,
                    label="share, every 2" if line == "share" else line,
                )
                if line == "speed, BoS on":
                    for r, v, up in zip(rows, values, error[1]):
                        ax.annotate(
                            r["spec"].split(":")[1],
                            (r[x], v + up),
                            xytext=(0, 4),
                            textcoords="offset points",
                            ha="center",
                            fontsize=8,
                            color=color,
                        )
            if m == "kl":
                ax.set_yscale("log")
        full = results["summary"][0][m]
        if m == "exact":
            for ax in axrow:
                ax.axhline(full, color="#808080", lw=1, ls="-.")
            axrow[0].annotate(
                "full depth",
                (0.02, full),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
            )
        axrow[0].set_ylabel(MEASURES[m])
    axes[-1][0].set_xlabel("prompt work, % of full depth's FLOPs")
    axes[-1][1].set_xlabel("KV cache, % of full depth's bytes")
    axes[0][0].legend()
    plots.save(fig, path)


# ---- main --------------------------------------------------------------------------------------------------------------


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--small", action="store_true", help="the bundled model, with questions about stories")
    p.add_argument("-m", "--model", type=Path, help="default: SmolLM2 as ./run.sh leaves it")
    p.add_argument("--questions", type=Path, default=ROOT / "study" / "questions.json")
    p.add_argument("--kinds", help="only these, as facts,stories")
    p.add_argument("--policies", help="as speed:24,speed:24:no-bos,pop:20,share:2")
    p.add_argument("-n", type=int, default=32, help="tokens of an answer at most (32)")
    p.add_argument("--look-up", type=int, default=20, help="the same where it is looked up in a passage (20)")
    p.add_argument("--jobs", type=int, default=1, help="questions asked at once, one thread each (1)")
    p.add_argument("--speed", default=ROOT / "speed")
    p.add_argument("--so-far", action="store_true", help="ask nothing: tables of what a run that was cut off has left")
    p.add_argument("--cache", type=Path, default=CACHE, help="folder for what is measured, question by question")
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "quality")
    p.add_argument("--name", help="of the files written (smollm2, small, or the model's)")
    a = p.parse_args()
    model = a.model or (
        ROOT / "models" / "small.safetensors" if a.small else CACHE / "smollm2-135m-instruct.safetensors"
    )
    name = a.name or ("small" if a.small else model.stem if a.model else "smollm2")
    for path, hint in ((model, "run ./run.sh first: it fetches the model"), (Path(a.speed), "run make first")):
        if not path.exists():
            raise SystemExit(f"quality.py: {path}: there is none; {hint}")
    speed = Speed(a.speed, model)
    info = {r["what"]: r["value"] for r in json.loads(speed.run("info", "-o", "json"))["rows"]}
    layers = info["layers"]
    thirtieths = {"speed": (28, 26, 24, 22, 20, 15, 8), "no-bos": (28, 24, 20, 15, 8), "pop": (24, 20, 15, 8)}
    ks = {
        line: range(layers - 1, 0, -1) if layers <= 10 else [round(layers * k / 30) for k in of]
        for line, of in thirtieths.items()
    }
    default = (
        [f"speed:{k}" for k in ks["speed"]]
        + [f"speed:{k}:no-bos" for k in ks["no-bos"]]
        + [f"pop:{k}" for k in ks["pop"]]
    )
    specs = a.policies.split(",") if a.policies else default
    questions = story_questions(40, 1) if a.small else written_questions(a.questions)
    for q in questions:
        q["n"] = a.look_up if q["answer"] else a.n
    questions = [q for q in questions if not a.kinds or q["kind"] in a.kinds.split(",")]
    settings = dict(model=hashlib.sha256(model.read_bytes()).hexdigest(), policies=specs)
    a.cache.mkdir(parents=True, exist_ok=True)
    answers = ask_all(speed, questions, specs, a.cache / f"quality-{name}-{digest(settings)}.jsonl", a.jobs, a.so_far)
    if not answers:
        raise SystemExit("quality.py: no question has been answered yet; leave out --so-far")
    record = dict(
        programs=sorted({r["program"] for r in answers}),
        seconds=round(sum(r["seconds"] for r in answers)),
        devices=[json.loads(d) for d in sorted({json.dumps(r["device"]) for r in answers})],
    )
    answers = [
        {k: v for k, v in r.items() if k not in ("id", "seconds", "program", "device", "texts")} for r in answers
    ]
    results = dict(
        settings=dict(settings, n=a.n, look_up=a.look_up),
        layers=layers,
        record=record,
        summary=summarize(answers, specs),
        kinds=by_kind(answers, specs),
        answers=answers,
    )
    a.out.mkdir(parents=True, exist_ok=True)
    table = markdown(info["name"], results)
    (a.out / f"{name}.md").write_text(table)
    print(table, end="")
    plot(results, a.out / f"{name}.svg")
    # One line a question; FLOPs and bytes are in the summary, and `speed plan` has them.
    lines = [
        json.dumps(dict(r, rows={s: [round(row[0], 6), row[1]] for s, row in r["rows"].items()}), ensure_ascii=False)
        for r in answers
    ]
    head = {k: v for k, v in results.items() if k not in ("answers", "kinds")}
    (a.out / f"{name}.json").write_text(json.dumps(head)[:-1] + ', "answers": [\n' + ",\n".join(lines) + "]}\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
