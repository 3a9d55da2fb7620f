"""Where one token looks, layer by layer, as text: what the page of `speed trace --html` shows as dots.

    ./speed trace --chat -f tests/page/story.txt -o json 2>/dev/null | python3 exercises/look.py --at 91
    ... | python3 exercises/look.py --at 91 --policy speed --k 4

Reads `speed-trace/1` (docs/trace.md) from standard input. A row is a layer: the word that its state would say next, if
the final norm and the output head were applied to it (the logit lens), with its probability; then the tokens that a
head gives half of its weight or more. Of the heads that look at one token the document keeps the strongest.
"""

import argparse
import base64
import json
import sys


def rows(document, run):
    """Yields (layer, position, slots) in the order of the stored rows; slots: positions that the row may see."""
    fed = len(document["ids"])
    for layer in range(run["from"], document["model"]["shape"]["n_layers"]):
        first = 0 if layer < run["prompt_layers"] and run["policy"] in ("full", "share") else run["split"]
        own = range(run["split"], fed)
        hidden = run["policy"] == "speed" and layer >= run["k"]
        for position in range(first, fed):
            if hidden:
                yield layer, position, ([0] if run["bos"] else []) + [p for p in own if p <= position]
            else:
                yield layer, position, list(range(position + 1))


def look(document, run, at):
    """{layer: ([(weight, token, head), ...], word it would say, probability)} of the token at position `at`."""
    attention, lens = base64.b64decode(run["attention"]), base64.b64decode(run["lens"])
    found, begin, lens_row = {}, 0, 0
    for layer, position, slots in rows(document, run):
        if run["dense"]:
            cells = list(zip(attention[begin::2], attention[begin + 1 :: 2], slots, strict=False))
            begin += 2 * len(slots)
        else:  # the strongest slots only: slot, weight, head
            row = attention[begin : begin + 4 * min(16, len(slots))]
            cells = [
                (w, h, slots[low + 256 * high]) for low, high, w, h in zip(*(row[i::4] for i in range(4)), strict=True)
            ]
            begin += len(row)
        if position < run["split"]:
            continue
        if position == at:
            word = int.from_bytes(lens[10 * lens_row : 10 * lens_row + 2], "little")
            looks = sorted(((w / 255) ** 2, document["tokens"][seen], head) for w, head, seen in cells)
            found[layer] = looks[::-1], document["words"][word], (lens[10 * lens_row + 2] / 255) ** 2
        lens_row += 1
    if begin != len(attention):
        sys.exit(f"look.py: {len(attention)} bytes of attention, {begin} expected")
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--at", type=int, required=True, help="position of the token")
    p.add_argument("--policy", default="full")
    p.add_argument("--k", type=int)
    p.add_argument("--no-bos", action="store_true")
    a = p.parse_args()
    document = json.load(sys.stdin)
    wanted = (a.policy, a.k, (not a.no_bos) if a.policy == "speed" else None)
    runs = [document["full"], *document["runs"]]
    names = [(r["policy"], r["k"] if a.k else None, r["bos"]) for r in runs]
    if wanted not in names:
        sys.exit(f"look.py: no run of {a.policy} K={a.k} in this document")
    run = runs[names.index(wanted)]
    print(f"{json.dumps(document['tokens'][a.at])} at position {a.at}, {a.policy}{f' K={a.k}' if a.k else ''}")
    print("layer  would say            where a head looks (weight of half or more; head)")
    for layer, (looks, word, probability) in reversed(look(document, run, a.at).items()):
        strong = [f"{json.dumps(token)} {weight:.2f} ({head})" for weight, token, head in looks if weight >= 0.5]
        print(f"{layer:<7}{json.dumps(word):<14}{probability:>5.0%}   {'  '.join(strong)}".rstrip())


if __name__ == "__main__":
    main()
