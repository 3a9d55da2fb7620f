"""Writes tests/golden: tiny random models as exported files, and Hugging Face's logits for every policy. With them the
C++ tests compare with Hugging Face without Python. `make_golden.py [FOLDER]`; the same seeds give the same files.

cases.json: one {model, tokens, split, policy, k, bos, keep, group, file} for each case. `file` holds float32
[N - split, vocab].
greedy.json: {model, tokens, split, policy, k, bos, keep, group, new}. `new` holds the ids of Hugging Face's greedy
decoding.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import random_models
import reference


def policies(config):
    """Every policy that the model can run, as keyword arguments of reference.logits."""
    layers, swiftkv = config["num_hidden_layers"], config["swiftkv"]
    yield {"policy": "full"}
    for k in range(1, layers):
        yield {"policy": "speed", "k": k, "bos": True}
        yield {"policy": "speed", "k": k, "bos": False}
    for k in range(1, layers - 1):
        yield {"policy": "pop", "k": k}
    for keep in ([0], [0, 2], [0, 1]):
        yield {"policy": "share", "keep": keep}
    if swiftkv:
        yield {"policy": "swiftkv", "k": swiftkv["num_key_value_layers"]}


def described(name, config, tokens, split, policy):
    group = config["swiftkv"]["key_value_group_size"] if policy["policy"] == "swiftkv" else None
    return {
        "model": f"{name}.safetensors",
        "tokens": tokens,
        "split": split,
        "policy": policy["policy"],
        "k": policy.get("k", config["num_hidden_layers"]),
        "bos": policy.get("bos", True),
        "keep": policy.get("keep"),
        "group": group,
    }


def main(folder):
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.npy"), *folder.glob("*.json"), *folder.glob("*.safetensors")]:
        old.unlink()
    cases, greedy = [], []
    for seed, (name, spec) in enumerate(random_models.GOLDEN.items(), start=1):
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = random_models.write_checkpoint(Path(scratch) / name, spec, seed)
            path = random_models.export(checkpoint, folder / f"{name}.safetensors")
        loaded = reference.load(path)
        rng = np.random.default_rng(seed)
        text = [random_models.BOS, *(int(i) for i in rng.integers(0, random_models.BOS, 99))]
        for i, policy in enumerate(policies(loaded.config)):
            # Lengths below and above the scaled model's original length of 32, and 1 to 3 decode-phase tokens.
            n, tail = ((40, 3), (12, 2), (100, 1))[i % 3]
            file = f"{name}-{i:02}.npy"
            np.save(folder / file, reference.logits(loaded, text[:n], n - tail, **policy))
            cases.append({**described(name, loaded.config, text[:n], n - tail, policy), "file": file})
            if i % 4 == 0:
                new, lead = reference.greedy(loaded, text[:10], 9, 8, **policy)
                assert lead > 1e-4, "the two best tokens are so close that rounding could decide; take another seed"
                greedy.append({**described(name, loaded.config, text[:10], 9, policy), "new": new})
    for file, rows in (("cases.json", cases), ("greedy.json", greedy)):
        (folder / file).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {len(cases)} cases, {len(greedy)} greedy texts, {total / 1000:.0f} kB in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "golden")
