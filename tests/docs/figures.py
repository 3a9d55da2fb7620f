"""Figures of the pages that come from stored records: made again from the record, and looked for in the page.

Tables: the study that wrote a page's table writes it once more (its `markdown`), from the record beside the page.
Sentences: each line of SENTENCES is built from a record and must stand in its page, word for word.
"""

import json
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "study"))
import common  # noqa: E402
import gpu  # noqa: E402
import quality  # noqa: E402
import small_eval  # noqa: E402

# importance.py measures with torch; its table needs none.
for name in ("numpy", "torch", "transformers", "reference"):
    sys.modules.setdefault(name, types.ModuleType(name))
import importance  # noqa: E402


def record(path):
    return json.loads((ROOT / path).read_text())


def plain(text):
    """Text with one space between words, so that line breaks do not matter."""
    return " ".join(text.split())


def by_spec(path):
    return {row["spec"]: row for row in record(path)["summary"]}


def cell(row, measure, digits=".1f"):
    return quality.cell(row, measure, digits)


# ---- sentences, page by page ----


def readme():
    s = by_spec("docs/quality/smollm2.json")
    found = {spec: round(row["exact"] * 30 / 100) for spec, row in s.items()}
    yield f"how many of 30 answers it finds in a passage (full depth: {found['full']})"
    for k in (28, 24, 22, 20, 15):
        specs = f"speed:{k}", f"speed:{k}:no-bos", f"pop:{k}"
        cells = [f"{s[x]['same']:.1f} %" if x in s else "" for x in specs] + [str(found.get(x, "")) for x in specs]
        yield "| " + " | ".join([str(k), *cells]).replace("|  |", "| |") + " |"
    yield f"at K = 24 it makes the KL divergence from full depth {times_anchor(s)} times smaller"
    first, later = at_128k("prompt"), at_128k("token")
    yield f"the first token of a 128K prompt comes {first:.2f} times as fast and later ones {later:.2f} times"


def at_128k(kind):
    """How many times as fast K = 24 is on the GPU at 128K: "prompt" or "token"."""
    times, _ = gpu.results()
    return times["full", kind, 131000].seconds / times["speed K=24", kind, 131000].seconds


def times_anchor(s):
    return in_words(s["speed:24:no-bos"]["kl"] / s["speed:24"]["kl"])


def in_words(x):
    return ["", "", "two", "three", "four", "five", "six", "seven", "eight"][round(x)]


def quality_page():
    s = by_spec("docs/quality/smollm2.json")
    for k in (28, 24, 22, 20, 15, 8):
        specs = f"speed:{k}", f"speed:{k}:no-bos", f"pop:{k}"
        yield f"| K = {k} | " + " | ".join(cell(s[x], "same") if x in s else "" for x in specs).replace("|  |", "| |")
    on, off = s["speed:24"], s["speed:24:no-bos"]
    yield f"At K = 24 the KL divergence is {cell(on, 'kl', '.3f')} with it and {cell(off, 'kl', '.3f')} without"
    yield f"Same top-1 falls from {on['same']:.1f} to {s['speed:22']['same']:.1f} %"
    small = by_spec("docs/quality/small.json")
    yield f"({small['speed:5']['exact']:.1f} % of 120 answers are right, as at full depth)"
    yield f"({small['speed:4']['exact']:.1f} % and {small['speed:3']['exact']:.1f} % right)"
    yield f"({small['speed:2']['exact']:.1f} % right)"


def importance_page():
    r = record("docs/importance/results.json")
    ratio, by_layer = r["third"]["ratios"], r["importance"]

    def words(e, digits):
        return f"{e['low']:{digits}} to {e['high']:{digits}}"

    prefill, decode = ratio["prefill"], ratio["decode"]
    yield f"{prefill['value']:.2f} of the mean importance of layers 10 to 19 (95 % interval {words(prefill, '.2f')})"
    yield f"{decode['value']:.2f} ({words(decode, '.2f')})"
    without, anchored = by_layer["prefill, no anchor"][28], by_layer["prefill"][28]
    yield f"the importance there is {without['value']:.4f} ({words(without, '.4f')}), with it"
    yield f"with it {anchored['value']:.3f} ({words(anchored, '.3f')})"
    at = next(row["ratio"] for row in r["pop"] if row["k"] == 24)
    yield f"right at K = 24 (ratio {at['value']:.2f}, interval {words(at, '.2f')})"


