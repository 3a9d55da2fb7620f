"""What a skipped layer costs: quality kept against work saved, by policy, on the model's own answers to questions.

    ./run.sh && python3 study/quality.py          # SmolLM2-135M-Instruct, study/questions.json
    python3 study/quality.py --small              # the bundled model, questions from study/stories.py

Every question is answered greedily at full depth. `speed perplexity` then feeds that answer to every policy and
compares two things with full depth: the distribution of each next token (KL divergence), and the most likely token.

Look-ups are questions about a passage in the prompt. There every policy also answers by itself. Its answer is right if
it contains the expected words; with --small, if it equals the expected answer. Intervals are 95 %, by bootstrap over
questions.

Each question adds one line to a file in the cache folder. A run that was cut off continues from that file. The plot
needs matplotlib (Debian: python3-matplotlib). Writes NAME.md, NAME.svg and NAME.json into docs/quality.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import common
from common import Policy, Speed
from stories import KIND_NAMES, KINDS, TEST_NAMES, Story

RESAMPLES = 2000
MEASURES = {"kl": "KL, nats a token", "same": "same top-1, %", "exact": "looked up, %"}
SMALLEST_KL = 1e-4  # a smaller one is drawn here, since the axis is logarithmic


# ---- questions -------------------------------------------------------------------------------------------------------
# A question is a dict. kind: a name for the tables. text: the prompt. answer: a pattern that a right answer matches, or
# None. n: the number of tokens to generate at most. closed: the question without its passage, if there is one.


def written_questions(path):
    data = json.loads(path.read_text())
    out = []
    for q in data["questions"]:
        if q["kind"] != "retrieval":
            out.append(dict(kind=q["kind"], text=q["text"], answer=None))
            continue
        asked = data["paragraphs"][q["ask"]]
        passage = "\n\n".join(data["paragraphs"][i]["text"] for i in q["passage"])
        task = "Use this text to answer the question in one short sentence."
        out.append(
            dict(
                kind="retrieval",
                text=f"{task}\n\n{passage}\n\nQuestion: {asked['question']}",
                closed=asked["question"],
                answer=rf"(?i)\b(?:{asked['answer']})s?\b",
            )
        )
    return out


def story_questions(n, seed):
    """n questions of each kind, each about a story of its own."""
    rng = random.Random(f"quality {seed}")
    out = []
    for kind in KINDS:
        for _ in range(n):
            story = Story(rng, 3, TEST_NAMES)
            question = story.question(rng, kind)
            out.append(
                dict(
                    kind=KIND_NAMES[kind],
                    text=f"{story.text} {question.text}",
                    answer=rf"\A{re.escape(question.answer)}\Z",
                )
            )
    return out


# ---- asking ----------------------------------------------------------------------------------------------------------


def generate(speed, text, n, spec="full"):
    return speed.generate(text, "-n", n, "-t", 1, *Policy.parse(spec).flags())


def score(speed, ids, answer_tokens, split, specs):
    """The rows of `speed perplexity` over the last `answer_tokens` of the ids. Full depth's row is the first."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(" ".join(map(str, ids)))
        file.flush()
        flags = ["--tokens-file", file.name, "--split", split, "--answer-tokens", answer_tokens]
        return speed.rows("perplexity", "-t", 1, *flags, "--compare", ",".join(specs))


