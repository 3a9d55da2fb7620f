"""Compares `./speed perplexity` on SmolLM2-135M-Instruct with Hugging Face, live.

This file cuts a text into pieces. Hugging Face computes the logits in fp32, with policies as masks and replaced keys
(reference.py). The sums are made here in float64.

Perplexity must agree to 5 digits. The number of tokens with the same most likely token must be equal. The logits of the
two differ by at most 2e-5 of a row's norm (test_logits.py), mostly by a tenth of that, and with either sign. Over the
tokens of a text the differences average out. Faults planted in the reference must make the comparison fail. Takes about
a minute on one core.
"""

import inspect
import json
import math
import sys
import tempfile
import textwrap

import numpy as np
from transformers.utils import logging

import reference
from test_logits import SMOLLM2, results, run, tokenize

PROMPT, ANSWER = 64, 40
POLICIES = {
    "speed:24": dict(policy="speed", k=24),
    "speed:24:no-bos": dict(policy="speed", k=24, bos=False),
    "speed:15": dict(policy="speed", k=15),
    "pop:20": dict(policy="pop", k=20),
}
TOLERANCE = dict(ppl=1e-5, ppl_stderr=1e-5, kl_mean=1e-4, kl_p99=1e-4)  # relative


def pieces(ids, bos):
    """Each piece is BoS, PROMPT - 1 tokens of the text, and ANSWER more. The last piece may be shorter."""
    step = PROMPT - 1 + ANSWER
    cut = [[bos, *ids[i : i + step]] for i in range(0, len(ids), step)]
    return [piece for piece in cut if len(piece) > PROMPT]


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def measure(loaded, texts, full=None, split=PROMPT - 1, **policy):
    """The row that `perplexity` prints, and the log probabilities [tokens, vocab] that it is made from. The last token
    of a prompt is decode-phase."""
    rows = [reference.logits(loaded, piece[:-1], split, **policy)[PROMPT - 1 - split :] for piece in texts]
    log_q = log_softmax(np.concatenate(rows))
    tokens = np.concatenate([piece[PROMPT:] for piece in texts])
    nll = -log_q[np.arange(len(tokens)), tokens]
    log_p = log_q if full is None else full
    kl = np.sort((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    ppl = math.exp(nll.mean())
    return {
        "tokens": len(tokens),
        "ppl": ppl,
        "ppl_stderr": ppl * nll.std(ddof=1) / math.sqrt(len(tokens)),
        "kl_mean": kl.mean(),
        "kl_p99": kl[math.ceil(0.99 * len(kl)) - 1],
        "same_top1": np.mean(log_p.argmax(axis=1) == log_q.argmax(axis=1)),
    }, log_q


def differences(got, expected):
    """The values that differ by more than the tolerance, each with the difference."""
    wrong = {}
    for key, most in TOLERANCE.items():
        error = abs(got[key] - expected[key]) / max(abs(expected[key]), 1e-9)
        if not error <= most:
            wrong[key] = error
    for key in ("tokens", "same_top1"):
        if not round(got[key] * expected["tokens"]) == round(expected[key] * expected["tokens"]):
            wrong[key] = (got[key], expected[key])
    return wrong


def largest(got, expected):
    return max(abs(got[key] / expected[key] - 1) for key in TOLERANCE if expected[key])


def main():
    logging.disable_progress_bar()
    loaded = reference.load(SMOLLM2)
    text = inspect.getdoc(textwrap) + "\n" + inspect.getdoc(textwrap.TextWrapper) + "\n" + inspect.getsource(json.dump)
    ids = tokenize(text)[:397]
    texts = pieces(ids, loaded.config["bos_token_id"])
    results.check("the last piece is a short one", len(texts) == 4 and len(texts[-1]) < PROMPT + ANSWER)
    with tempfile.NamedTemporaryFile("wb") as file:
        file.write(run("tokenize", "-m", SMOLLM2, "--decode", "-p", " ".join(map(str, ids))))
        file.flush()
        rows = json.loads(
            run(
                "perplexity",
                "-m",
                SMOLLM2,
                "-f",
                file.name,
                "--prompt-tokens",
                PROMPT,
                "--answer-tokens",
                ANSWER,
                "--compare",
                ",".join(POLICIES),
                "-o",
                "json",
            )
        )["rows"]
    results.check("a row for full depth and each policy", len(rows) == 1 + len(POLICIES))
    worst = 0
    expected, full = measure(loaded, texts)
    for name, row in zip(["full", *POLICIES], rows, strict=True):
        if name != "full":
            expected, _ = measure(loaded, texts, full, **POLICIES[name])
        wrong = differences(row, expected)
        results.check(f"perplexity {name}", not wrong, wrong)
        worst = max(worst, largest(row, expected))
        print(
            f"{name}: {expected['tokens']} tokens, perplexity {expected['ppl']:.4f} (ours {row['ppl']:.4f}), "
            f"KL {expected['kl_mean']:.5f} (ours {row['kl_mean']:.5f}), same top-1 {expected['same_top1']:.4f}"
        )
    print(f"largest relative difference {worst:.1e}")

    speed, row = POLICIES["speed:24"], rows[1]
    for fault, policy in {
        "K one less": dict(speed, k=23),
        "BoS unseen": dict(speed, bos=False),
        "the prompt ends one token early": dict(speed, split=PROMPT - 2),
    }.items():
        wrong = differences(row, measure(loaded, texts, full, **policy)[0])
        results.check(f"fault seen: {fault}", "ppl" in wrong and "kl_mean" in wrong, wrong)
    nan = dict(row, ppl=math.nan)
    results.check("fault seen: NaN", differences(nan, row) and differences(row, nan))
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed or not results.passed else 0


if __name__ == "__main__":
    sys.exit(main())
