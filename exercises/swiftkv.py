"""Makes a SwiftKV model of any model file, at its initial weights: where its training begins (arXiv 2410.03960).

    python3 exercises/swiftkv.py models/small.safetensors build/swiftkv.safetensors --k 4 --group 2

Queries, keys and values above K get projections of their own, which begin as copies; the norm that all of them share
begins as layer K's. Layers of a group use one cache, that of the first. The number of upper layers must be a multiple
of the group, as in the authors' code.
"""

import argparse
import json
import struct
import sys
from pathlib import Path


def initial_swiftkv(source, k, group):
    """The bytes of a model file with SwiftKV projections above layer k."""
    (length,) = struct.unpack("<Q", source[:8])
    header, data = json.loads(source[8 : 8 + length]), source[8 + length :]
    metadata = header.pop("__metadata__")
    config = json.loads(metadata["config"])
    layers = config["num_hidden_layers"]
    if not 1 <= k < layers or group < 1 or (layers - k) % group:
        sys.exit(f"swiftkv.py: K = {k} of {layers} layers leaves {layers - k}, not groups of {group}; choose others")
    tensors = {
        name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])])
        for name, t in header.items()
        if "swiftkv" not in name
    }
    tensors["model.norm_swiftkv.weight"] = tensors[f"model.layers.{k}.input_layernorm.weight"]
    for layer in range(k, layers):
        for p in "qkv" if (layer - k) % group == 0 else "q":
            name = f"model.layers.{layer}.self_attn.{p}_proj"
            tensors[f"{name}_swiftkv.weight"] = tensors[f"{name}.weight"]
    config["swiftkv"] = {"num_key_value_layers": k, "key_value_group_size": group, "original_projections": True}
    metadata["config"] = json.dumps(config)
    metadata.pop("sha256", None)  # of the weights that the file had
    header, offset, parts = {"__metadata__": metadata}, 0, []
    # Bytes last: every other tensor then begins at a multiple of its size.
    for name, (dtype, shape, raw) in sorted(tensors.items(), key=lambda t: ("U32", "BF16", "U8").index(t[1][0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        parts.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("source", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--k", type=int, required=True, help="prompt tokens visit layers 0..K-1")
    p.add_argument("--group", type=int, default=1, help="layers that share a cache (1)")
    a = p.parse_args()
    a.out.write_bytes(initial_swiftkv(a.source.read_bytes(), a.k, a.group))


if __name__ == "__main__":
    main()
