"""Measures models/small.safetensors through ./speed: exact answers by K, by kind of question, and by prompt.

    python3 study/small_eval.py        # with --seed --steps --batch --easy if the training run had other values
    -> docs/small/results.json, results.md, results.svg

Every question is a chat of its own, answered greedily. An answer is right if it equals the expected one exactly. First
the training stories are drawn again from the seed of the training run, to check that no test story or test name is
among them.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import common
from common import Policy, Speed
from stories import KIND_NAMES, KINDS, TEST_NAMES, Story, training_story

LAYERS = 8
PROMPTS = {"right": "right story", "other": "another story", "none": "no story"}


class Asked(NamedTuple):
    kind: str
    answer: str
    story: str
    prompts: dict  # a key of PROMPTS -> text


class Setting(NamedTuple):
    """One point of the measurement: a policy, and which story is in the prompt."""

    policy: Policy
    k: int
    prompt: str


def make_questions(seed, n, people):
    """n questions of each kind, each about a story of its own."""
    rng = random.Random(f"test {seed}")
    out = []
    for kind in KINDS:
        for _ in range(n):
            story = Story(rng, people, TEST_NAMES)
            question = story.question(rng, kind)
            while True:  # the other story must not give the answer by chance
                other = Story(rng, people, [x for x in TEST_NAMES if x not in story.name])
                if question.answer not in [q.answer for q in other.questions()]:
                    break
            prompts = {
                "right": f"{story.text} {question.text}",
                "other": f"{other.text} {question.text}",
                "none": question.text,
            }
            out.append(Asked(kind, question.answer, story.text, prompts))
    return out


def check_unseen(questions, seed, steps, batch, easy):
    """Draws every training story again, as train_small.py drew it. Returns their number. Ends the script if a test
    story or a test name is among them."""
    test = {hashlib.sha256(q.story.encode()).digest() for q in questions}
    for step in range(steps):
        rng = random.Random(f"{seed} {step}")
        for _ in range(batch):
            s = training_story(rng, step < easy)
            if hashlib.sha256(s.text.encode()).digest() in test or set(s.name) & set(TEST_NAMES):
                common.fail(f"step {step} trained on a test story: {s.text}")
    return steps * batch


def answers(speed, policy, prompts):
    """One answer for each prompt, each from a chat of its own.

    One `speed chat` answers them all, with /reset between them. Every hundredth prompt is also given to `speed
    generate`, which must say the same. If an answer holds a line break, `speed generate` answers every prompt."""
    flags = ["-t", 1, "-n", 16, *policy.flags()]
    said = speed.run("chat", "-c", 512, *flags, text="".join(f"{p}\n/reset\n" for p in prompts)).split("\n")[:-1]

    def alone(prompt):
        return speed.generate(prompt, *flags).text

    if len(said) != len(prompts):
        return [alone(p) for p in prompts]
    for prompt, text in list(zip(prompts, said, strict=True))[::100]:
        if alone(prompt) != text:
            common.fail(f"{' '.join(policy.flags())}: generate says {alone(prompt)!r}, chat {text!r} to: {prompt}")
    return said


def policies():
    yield Policy("full")
    for k in range(LAYERS, 0, -1):
        yield Policy("speed", k)
        yield Policy("speed", k, bos=False)
        yield Policy("pop", k)


def settings():
    """Every policy with the right story. Full depth and SPEED at two K also with another story and with none."""
    for policy in policies():
        for prompt in PROMPTS:
            if prompt == "right" or policy.method == "full" or policy in (Policy("speed", 4), Policy("speed", 2)):
                yield Setting(policy, policy.number or LAYERS, prompt)


def markdown(results):
    cells = {(c["policy"], c["k"], c["prompt"], c["kind"]): c for c in results["cells"]}
    kinds = KIND_NAMES.values()
    rows = []
    order = ["full", "speed, BoS on", "speed, BoS off", "pop"]
    for policy in sorted(policies(), key=lambda p: order.index(p.line())):
        line, k = policy.line(), policy.number or LAYERS
        shown = [cells[line, k, "right", kind] for kind in KINDS]
        rows.append([line, k, *(common.cell(c["percent"], c["low"], c["high"], ".1f") for c in shown)])
    other = []
    for line, k, prompt, kind in cells:
        if prompt != "right" and kind == KINDS[0]:
            percents = [f"{cells[line, k, prompt, kind]['percent']:.1f}" for kind in KINDS]
            other.append([PROMPTS[prompt], line, k, *percents])
    lines = [
        f"Exact answers in %, with 95 % intervals; {results['n']} questions a cell, {results['people']} people a "
        "story, names and stories held out.",
        "",
        *common.table(["policy", "K", *kinds], rows),
        "",
        "The same questions with another story, or none:",
        "",
        *common.table(["prompt", "policy", "K", *kinds], other),
    ]
    return "\n".join(lines) + "\n"


def plot(results, path):
    """One panel for each kind of question: exact answers over K."""
    fig, axes = common.subplots(1, len(KINDS), figsize=(10, 3.4), sharey=True)
    for ax, kind in zip(axes, KINDS, strict=True):
        for line, style in common.STYLES.items():
            cells = [c for c in results["cells"] if (c["policy"], c["prompt"], c["kind"]) == (line, "right", kind)]
            if not cells:
                continue
            error = [[c["percent"] - c["low"] for c in cells], [c["high"] - c["percent"] for c in cells]]
            ax.errorbar(
                [c["k"] for c in cells],
                [c["percent"] for c in cells],
                yerr=error,
                color=style.color,
                marker=style.marker,
                ls=style.dash,
                capsize=2,
                lw=1.8,
                ms=5,
                label=line,
            )
        ax.set(title=KIND_NAMES[kind], xlabel="K: layers the prompt visits", ylim=(-3, 103))
        ax.set_xticks(range(1, LAYERS + 1))
    axes[0].set_ylabel("exact answers, %")
    axes[0].legend(loc="lower right")
    common.save(fig, path)


def measure(speed, questions, jobs):
    """The cells of the table: right answers for each setting and kind of question."""
    began, cells, todo = time.time(), [], list(settings())
    with ThreadPoolExecutor(jobs) as pool:
        texts = pool.map(lambda s: answers(speed, s.policy, [q.prompts[s.prompt] for q in questions]), todo)
        for setting, said in zip(todo, texts, strict=True):
            for kind in KINDS:
                right = [text == q.answer for text, q in zip(said, questions, strict=True) if q.kind == kind]
                interval = common.wilson(sum(right), len(right))
                cells.append(
                    dict(
                        policy=setting.policy.line(),
                        k=setting.k,
                        prompt=setting.prompt,
                        kind=kind,
                        right=sum(right),
                        n=len(right),
                        percent=round(100 * sum(right) / len(right), 1),
                        low=interval.low,
                        high=interval.high,
                    )
                )
            percents = "  ".join(f"{c['kind']} {c['percent']}" for c in cells[-len(KINDS) :])
            print(
                f"{setting.policy.line()} K={setting.k}, {PROMPTS[setting.prompt]}: {percents}  "
                f"{time.time() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return cells


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--speed", default=common.ROOT / "speed", help="the program (./speed)")
    p.add_argument("-m", "--model", default=common.SMALL)
    p.add_argument("--out", type=Path, default=common.ROOT / "docs" / "small", help="folder for the results")
    p.add_argument("-n", type=int, default=500, help="questions of each kind (500)")
    p.add_argument("--people", type=int, default=3, help="people in a story (3)")
    p.add_argument("--question-seed", type=int, default=1, help="seed of the test stories (1)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs of the program at once, one thread each")
    for flag, value in (("seed", 0), ("steps", 6500), ("batch", 8), ("easy", 1000)):
        p.add_argument(f"--{flag}", type=int, default=value, help=f"as train_small.py was run ({value})")
    a = p.parse_args()
    questions = make_questions(a.question_seed, a.n, a.people)
    seen = check_unseen(questions, a.seed, a.steps, a.batch, a.easy)
    print(f"{len(questions)} test stories, none among the {seen} of the training run", file=sys.stderr)
    began = time.time()
    cells = measure(Speed(a.speed, a.model), questions, a.jobs)
    results = dict(
        n=a.n,
        people=a.people,
        question_seed=a.question_seed,
        model_sha256=common.file_digest(a.model),
        training_stories=seen,
        training_stories_among_test=0,
        seconds=round(time.time() - began),
        cells=cells,
    )
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "results.json").write_text(json.dumps(results, indent=1))
    (a.out / "results.md").write_text(markdown(results))
    plot(results, a.out / "results.svg")


if __name__ == "__main__":
    main()
