"""Compares the hidden states of two prompts: is row 0, the BoS token, the same in both, bit for bit?

    ./speed trace -p "one text" --dump build/a.safetensors
    ./speed trace -p "another"  --dump build/b.safetensors
    python3 exercises/rows.py build/a.safetensors build/b.safetensors

A row is a layer: whether its output at position 0 and at position 1 is the same, and the norms of these two rows.
"""

import json
import math
import struct
import sys


def states(path):
    """{layer: [the bytes of each row]} of a dump: float32, [rows, hidden]."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    found = {}
    for name, tensor in header.items():
        if name.startswith("layer."):
            begin, end = tensor["data_offsets"]
            size = 4 * tensor["shape"][1]
            found[int(name[6:])] = [data[i : i + size] for i in range(begin, end, size)]
    return found


def norm(row):
    return math.sqrt(sum(x * x for x in struct.unpack(f"<{len(row) // 4}f", row)))


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    a, b = states(sys.argv[1]), states(sys.argv[2])
    print("layer  row 0 the same  row 1 the same  norm of row 0  of row 1")
    for layer in sorted(a):
        same = ["yes" if a[layer][i] == b[layer][i] else "no" for i in (0, 1)]
        norms = [f"{norm(a[layer][i]):.0f}" for i in (0, 1)]
        print(f"{layer:<7}{same[0]:<16}{same[1]:<16}{norms[0]:>13}{norms[1]:>10}")


if __name__ == "__main__":
    main()
