"""Draws what was measured on a GPU: docs/gpu/results.md and results.svg, from the records beside them.

    python3 study/gpu.py [--take FOLDER]

FOLDER holds the results of a first run (`make gpu-kit`); its records are copied to docs/gpu. Nothing is measured here.
The records are run records of ./speed bench, and the tables of times and rivals.py.
"""

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import NamedTuple

from common import ROOT, fail, save, subplots, table

PLACE = ROOT / "docs" / "gpu"
BENCHES = ("bench.json", "bench32.json", "bench128.json", "tokens128.json")
RECORDS = (*BENCHES, "times.tsv", "rivals.tsv", "summary.md")
FULL = "full"
COLORS = {"transformers": "#8c959f", "full": "#1f5f9f", "speed K=24": "#1f8fe0", "speed K=16": "#35a853"}


class Result(NamedTuple):
    seconds: float  # median; a prompt, or one generated token
    share: float  # of what the GPU's own ceilings allow


def results():
    """{(policy, "prompt" or "token", tokens before or in it): Result}, and the first record.

    A share is of the highest ceiling that any of the records has: beside 128K tokens the card reads memory at 2.6 TB/s
    where `bench` measures it, but generation there reads 2.9."""
    found = {}
    records = [json.loads((PLACE / name).read_text()) for name in BENCHES]
    rows = [row for record in records for row in record["results"]]
    ceilings = {key: max(row[key] for row in rows) for key in ("ceiling_gflops", "ceiling_gbps")}
    for record in records:
        for row in record["results"]:
            seconds = statistics.median(row["samples_ns"]) / 1e9
            kind = "gbps" if row["n_gen"] else "gflops"
            share = row[kind] / ceilings["ceiling_" + kind]
            if row["n_gen"]:
                key, seconds = ("token", row["n_depth"]), seconds / row["n_gen"]
            else:
                key = ("prompt", row["n_prompt"])
            found[row["name"], *key] = Result(seconds, share)
    return found, records[0]


def lines(name):
    """[(what, microseconds, rate, unit)] of a .tsv."""
    rows = [line.split("\t") for line in (PLACE / name).read_text().splitlines()]
    return [(row[0].strip(), float(row[1]), *((float(row[2]), row[3]) if row[2] else (0.0, ""))) for row in rows]


def rivals():
    """{prompt length: seconds of transformers' fastest backend}."""
    best = {}
    for what, microseconds, *_ in lines("rivals.tsv"):
        if match := re.fullmatch(r"prompt of (\d+), .*", what):
            length = int(match[1])
            best[length] = min(best.get(length, 1e9), microseconds / 1e6)
    return best


def policies(found):
    return sorted({policy for policy, *_ in found}, key=list(COLORS).index)


def lengths(found, kind):
    return sorted({n for _, k, n in found if k == kind})


def in_words(n):
    return "an empty cache" if n == 0 else f"{round(n / 1024)}K"


