"""Says whether an answer to an exercise is right. It does not hold the answers: it runs the program.

python3 exercises/check.py NUMBER ANSWER
python3 exercises/check.py --answers       # those of exercises/answers/README.md
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import look

ROOT = Path(__file__).resolve().parents[1]
STORY = (ROOT / "tests" / "page" / "story.txt").read_text().strip().rsplit(". ", 1)[0] + ". "
TWO_FACTS, ONE_FACT, CODE_WORD = "What does the one in the valley have?", "What is Datha?", "What is the code word?"


def speed(*words):
    command = [ROOT / "speed", *map(str, words)]
    r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if r.returncode:
        sys.exit(r.stderr.strip())
    return r.stdout.strip()


def says(question, *flags):
    return speed("generate", "--chat", "-p", STORY + question, "-n", 12, *flags)


def plan(*flags):
    """The row of the policy, not of full depth."""
    return json.loads(speed("plan", "--json", *flags))["rows"][-1]


def lowest_k(question):
    """The lowest K from which upwards the answer is full depth's."""
    full, k = says(question, "--policy", "full"), 8
    while k > 1 and says(question, "--k", k - 1) == full:
        k -= 1
    return k


def kv_bytes():
    flags = "-m models/small.safetensors --ctx 53 --tail 5 -n 0 --k 3 --kv-bytes 4".split()
    return plan(*flags)["kv_bytes"]


def flops_at_2():
    rows = csv.DictReader(speed("trace", "--chat", "-f", "tests/page/story.txt", "--k", 2, "-o", "csv").splitlines())
    return next(int(row["flops"]) for row in rows if row["layer"] == "all")


def prompt_for_ten_percent():
    n = 1024
    while plan("--shape", "llama-3.1-8b", "--ctx", n, "--k", 24)["later_token_ratio"] < 1.1:
        n += 1024
    return n


def requests_for_22():
    n = 1
    while plan("--shape", "llama-3.1-8b", "--ctx", 131072, "--k", 24, "--batch", n)["later_token_ratio"] < 1.22:
        n += 1
    return n


def layers_not_to_drop():
    full = says(TWO_FACTS, "--policy", "full")
    return [
        layer
        for layer in range(1, 8)
        if says(TWO_FACTS, "--policy", "share", "--keep", ",".join(str(i) for i in range(8) if i != layer)) != full
    ]


def looks_without_need(answer):
    """A layer from 5 up and a prompt word that a head looks at there with weight 0.99 or more."""
    layer, word = answer.split(maxsplit=1)
    document = json.loads(speed("trace", "--chat", "-f", "tests/page/story.txt", "-o", "json"))
    looks, *_ = look.look(document, document["full"], 91)[int(layer)]
    return int(layer) >= 5 and any(token.strip() == word and weight >= 0.99 for weight, token, _ in looks)


def gib_of_swiftkv():
    flags = "--shape llama-3.1-8b --ctx 131072 --policy swiftkv --k 24 --group 4".split()
    return round(plan(*flags)["kv_bytes"] / 2**30)


def work_of_pop_at_7():
    def flops(*flags):
        return plan("-m", "models/small.safetensors", "--ctx", 91, "--tail", 1, *flags)["prefill_flops"]

    return flops("--policy", "full") - flops("--policy", "pop", "--k", 7)


EXERCISES = {
    1: kv_bytes,
    2: flops_at_2,
    3: lambda: [lowest_k(q) for q in (CODE_WORD, ONE_FACT, TWO_FACTS)],
    4: lambda: lowest_k(ONE_FACT) - 1,
    5: prompt_for_ten_percent,
    6: requests_for_22,
    7: lambda: round(plan("--shape", "llama-3.1-70b", "--ctx", 1024, "--k", 60)["first_token_ratio"], 2),
    8: gib_of_swiftkv,
    9: work_of_pop_at_7,
    10: layers_not_to_drop,
    11: looks_without_need,
    12: lambda: says(TWO_FACTS, "--k", 4, "--no-bos", "--split", 90),
}


def right(number, answer):
    if number == 11:
        return looks_without_need(answer)
    truth = EXERCISES[number]()
    if isinstance(truth, list):
        return [int(x) for x in re.findall(r"\d+", answer)] == truth
    return float(answer.replace(",", "")) == truth if not isinstance(truth, str) else answer.strip() == truth


def main():
    if sys.argv[1:] == ["--answers"]:
        answers = dict(
            re.findall(r"(?m)^(\d+)\. `([^`]+)`", (ROOT / "exercises" / "answers" / "README.md").read_text())
        )
        if set(map(int, answers)) != set(EXERCISES):
            sys.exit(f"answers to {', '.join(answers)}; exercises {', '.join(map(str, EXERCISES))}")
        wrong = [n for n, answer in answers.items() if not right(int(n), answer)]
        others = {"11": "4 valley", "12": "A ring."}
        planted = [n for n, answer in answers.items() if right(int(n), others.get(n, answer + "1"))]
        if wrong or planted:
            sys.exit(f"wrong answers: {wrong}; wrong answers taken for right: {planted}")
        return print(f"{len(answers)} answers are right")
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) not in EXERCISES:
        sys.exit(__doc__)
    print("right" if right(int(sys.argv[1]), " ".join(sys.argv[2:])) else "not yet")


if __name__ == "__main__":
    main()
