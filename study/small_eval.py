"""Measures models/small.safetensors through ./speed: exact answers by K, kind of question and story in the prompt.

    python3 study/small_eval.py        # --seed --steps --batch --easy, if the training run had other ones
    -> docs/small/results.json, results.md, results.svg

Every question is a conversation of its own, greedy, judged right only if the whole answer is. First the training
stories are drawn again from the run's seed, to check that no test story and no test name is among them.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import plots
from stories import KINDS, TEST_NAMES, Story, training_story

LAYERS = 8
KIND_NAMES = dict(one="one-hop", two="two-hop", code="code word")
PROMPTS = dict(right="right story", other="another story", none="no story")


def make_questions(seed, n, people):
    """n questions of each kind, each about a story of its own: dicts with the three prompts and the right answer."""
    rng = random.Random(f"test {seed}")
    out = []
    for kind in KINDS:
        for _ in range(n):
            story = Story(rng, people, TEST_NAMES)
            _, question, answer, *_ = rng.choice([q for q in story.questions() if q[0] == kind])
            while True:  # nothing in the other story may give the answer by chance
                other = Story(rng, people, [x for x in TEST_NAMES if x not in story.name])
                if answer not in [q[2] for q in other.questions()]:
                    break
            prompts = dict(right=f"{story.text} {question}", other=f"{other.text} {question}", none=question)
            out.append(dict(kind=kind, answer=answer, story=story.text, prompt=prompts))
    return out


def check_unseen(questions, seed, steps, batch, easy):
    """Makes every training story again, as train_small.py drew it; returns their number or raises."""
    test = {hashlib.sha256(q["story"].encode()).digest() for q in questions}
    for step in range(steps):
        rng = random.Random(f"{seed} {step}")
        for _ in range(batch):
            s = training_story(rng, step < easy)
            if hashlib.sha256(s.text.encode()).digest() in test or set(s.name) & set(TEST_NAMES):
                raise SystemExit(f"small_eval.py: step {step} trained on a test story: {s.text}")
    return steps * batch


def wilson(right, n):
    """95 % interval of a share, in % (Wilson 1927)."""
    z, p = 1.959964, right / n
    mid, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(100 * x / (1 + z * z / n), 1) for x in (mid - half, mid + half)]


def run(speed, model, mode, flags, text):
    command = [speed, mode, "-m", model, "-t", "1", "-n", "16", *flags]
    r = subprocess.run(command, input=text, capture_output=True, text=True)
    if r.returncode:
        raise SystemExit(f"small_eval.py: speed {mode} {' '.join(flags)}: {r.stderr.strip()}")
    return r.stdout


def answers(speed, model, flags, prompts):
    """One answer a prompt, each a conversation of its own. One `speed chat` reads them all; every hundredth is asked of
    `speed generate` too, and so are all of them should an answer hold a line break."""
    got = run(speed, model, "chat", ["-c", "512", *flags], "".join(f"{p}\n/reset\n" for p in prompts)).split("\n")[:-1]

    def alone(p):
        return run(speed, model, "generate", ["--chat", *flags, "-"], p)[:-1]

    if len(got) != len(prompts):
        return [alone(p) for p in prompts]
    for p, g in list(zip(prompts, got))[::100]:
        if alone(p) != g:
            raise SystemExit(f"small_eval.py: {' '.join(flags)}: generate says {alone(p)!r}, chat {g!r} to: {p}")
    return got


def policies():
    """(name of the line, K, flags)"""
    yield "full", LAYERS, ["--policy", "full"]
    for k in range(LAYERS, 0, -1):
        yield "speed, BoS on", k, ["--policy", "speed", "--k", str(k)]
        yield "speed, BoS off", k, ["--policy", "speed", "--k", str(k), "--no-bos"]
        yield "pop", k, ["--policy", "pop", "--k", str(k)]


def markdown(results):
    cells = {(r["policy"], r["k"], r["prompt"], r["kind"]): r for r in results["cells"]}
    kinds = " | ".join(KIND_NAMES.values())
    lines = [
        f"Exact answers in %, with 95 % intervals; {results['n']} questions a cell, {results['people']} people a "
        "story, names and stories held out.",
        "",
        f"| policy | K | {kinds} |",
        "|---|---|---|---|---|",
    ]
    order = ["full", "speed, BoS on", "speed, BoS off", "pop"]
    for line, k, _ in sorted(policies(), key=lambda p: order.index(p[0])):
        row = [cells[line, k, "right", kind] for kind in KINDS]
        text = " | ".join(f"{r['percent']:.1f} ({r['low']:.1f}–{r['high']:.1f})" for r in row)
        lines.append(f"| {line} | {k} | {text} |")
    lines += [
        "",
        "The same questions with another story, or none:",
        "",
        f"| prompt | policy | K | {kinds} |",
        "|---|---|---|---|---|---|",
    ]
    for line, k, prompt, kind in cells:
        if prompt != "right" and kind == KINDS[0]:
            text = " | ".join(f"{cells[line, k, prompt, kind]['percent']:.1f}" for kind in KINDS)
            lines.append(f"| {PROMPTS[prompt]} | {line} | {k} | {text} |")
    return "\n".join(lines) + "\n"


def plot(results, path):
    """One panel a kind: exact answers over K."""
    fig, axes = plots.subplots(1, len(KINDS), figsize=(10, 3.4), sharey=True)
    for ax, kind in zip(axes, KINDS):
        for line, (color, marker, dash) in plots.STYLES.items():
            rows = [r for r in results["cells"] if (r["policy"], r["prompt"], r["kind"]) == (line, "right", kind)]
            if not rows:
                continue
            error = [[r["percent"] - r["low"] for r in rows], [r["high"] - r["percent"] for r in rows]]
            ax.errorbar(
                [r["k"] for r in rows],
                [r["percent"] for r in rows],
                yerr=error,
                color=color,
                marker=marker,
                ls=dash,
                capsize=2,
                lw=1.8,
                ms=5,
                label=line,
            )
        ax.set(title=KIND_NAMES[kind], xlabel="K: layers the prompt visits", ylim=(-3, 103))
        ax.set_xticks(range(1, LAYERS + 1))
    axes[0].set_ylabel("exact answers, %")
    axes[0].legend(loc="lower right")
    plots.save(fig, path)


def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--speed", default=f"{here}/speed")
    p.add_argument("-m", "--model", default=f"{here}/models/small.safetensors")
    p.add_argument("--out", default=f"{here}/docs/small")
    p.add_argument("-n", type=int, default=500, help="questions a cell")
    p.add_argument("--people", type=int, default=3)
    p.add_argument("--question-seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    for flag, value in (("seed", 0), ("steps", 6500), ("batch", 8), ("easy", 1000)):
        p.add_argument(f"--{flag}", type=int, default=value, help="of the training run, for the check of its stories")
    a = p.parse_args()
    questions = make_questions(a.question_seed, a.n, a.people)
    seen = check_unseen(questions, a.seed, a.steps, a.batch, a.easy)
    print(f"{len(questions)} test stories, none among the {seen} of the training run", file=sys.stderr)
    began, cells = time.time(), []
    jobs = [
        (line, k, prompt, flags)
        for line, k, flags in policies()
        for prompt in PROMPTS
        if prompt == "right" or line == "full" or (line == "speed, BoS on" and k in (4, 2))
    ]
    with ThreadPoolExecutor(a.jobs) as pool:
        got = pool.map(lambda j: answers(a.speed, a.model, j[3], [q["prompt"][j[2]] for q in questions]), jobs)
        for (line, k, prompt, _), texts in zip(jobs, got):
            for kind in KINDS:
                right = [t == q["answer"] for t, q in zip(texts, questions) if q["kind"] == kind]
                low, high = wilson(sum(right), len(right))
                cells.append(
                    dict(
                        policy=line,
                        k=k,
                        prompt=prompt,
                        kind=kind,
                        right=sum(right),
                        n=len(right),
                        percent=round(100 * sum(right) / len(right), 1),
                        low=low,
                        high=high,
                    )
                )
            print(
                f"{line} K={k}, {PROMPTS[prompt]}: " + "  ".join(f"{c['kind']} {c['percent']}" for c in cells[-3:]),
                f" {time.time() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    with open(a.model, "rb") as f:
        checksum = hashlib.sha256(f.read()).hexdigest()
    results = dict(
        n=a.n,
        people=a.people,
        question_seed=a.question_seed,
        model_sha256=checksum,
        training_stories=seen,
        training_stories_among_test=0,
        seconds=round(time.time() - began),
        cells=cells,
    )
    os.makedirs(a.out, exist_ok=True)
    with open(f"{a.out}/results.json", "w") as f:
        json.dump(results, f, indent=1)
    with open(f"{a.out}/results.md", "w") as f:
        f.write(markdown(results))
    plot(results, f"{a.out}/results.svg")


if __name__ == "__main__":
    main()