def milliseconds(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def speed_table(found, kind):
    columns = ["prompt of" if kind == "prompt" else "a token after", "full depth", "of ceiling"]
    others = [policy for policy in policies(found) if policy != FULL]
    columns += [head for policy in others for head in (policy, "times as fast")]
    best = rivals() if kind == "prompt" else {}
    columns += ["transformers", "full depth is"] if best else []
    rows = []
    for n in lengths(found, kind):
        full = found[FULL, kind, n]
        cells = [in_words(n), milliseconds(full.seconds), f"{100 * full.share:.0f} %"]
        for policy in others:
            here = found.get((policy, kind, n))
            cells += [milliseconds(here.seconds), f"{full.seconds / here.seconds:.3f}"] if here else ["", ""]
        if best:
            there = n in best
            cells += [milliseconds(best[n]), f"{best[n] / full.seconds:.2f} times as fast"] if there else ["", ""]
        rows.append(cells)
    return table(columns, rows)


def kernel_table():
    """Attention and matrix products: ours and PyTorch's."""
    rates = {what: (rate, unit) for what, _, rate, unit in lines("times.tsv")}
    other = {what: (rate, unit) for what, _, rate, unit in lines("rivals.tsv")}

    def cell(where, what):
        return "{:.0f} {}".format(*where[what]) if what in where else ""

    rows = []
    for n in (2048, 8192, 32768):
        what = f"attention, last chunk of {n}"
        note = "here the last 8,192 rows, there all" if n > 8192 else ""
        rows.append([f"attention of {n:,} rows", cell(rates, what), cell(other, f"cuDNN attention, {n}"),
                     cell(other, f"FlashAttention-2, {n}"), note])  # fmt: skip
    rows.append(["one row over 8,192 slots", cell(rates, "attention of one row over 8192"),
                 cell(other, "cuDNN attention, one row, 8192"),
                 cell(other, "FlashAttention-2, one row, 8192"), ""])  # fmt: skip
    return table(["", "here", "cuDNN", "FlashAttention-2", ""], rows)


def draw(found):
    figure, (left, right) = subplots(1, 2, figsize=(10, 3.9), width_ratios=(1.1, 1))
    best = rivals()
    series = {"transformers": sorted(best.items())} if best else {}
    for policy in policies(found):
        series[policy] = [(n, found[policy, "prompt", n].seconds)
                          for n in lengths(found, "prompt") if (policy, "prompt", n) in found]  # fmt: skip
    for name, points in series.items():
        label = {"transformers": "transformers, best backend", FULL: "full depth"}.get(name, name)
        left.plot(*zip(*points, strict=True), color=COLORS[name], marker="o", ms=4, lw=1.6, label=label)
    left.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="time to the first token")
    ticks = lengths(found, "prompt")
    left.set_xticks(ticks, [in_words(n) for n in ticks])
    left.set_yticks([0.01, 0.1, 1, 10], ["10 ms", "100 ms", "1 s", "10 s"])
    left.minorticks_off()
    left.legend()

    shown = [policy for policy in policies(found) if policy != FULL]
    groups = lengths(found, "prompt")
    for i, policy in enumerate(shown):
        for kind, shade in (("prompt", 1.0), ("token", 0.45)):
            at, height = [], []
            for j, n in enumerate(groups):
                if (policy, kind, n) in found:
                    at.append(j + (i - (len(shown) - 1) / 2) * 0.42 + (-0.1 if kind == "prompt" else 0.1))
                    height.append(found[FULL, kind, n].seconds / found[policy, kind, n].seconds)
            label = f"{policy}: {'first token' if kind == 'prompt' else 'later tokens'}"
            bars = right.bar(at, height, 0.19, color=COLORS[policy], alpha=shade, label=label)
            right.bar_label(bars, fmt="%.2f", fontsize=6.5, color="#808080", padding=1)
    right.axhline(1, color="#808080", lw=0.8)
    right.set(ylabel="times as fast as full depth", xlabel="tokens of the prompt", ylim=(0, 2.8))
    right.set_xticks(range(len(groups)), [in_words(n) for n in groups])
    right.legend(fontsize=8, ncols=2, loc="upper center")
    save(figure, PLACE / "results.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="copy the records of a first run from here")
    options = parser.parse_args()
    if options.take:
        PLACE.mkdir(exist_ok=True)
        for name in RECORDS:
            if not (options.take / name).exists():
                fail(f"{options.take / name} is missing")
            shutil.copy(options.take / name, PLACE / name)
    found, first = results()
    for what in found:
        if what[0] not in COLORS:
            fail(f"no colour for {what[0]}")
    (PLACE / "results.md").write_text(
        "\n".join(
            [
                "# Llama-3.1-8B's shape on one GPU",
                "",
                f"{first['device']['name']}; {first['program']}. Random weights in bf16, one request, medians."
                " Written by `study/gpu.py` from the records beside this file.",
                "",
                "## Time to the first token",
                "",
                *speed_table(found, "prompt"),
                "",
                "## Time of a generated token",
                "",
                *speed_table(found, "token"),
                "",
                "## Kernels",
                "",
                *kernel_table(),
                "",
            ]
        )
    )
    draw(found)


if __name__ == "__main__":
    main()