def ask(speed, q, specs):
    """What is kept of one question, as a dict.

    said, tokens: full depth's answer. rows: for each policy kl (summed over tokens), same (the number of tokens whose
    most likely token is full depth's), flops (of the prompt) and kv (bytes of the KV cache). Of a look-up also exact:
    for each policy, 1 if its own answer is right, else 0."""
    began = time.monotonic()
    text, pattern, n = q["text"], q["answer"], q["n"]
    said, record = generate(speed, text, n)
    prompt, new, split = record["prompt_ids"], record["new_ids"], record["result"]["split"]
    out = dict(kind=q["kind"], said=said, prompt=len(prompt), tokens=len(new), rows={})
    # Under pop the last prompt token alone is decode-phase, in a chat too. That split needs a run of its own.
    pop = [s for s in specs if s.startswith("pop")]
    for group, at in (([s for s in specs if s not in pop], split), (pop, len(prompt) - 1)):
        if not group:
            continue
        scores = score(speed, prompt + new, len(new), at, group)
        for spec, row in zip(["full", *group], scores, strict=True):
            if spec not in out["rows"]:
                out["rows"][spec] = dict(
                    kl=row["kl_mean"] * row["tokens"],
                    same=round(row["same_top1"] * row["tokens"]),
                    flops=row["prefill_flops"],
                    kv=row["kv_bytes"],
                )
    if pattern:
        # A policy whose most likely tokens are all full depth's gives full depth's answer: it need not run.
        texts = {
            spec: said if out["rows"][spec]["same"] == len(new) else generate(speed, text, n, spec).text
            for spec in ["full", *specs]
        }
        out["exact"] = {spec: int(bool(re.search(pattern, said))) for spec, said in texts.items()}
        out["texts"] = texts
        if "closed" in q:
            out["closed"] = int(bool(re.search(pattern, generate(speed, q["closed"], n).text)))
    return dict(out, seconds=round(time.monotonic() - began, 2), program=record["program"], device=record["device"])


def ask_all(speed, questions, specs, path, jobs, so_far):
    """The answers, in the order of `questions`. An answer that `path` holds is not asked for again. With so_far nothing
    is asked, and only the answers in `path` are returned."""
    ids = [common.digest(q)[:16] for q in questions]
    # The order mixes the kinds, so that a run that was cut off is a fair sample.
    order = random.Random(0).sample(range(len(questions)), len(questions))
    # The time a question takes grows with its text, and doubles where every policy answers it.
    weight = {i: (len(q["text"]) + 500) * (2 if q["answer"] else 1) for i, q in zip(ids, questions, strict=True)}
    start, asked = time.monotonic(), 0

    def report(key, count, missing):
        nonlocal asked
        asked += weight[key]
        took = time.monotonic() - start
        rest = took / asked * (sum(weight[i] for i in missing) - asked) / 60
        if count == 3:
            print(
                f"quality.py: {len(missing)} questions, {len(specs)} policies: about {took / 60 + rest:.0f} "
                f"minutes, judged by the first three; you can stop it, and it will continue from {path}",
                file=sys.stderr,
            )
        if sys.stderr.isatty() and count >= 3:
            text = f"\r{count} of {len(missing)} questions, about {rest:.0f} minutes left  "
            print(text, end="", file=sys.stderr, flush=True)

    tasks = {ids[i]: questions[i] for i in order}
    done = common.resume(path, "id", tasks, lambda q: ask(speed, q, specs), jobs, so_far, report)
    return [done[i] for i in ids if i in done]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def measures(answers, spec):
    """The three measures over these answers. Each is a ratio of sums."""
    tokens = sum(a["tokens"] for a in answers)
    exact = [a["exact"][spec] for a in answers if "exact" in a]
    return {
        "kl": sum(a["rows"][spec]["kl"] for a in answers) / tokens,
        "same": 100 * sum(a["rows"][spec]["same"] for a in answers) / tokens,
        "exact": 100 * sum(exact) / len(exact) if exact else None,
    }


def with_intervals(answers, specs):
    """For full depth and each policy the measures, each with its interval as NAME_95."""
    rng = random.Random(0)
    drawn = [rng.choices(answers, k=len(answers)) for _ in range(RESAMPLES)]
    rows = []
    for spec in ["full", *specs]:
        samples = [measures(d, spec) for d in drawn]
        row = dict(spec=spec, **measures(answers, spec))
        for m in MEASURES:
            values = [s[m] for s in samples if s[m] is not None]
            row[f"{m}_95"] = list(common.percentiles(values)) if values else None
        rows.append(row)
    return rows


def summarize(answers, specs):
    """One row for each policy: the measures with intervals, and its work as a share of full depth's."""
    rows = with_intervals(answers, specs)
    for row in rows:
        for work in ("flops", "kv"):
            total, full = (sum(a["rows"][spec][work] for a in answers) for spec in (row["spec"], "full"))
            row[work] = 100 * total / full
    return rows


# ---- tables and plot -------------------------------------------------------------------------------------------------


def cell(row, m, digits):
    return "-" if row[m] is None else common.cell(row[m], *row[f"{m}_95"], digits)


