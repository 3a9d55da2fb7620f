"""Draws docs/policies.svg: under each policy, what each token does in each layer, as the engine itself traces it.

    make && python3 study/draw_policies.py

The model is a random one of five layers that comes with the tests; nothing in the picture depends on its weights.
"""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "golden" / "swiftkv.safetensors"
TOKENS, TAIL = 10, 3  # of them decode-phase
PANELS = [
    ("full", "every token, every layer", ["--policy", "full"]),
    ("speed  K=3", "upper layers never see the prompt", ["--policy", "speed", "--k", "3"]),
    ("pop  K=3", "keys and values from layer K's input", ["--policy", "pop", "--k", "3"]),
    ("swiftkv  K=2", "the same, one cache for two layers", ["--policy", "swiftkv"]),
    ("share  0,2,4", "a dropped layer reads the one below", ["--policy", "share", "--keep", "0,2,4"]),
]
CELL, GAP, LEFT, TOP = 15, 42, 58, 62
STYLE = """
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #818b98 }
  .title { font-weight: 600; fill: #5b8fd0 } .small { font-size: 10px }
  .whole { fill: #2f6fb3 } .kv { fill: #8fbbe8 } .tail { fill: #d9822b } .anchor { fill: #8a63c9 }
  .none { fill: #8c959f; fill-opacity: .25 }
  .cache { fill: none; stroke: #16202b; stroke-width: 1.2 } .legend { stroke: #818b98 }
"""  # mid-tones, legible on light and dark


def trace(flags):
    text = "abcdefghijklmnop"[: TOKENS - 1]  # one token a letter, and BoS in front
    command = [ROOT / "speed", "trace", "-m", MODEL, "-p", text, "--split", str(TOKENS - TAIL), "-o", "json", *flags]
    out = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return [row for row in out["rows"] if isinstance(row["layer"], int)]


def panel(x, title, line, rows):
    yield f'<text class="title" x="{x}" y="22">{title}</text><text class="small" x="{x}" y="38">{line}</text>'
    prompt = TOKENS - TAIL
    for row in rows:
        y = TOP + CELL * (len(rows) - 1 - row["layer"])
        own, left = row["cache"] == row["layer"], row["kv_rows"] > row["tail_rows"]
        anchor = own and not left and row["slots"] == TAIL + 1
        for t in range(TOKENS):
            if t >= prompt:
                kind, cached = "tail", own
            elif row["prompt_rows"]:
                kind, cached = "whole", own
            elif left:
                kind, cached = "kv", True
            else:
                kind, cached = ("anchor", True) if t == 0 and anchor else ("none", False)
            cx = x + CELL * t
            yield f'<rect class="{kind}" x="{cx + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="2"/>'
            if cached:
                yield f'<circle class="cache" cx="{cx + CELL / 2}" cy="{y + CELL / 2}" r="2.6"/>'
    y = TOP + CELL * len(rows) + 14
    yield f'<text class="small" x="{x}" y="{y}">prompt</text>'
    yield f'<text class="small" x="{x + CELL * prompt}" y="{y}">answer</text>'


def main():
    layers, parts, x = 0, [], LEFT
    for title, line, flags in PANELS:
        rows = trace(flags)
        layers = len(rows)
        parts += panel(x, title, line, rows)
        x += CELL * TOKENS + GAP
    for l in range(layers):
        y = TOP + CELL * (layers - 1 - l) + 11
        parts.append(f'<text class="small" x="{LEFT - 8}" y="{y}" text-anchor="end">layer {l}</text>')
    y = TOP + CELL * layers + 40
    legend = [
        ("whole", "prompt token, whole layer"),
        ("kv", "only its keys and values"),
        ("none", "no work"),
        ("anchor", "the BoS anchor, a constant"),
        ("tail", "answer token"),
    ]
    lx = LEFT
    for kind, words in legend:
        parts.append(
            f'<rect class="{kind}" x="{lx}" y="{y - 10}" width="12" height="12" rx="2"/>'
            f'<text class="small" x="{lx + 18}" y="{y}">{words}</text>'
        )
        lx += 34 + 6 * len(words)
    parts.append(
        f'<circle class="cache legend" cx="{lx + 6}" cy="{y - 4}" r="2.6"/>'
        f'<text class="small" x="{lx + 18}" y="{y}">has a slot in this layer\'s cache</text>'
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