def gpu_page():
    yield f'| time to first token | "33 % better" | 1.35 times as fast | {at_128k("prompt"):.2f} times as fast |'
    yield f"| {at_128k('token'):.2f} times as fast |"
    other = {what: rate for what, _, rate, _ in gpu.lines("rivals.tsv")}
    own = {what: rate for what, _, rate, _ in gpu.lines("times.tsv")}
    lengths = (2048, 8192, 32768)
    rates = [f"{own[f'attention, last chunk of {n}']:.0f}" for n in lengths]
    yield f"{rates[0]}, {rates[1]} and {rates[2]} TFLOP/s over 2K, 8K and 32K slots"
    for name in ("cuDNN", "FlashAttention-2"):
        rates = [f"{other[f'{name} attention, {n}' if name == 'cuDNN' else f'{name}, {n}']:.0f}" for n in lengths]
        yield f"{name}'s at {rates[0]}, {rates[1]} and {rates[2]}"


def needle_page():
    found = [json.loads(line) for line in (ROOT / "docs/hf/needle.jsonl").read_text().splitlines()]
    for k in found[0]["found"]:
        cells = []
        for n in (1024, 2048, 4096, 8192):
            some = [row["found"][k] for row in found if row["length"] == n]
            interval = common.wilson(sum(some), len(some))
            cells.append(f"{sum(some)} of {len(some)} ({interval.low:.0f}–{interval.high:.0f} %)")
        yield f"| {k} | " + " | ".join(cells) + " |"


def small_page():
    cells = {(c["policy"], c["k"], c["prompt"], c["kind"]): c for c in record("docs/small/results.json")["cells"]}
    assert 30 < cells["speed, BoS on", 4, "right", "two"]["percent"] < 36  # "one time in three"
    yield f"draws all {record('docs/small/results.json')['training_stories']:,} training stories again"


def walkthrough():
    s = by_spec("docs/quality/smollm2.json")
    yield f"the KL divergence is {times_anchor(s)} times larger without it"


SENTENCES = {
    "docs/walkthrough.md": walkthrough,
    "README.md": readme,
    "docs/quality/README.md": quality_page,
    "docs/importance/README.md": importance_page,
    "docs/gpu/README.md": gpu_page,
    "docs/hf/README.md": needle_page,
    "docs/small/README.md": small_page,
}


# ---- whole tables ----


def title(page):
    return re.split(r", \d+ layers", (ROOT / page).read_text(), maxsplit=1)[0]


def without_intervals(text):
    return re.sub(r" \([\d.]+–[\d.]+\)", "", text)


def quality_table(page, data):
    """The page again. The table by kind draws 2,000 samples a cell for its intervals, which takes minutes: left out."""
    kept, quality.RESAMPLES = quality.RESAMPLES, 1
    again = quality.markdown(title(page), record(data))
    quality.RESAMPLES = kept
    return again.split("\nSame top-1 in %")[0], again


_again = {}


def tables():
    """{page: [lines that it must hold]}"""
    if _again:
        return _again
    _again["docs/small/results.md"] = small_eval.markdown(record("docs/small/results.json")).splitlines()
    _again["docs/importance/results.md"] = importance.markdown(record("docs/importance/results.json")).splitlines()
    found, _ = gpu.results()
    speeds = [*gpu.speed_table(found, "prompt"), *gpu.speed_table(found, "token")]
    _again["docs/gpu/results.md"] = speeds + gpu.kernel_table()
    for name in ("smollm2", "small"):
        exact, all_of_it = quality_table(f"docs/quality/{name}.md", f"docs/quality/{name}.json")
        _again[f"docs/quality/{name}.md"] = exact.splitlines()
        _again[f"docs/quality/{name}.md, without intervals"] = without_intervals(all_of_it).splitlines()
    return _again


def faults(texts):
    for page, lines in tables().items():
        file, *bare = page.split(", ")
        own = (without_intervals(texts[file]) if bare else texts[file]).splitlines()
        for line in lines:
            if line not in own:
                yield f"{file}: its record gives: {line}"
    for page, sentences in SENTENCES.items():
        text = plain(texts[page])
        for sentence in sentences():
            if plain(sentence) not in text:
                yield f"{page}: its record gives: {sentence}"


PLANTED = [
    ("README.md", "| 24 | 94.2 %", "| 24 | 94.3 %"),
    ("docs/quality/smollm2.md", "0.048 (0.039–0.060)", "0.048 (0.039–0.061)"),
    ("docs/quality/smollm2.md", "| 95.0 (93.1–96.8)", "| 95.1 (93.1–96.8)"),
    ("docs/small/results.md", "32.8 (28.8", "32.9 (28.8"),
    ("docs/importance/README.md", "1.59 to 2.02", "1.59 to 2.03"),
    ("docs/gpu/results.md", "1.348", "1.349"),
    ("docs/hf/README.md", "6 of 13 (23", "7 of 13 (23"),
]