def policy_cells(row, layers):
    """The first two cells of a row: the policy, and K or what stands for it."""
    policy = Policy.parse(row["spec"])
    return [policy.line(), f"every {policy.number}" if policy.method == "share" else policy.number or layers]


def markdown(name, results):
    layers, answers, summary = results["layers"], results["answers"], results["summary"]
    looked_up = sum("exact" in a for a in answers)
    lines = [
        f"{name}, {layers} layers: {len(answers)} questions, {sum(a['tokens'] for a in answers)} "
        f"tokens of full-depth answers, {looked_up} look-ups; 95 % intervals by bootstrap over questions. Prompt work "
        "and KV cache: share of full depth's.",
        "",
    ]
    closed = [a["closed"] for a in answers if "closed" in a]
    if closed:
        lines += [f"Asked without the passage, full depth is right in {sum(closed)} of the {len(closed)} look-ups.", ""]
    rows = [
        [
            *policy_cells(row, layers),
            f"{row['flops']:.1f} %",
            f"{row['kv']:.1f} %",
            cell(row, "kl", ".3f"),
            cell(row, "same", ".1f"),
            cell(row, "exact", ".1f"),
        ]
        for row in summary
    ]
    lines += common.table(["policy", "K", "prompt work", "KV cache", *MEASURES.values()], rows)
    specs = [row["spec"] for row in summary[1:]]
    of_kind = {kind: [a for a in answers if a["kind"] == kind] for kind in sorted({a["kind"] for a in answers})}
    by_kind = [with_intervals(some, specs)[1:] for some in of_kind.values()]
    rows = [
        [*policy_cells(of_kinds[0], layers), *(cell(row, "same", ".1f") for row in of_kinds)]
        for of_kinds in zip(*by_kind, strict=True)
    ]
    lines += ["", "Same top-1 in %, by kind of question (how many):", ""]
    lines += common.table(["policy", "K", *(f"{kind} ({len(some)})" for kind, some in of_kind.items())], rows)
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Rows: the measures. Columns: prompt work and KV cache."""
    full, *_ = results["summary"]
    shown = [m for m in MEASURES if full[m] is not None]
    size = dict(figsize=(10, 2.9 * len(shown)))
    fig, axes = common.subplots(len(shown), 2, **size, sharex="col", sharey="row", squeeze=False)
    for axes_row, m in zip(axes, shown, strict=True):
        for ax, work in zip(axes_row, ("flops", "kv"), strict=True):
            for line, style in common.STYLES.items():
                rows = [r for r in results["summary"] if Policy.parse(r["spec"]).line() == line]
                if not rows:
                    continue
                least = SMALLEST_KL if m == "kl" else 0
                values = [max(r[m], least) for r in rows]
                error = [
                    [max(v - max(r[f"{m}_95"][0], least), 0) for v, r in zip(values, rows, strict=True)],
                    [max(r[f"{m}_95"][1] - v, 0) for v, r in zip(values, rows, strict=True)],
                ]
                ax.errorbar(
                    [r[work] for r in rows],
                    values,
                    yerr=error,
                    color=style.color,
                    marker=style.marker,
                    ls=style.dash or "none",
                    capsize=2,
                    lw=1.6,
                    ms=5,
                    label="share, every 2" if line == "share" else line,
                )
                if line == "speed, BoS on":
                    for r, v, up in zip(rows, values, error[1], strict=True):
                        ax.annotate(
                            Policy.parse(r["spec"]).number,
                            (r[work], v + up),
                            xytext=(0, 4),
                            textcoords="offset points",
                            ha="center",
                            fontsize=8,
                            color=style.color,
                        )
            if m == "kl":
                ax.set_yscale("log")
        if m == "exact":
            for ax in axes_row:
                ax.axhline(full[m], color="#808080", lw=1, ls="-.")
            axes_row[0].annotate(
                "full depth",
                (0.02, full[m]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
            )
        axes_row[0].set_ylabel(MEASURES[m])
    axes[-1][0].set_xlabel("prompt work, % of full depth's FLOPs")
    axes[-1][1].set_xlabel("KV cache, % of full depth's bytes")
    axes[0][0].legend()
    common.save(fig, path)


def write(name, title, results, out):
    out.mkdir(parents=True, exist_ok=True)
    table = markdown(title, results)
    (out / f"{name}.md").write_text(table)
    print(table, end="")
    plot(results, out / f"{name}.svg")
    # One line for each question. The summary holds FLOPs and bytes, so the questions need not.
    lines = []
    for answer in results["answers"]:
        rows = {spec: dict(kl=round(row["kl"], 6), same=row["same"]) for spec, row in answer["rows"].items()}
        lines.append(json.dumps(dict(answer, rows=rows), ensure_ascii=False))
    head = json.dumps({key: value for key, value in results.items() if key != "answers"})
    (out / f"{name}.json").write_text(head[:-1] + ', "answers": [\n' + ",\n".join(lines) + "]}\n")


# ---- main ------------------------------------------------------------------------------------------------------------


def default_policies(layers):
    """SPEED and POP at several K: at every K of a shallow model, else at the K of a model of 30 layers, to scale."""

    def scaled(*ks):
        return range(layers - 1, 0, -1) if layers <= 10 else [round(layers * k / 30) for k in ks]

    return [
        *(f"speed:{k}" for k in scaled(28, 26, 24, 22, 20, 15, 8)),
        *(f"speed:{k}:no-bos" for k in scaled(28, 24, 20, 15, 8)),
        *(f"pop:{k}" for k in scaled(24, 20, 15, 8)),
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--small", action="store_true", help="the bundled model, with questions about stories")
    p.add_argument("-m", "--model", type=Path, help="default: SmolLM2 from the cache folder of ./run.sh")
    p.add_argument("--questions", type=Path, default=common.ROOT / "study" / "questions.json")
    p.add_argument("--kinds", help="only these kinds of question, for example facts,stories")
    p.add_argument("--policies", help="for example speed:24,speed:24:no-bos,pop:20,share:2")
    p.add_argument("-n", type=int, default=32, help="tokens of an answer, at most (32)")
    p.add_argument("--look-up", type=int, default=20, help="tokens of an answer to a look-up, at most (20)")
    p.add_argument("--jobs", type=int, default=1, help="questions asked at once, one thread each (1)")
    p.add_argument("--speed", type=Path, default=common.ROOT / "speed", help="the program (./speed)")
    p.add_argument("--so-far", action="store_true", help="ask nothing; write the tables of a run that was cut off")
    p.add_argument("--cache", type=Path, default=common.CACHE, help="folder for the measurements of each question")
    p.add_argument("--out", type=Path, default=common.ROOT / "docs" / "quality", help="folder for the results")
    p.add_argument("--name", help="name of the files written (smollm2, small, or the model's)")
    a = p.parse_args()
    model = a.model or (common.SMALL if a.small else common.SMOLLM2)
    name = a.name or ("small" if a.small else model.stem if a.model else "smollm2")
    for path, hint in ((model, "run ./run.sh first, it fetches the model"), (a.speed, "run make first")):
        if not path.exists():
            common.fail(f"{path}: no such file; {hint}")
    speed = Speed(a.speed, model)
    info = json.loads(speed.run("info", "-o", "json"))
    specs = a.policies.split(",") if a.policies else default_policies(info["layers"])
    questions = story_questions(40, 1) if a.small else written_questions(a.questions)
    for q in questions:
        q["n"] = a.look_up if q["answer"] else a.n
    questions = [q for q in questions if not a.kinds or q["kind"] in a.kinds.split(",")]
    settings = dict(model=common.file_digest(model), policies=specs)
    a.cache.mkdir(parents=True, exist_ok=True)
    # The name says which form the lines have, so that a file of an older form is not read.
    kept = a.cache / f"quality-2-{name}-{common.digest(settings)[:16]}.jsonl"
    answers = ask_all(speed, questions, specs, kept, a.jobs, a.so_far)
    if not answers:
        common.fail("no question has been answered yet; leave out --so-far")
    record = dict(
        programs=sorted({r["program"] for r in answers}),
        seconds=round(sum(r["seconds"] for r in answers)),
        devices=[json.loads(d) for d in sorted({json.dumps(r["device"]) for r in answers})],
    )
    private = ("id", "seconds", "program", "device", "texts")
    results = dict(
        settings=dict(settings, n=a.n, look_up=a.look_up),
        layers=info["layers"],
        record=record,
        summary=summarize(answers, specs),
        answers=[{key: value for key, value in r.items() if key not in private} for r in answers],
    )
    write(name, info["name"], results, a.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
