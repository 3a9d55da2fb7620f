"""Draws docs/policies.svg: what each token does in each layer, under every policy, as `speed trace` reports it.

    make && python3 study/draw_policies.py

The model is a random one of five layers from the tests, with SwiftKV from layer 3 up in a pair: the authors' code takes
only groups that divide the upper layers. Its weights do not change the picture.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import ROOT, Speed

sys.path.insert(0, str(ROOT / "exercises"))
from swiftkv import initial_swiftkv

MODEL = ROOT / "tests" / "golden" / "swiftkv.safetensors"
K, GROUP = 3, 2
TOKENS, TAIL = 10, 3  # all tokens; the last TAIL of them are decode-phase


class Panel(NamedTuple):
    title: str
    subtitle: str
    flags: list


PANELS = [
    Panel("full", "every token, every layer", ["--policy", "full"]),
    Panel("speed  K=3", "upper layers never see the prompt", ["--policy", "speed", "--k", "3"]),
    Panel("pop  K=3", "keys and values from layer K's input", ["--policy", "pop", "--k", "3"]),
    Panel("swiftkv  K=3", "the same, one cache for two layers", ["--policy", "swiftkv"]),
    Panel("share  0,2,4", "a dropped layer reads the one below", ["--policy", "share", "--keep", "0,2,4"]),
]
# class of a cell in STYLE -> its text in the legend
LEGEND = {
    "whole": "prompt token, whole layer",
    "kv": "only its keys and values",
    "none": "no work",
    "anchor": "the BoS anchor, a constant",
    "tail": "answer token",
}
CELL, GAP, LEFT, TOP = 15, 42, 58, 62
# Mid-tones, which can be read on light and on dark pages. A slot is a white disc with a dark rim: it stands out on
# every cell and on both pages.
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #818b98 }
  .title { font-weight: 600; fill: #5b8fd0 } .small { font-size: 10px }
  .whole { fill: #2f6fb3 } .kv { fill: #8fbbe8 } .tail { fill: #d9822b } .anchor { fill: #8a63c9 }
  .none { fill: #8c959f; fill-opacity: .25 }
  .cache { fill: #fff; stroke: #16202b; stroke-width: 1 }
"""


def trace(model, flags):
    """The rows of `speed trace`, one for each layer."""
    text = "abcdefghijklmnop"[: TOKENS - 1]  # each letter is one token, and BoS comes first
    rows = Speed(ROOT / "speed", model).rows("trace", "-p", text, "--split", TOKENS - TAIL, *flags)
    return [row for row in rows if isinstance(row["layer"], int)]


def draw_panel(x, panel, rows):
    yield (
        f'<text class="title" x="{x}" y="22">{panel.title}</text>'
        f'<text class="small" x="{x}" y="38">{panel.subtitle}</text>'
    )
    prompt = TOKENS - TAIL
    for row in rows:
        y = TOP + CELL * (len(rows) - 1 - row["layer"])
        own_cache, caches_prompt = row["cache"] == row["layer"], row["kv_rows"] > row["tail_rows"]
        has_anchor = own_cache and not caches_prompt and row["slots"] == TAIL + 1
        for t in range(TOKENS):
            if t >= prompt:
                kind, cached = "tail", own_cache
            elif row["prompt_rows"]:
                kind, cached = "whole", own_cache
            elif caches_prompt:
                kind, cached = "kv", True
            else:
                kind, cached = ("anchor", True) if t == 0 and has_anchor else ("none", False)
            cx = x + CELL * t
            yield f'<rect class="{kind}" x="{cx + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'
            if cached:
                yield f'<circle class="cache" cx="{cx + CELL / 2}" cy="{y + CELL / 2}" r="3"/>'
    y = TOP + CELL * len(rows) + 14
    yield f'<text class="small" x="{x}" y="{y}">prompt</text>'
    yield f'<text class="small" x="{x + CELL * prompt}" y="{y}">answer</text>'


def main():
    layers, parts, x = 0, [], LEFT
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        model.write_bytes(initial_swiftkv(MODEL.read_bytes(), K, GROUP))
        traced = [trace(model, panel.flags) for panel in PANELS]
    for panel, rows in zip(PANELS, traced, strict=True):
        layers = len(rows)
        parts += draw_panel(x, panel, rows)
        x += CELL * TOKENS + GAP
    for layer in range(layers):
        y = TOP + CELL * (layers - 1 - layer) + 11
        parts.append(f'<text class="small" x="{LEFT - 8}" y="{y}" text-anchor="end">layer {layer}</text>')
    y = TOP + CELL * layers + 40
    legend_x = LEFT
    for kind, words in LEGEND.items():
        parts.append(
            f'<rect class="{kind}" x="{legend_x}" y="{y - 10}" width="12" height="12" rx="2"/>'
            f'<text class="small" x="{legend_x + 18}" y="{y}">{words}</text>'
        )
        legend_x += 34 + 6 * len(words)
    parts.append(
        f'<circle class="cache" cx="{legend_x + 6}" cy="{y - 4}" r="3"/>'
        f'<text class="small" x="{legend_x + 18}" y="{y}">has a slot in this layer\'s cache</text>'
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {y + 16}" width="{x}" height="{y + 16}" role="img" '
        f'aria-label="What each token does in each layer under five policies"><style>{STYLE}</style>'
        + "\n".join(parts)
        + "</svg>\n"
    )
    (ROOT / "docs" / "policies.svg").write_text(svg)


if __name__ == "__main__":
    main()
