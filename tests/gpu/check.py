"""The checks that need a GPU, in one command: `make gpu-check` builds, runs them, and writes docs/gpu/check.{json,md}.

    check.py [--minutes N] [--out FOLDER] [--only STEP,...] [--seed N] [--device cpu]

Environment: SPEED is the program (default ./speed), TESTS is tests/test_gpu.cpp built by nvcc (default
build-gpu/tests), SPEED_MODEL is the exported SmolLM2. Needs an NVIDIA GPU. The comparison with Hugging Face also needs
torch and transformers; the memory checks need compute-sanitizer. A step that the machine cannot do is skipped, and the
report says so. If a step fails, the others still run, and the exit status is 1. A step starts only if the seconds it
needs are left of the minutes (8). The report is written after each step. --device cpu tests this script on a machine
without a GPU. With SPEED and TESTS given, `make gpu-check` builds nothing.

Steps
  kernels    every kernel against cpu/reference.h, on new random inputs, outputs filled with NaN; whole models and laws
             (test_gpu.cpp)
  repeat     two runs give the same logits and the same text, bit for bit
  laws       K = L, and share with all caches kept, equal full depth bit for bit
  hf         logits under every policy, compared with Hugging Face in fp32 on this GPU: the KL divergence, and how many
             rows have another most likely token. Neither may be larger than Hugging Face's own in bf16. (Two standard
             deviations are allowed for the number of rows.)
  sanitizer  memcheck, racecheck, synccheck and initcheck on the kernels, the small model and one with heads of 128.
             Only our own kernels are watched: of cuBLAS's the tools report errors that are none
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))
from places import ROOT, SMOLLM2, SPEED

TESTS = os.environ.get("TESTS", str(ROOT / "build-gpu" / "tests"))
SMALL = ROOT / "models" / "small.safetensors"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# In this order, each with the seconds it needs at least; the memory checks, which take longest, get what is left.
STEPS = {"kernels": 20, "repeat": 15, "laws": 20, "hf": 40, "sanitizer": 20}
QUESTION = "Feta is a barber. Pale has a lamp. Kara has a book. The code word is resane. What is Feta?"

# Three shapes. A small model with heads of 128, and four query heads for each KV head as in Llama-3.1-8B. One with
# SwiftKV and heads of 64. Two layers of Llama-3.1-8B.
HEAD128 = dict(
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=128,
    intermediate_size=1024,
    vocab_size=1024,
    rope_theta=500000.0,
    max_position_embeddings=4096,
)
SWIFTKV = dict(
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=512,
    rope_theta=500000.0,
    max_position_embeddings=4096,
    num_key_value_layers=3,
    key_value_group_size=2,
)
LLAMA = dict(
    hidden_size=4096,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=2048,
    rope_theta=500000.0,
    max_position_embeddings=4096,
)


class Skip(Exception):
    """The machine cannot do this step. The text says why."""


class Failed(Exception):
    pass


def seconds_left(args):
    return args.began + args.minutes * 60 - time.time()


def run(*command, timeout=240, **more):
    """Standard output and error of a command, in one text, and its exit status."""
    try:
        done = subprocess.run(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            cwd=ROOT,
            **more,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(map(str, command))[:120]}: still running after {timeout:.0f} s") from None
    return done.stdout, done.returncode


def need(*command, **more):
    out, code = run(*command, **more)
    if code:
        raise Failed(f"{' '.join(map(str, command))[:120]}: exit {code}: {out.strip()[-400:]}")
    return out


def flags(policy="full", k=None, bos=True, keep=None):
    out = ["--policy", policy]
    if k is not None:
        out += ["--k", k]
    if not bos:
        out += ["--no-bos"]
    if keep is not None:
        out += ["--keep", ",".join(map(str, keep))]
    return out


def logits(args, model, tokens, split, **policy):
    """The program's logits, float32 [N - split, vocab]."""
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        ids, out = Path(scratch) / "ids.txt", Path(scratch) / "out.npy"
        ids.write_text(" ".join(map(str, tokens)))
        command = [SPEED, "logits", "-m", model, "--device", args.device, "--tokens-file", ids, "--split", split]
        need(*command, "--out", out, *flags(**policy))
        return np.load(out)


def models(work):
    return [SMALL, work["head128"], *([SMOLLM2] if SMOLLM2.exists() else [])]


def config_of(model):
    with open(model, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(header["__metadata__"]["config"])


def tokens_of(model, count, seed):
    """BoS and `count` - 1 more ids: README.md if the tokenizer has real words, else random ids."""
    import numpy as np

    config = config_of(model)
    if config["vocab_size"] > 10000:
        ids = [int(i) for i in need(SPEED, "tokenize", "-m", model, "-f", "README.md").split()]
    else:
        ids = [int(i) for i in np.random.default_rng(seed).integers(4, min(config["vocab_size"], 260), count)]
    return [config["bos_token_id"], *ids][:count]


# ---- steps -----------------------------------------------------------------------------------------------------------


def kernels(report, args, work):
    out = need(TESTS, "[gpu]", env={**os.environ, "SPEED_TEST_SEED": str(args.seed)})
    report["tests"] = out.strip().splitlines()[-1]


def repeat(report, args, work):
    import numpy as np

    for model in models(work):
        tokens = tokens_of(model, 300, args.seed)
        first, second = (logits(args, model, tokens, 100) for _ in range(2))
        if first.tobytes() != second.tobytes() or not np.isfinite(first).all():
            raise Failed(f"{model.name}: two runs differ, or are not finite")
        texts = [
            need(SPEED, "generate", "-m", model, "--device", args.device, "-p", QUESTION, "-n", 40) for _ in range(2)
        ]
        if texts[0].splitlines()[0] != texts[1].splitlines()[0]:
            raise Failed(f"{model.name}: two greedy texts differ")
    report["models"] = [m.name for m in models(work)]


def laws(report, args, work):
    cases = 0
    for model in models(work):
        layers, tokens = config_of(model)["num_hidden_layers"], tokens_of(model, 200, args.seed)
        full = logits(args, model, tokens, 150).tobytes()
        for policy in (
            {"policy": "speed", "k": layers},
            {"policy": "speed", "k": layers, "bos": False},
            {"policy": "pop", "k": layers},
            {"policy": "pop", "k": layers - 1},
            {"policy": "share", "keep": range(layers)},
        ):
            if logits(args, model, tokens, 150, **policy).tobytes() != full:
                raise Failed(f"{model.name}: {policy} is not full depth bit for bit")
            cases += 1
        if logits(args, model, tokens, 150, policy="speed", k=layers - 1).tobytes() == full:
            raise Failed(f"{model.name}: K = L - 1 equals full depth, so the comparison shows nothing")
    report["cases"] = cases


def divergence(ours, reference):
    """Mean KL divergence from the reference's distribution in nats, and the number of rows with another most likely
    token. Infinite, and all rows, if anything is not finite."""
    import numpy as np

    if ours.shape != reference.shape or not np.isfinite(ours).all():
        return float("inf"), ours.shape[0]

    def log_softmax(x):
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(-1).mean()), int((ours.argmax(-1) != reference.argmax(-1)).sum())


def hf(report, args, work):
    try:
        import torch

        import reference
    except ImportError as error:
        raise Skip(f"{error}: run this with the virtual environment that `make test-hf` makes") from None
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Skip("torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    report["torch"], report["cases"], bad = torch.__version__, [], []
    # The last one, two layers of Llama-3.1-8B's size, is made only when it is its turn: 20 s and 2 GB.
    for model, count, split in (
        (SMALL, 400, 100),
        (SMOLLM2, 1000, 400),
        (work["head128"], 600, 200),
        (work["swiftkv"], 600, 200),
        (work["llama"], 600, 200),
    ):
        if seconds_left(args) < 20:
            name = getattr(model, "name", "llama-3.1-8b-layers")
            report["cases"].append({"model": name, "skipped": f"the {args.minutes:g} minutes are over"})
            continue
        if callable(model):
            model = model()
        if not model.exists():
            report["cases"].append({"model": model.name, "skipped": "not here; ./run.sh fetches it"})
            continue
        tokens, layers = tokens_of(model, count, args.seed), config_of(model)["num_hidden_layers"]
        k = max(1, layers * 3 // 4)
        policies = [
            {"policy": "full"},
            {"policy": "speed", "k": k},
            {"policy": "speed", "k": k, "bos": False},
            {"policy": "pop", "k": k},
            {"policy": "share", "keep": [i for i in range(layers) if i < k or (i - k) % 2]},
        ]
        if config_of(model)["swiftkv"]:
            policies.append({"policy": "swiftkv", "k": config_of(model)["swiftkv"]["num_key_value_layers"]})
        exact, theirs = (
            references(torch, reference, args, model, tokens, split, policies, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        for policy, right, other in zip(policies, exact, theirs, strict=True):
            ours = logits(args, model, tokens, split, **policy)
            (kl, flips), (hf_kl, hf_flips) = divergence(ours, right), divergence(other, right)
            case = {
                "model": model.name,
                "policy": " ".join(map(str, flags(**policy)[1:])),
                "rows": len(right),
                "kl": kl,
                "hf_bf16_kl": hf_kl,
                "other_token": flips,
                "hf_bf16_other_token": hf_flips,
            }
            report["cases"].append(case)
            if not (kl <= hf_kl and flips <= hf_flips + 2 * (hf_flips + 1) ** 0.5):
                bad.append(
                    f"{case['model']} {case['policy']}: KL {kl:.2e} against {hf_kl:.2e}, other token "
                    f"{flips} against {hf_flips} of {len(right)}"
                )
    if bad:
        raise Failed("further from Hugging Face in fp32 than its bf16 is: " + "; ".join(bad))


def references(torch, reference, args, model, tokens, split, policies, dtype):
    """Hugging Face's logits of every policy on the device, in fp32 or bf16."""
    with torch.device(args.device):
        net, swiftkv, config = reference.load(model)
        rotary = net.model.rotary_emb
        frequencies = rotary.inv_freq.clone()
        net = net.to(args.device, dtype)
        rotary.inv_freq = frequencies.to(args.device)  # transformers keeps them in fp32 in a bf16 model too
        loaded = reference.Loaded(net, {name: x.to(args.device, dtype) for name, x in swiftkv.items()}, config)
        return [reference.logits(loaded, tokens, split, **p) for p in policies]


def sanitizer(report, args, work):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        raise Skip("compute-sanitizer is not installed (NVIDIA's package cuda-sanitizer)")
    flags = ["--device", args.device, "-p", QUESTION, "-n", 8]
    targets = {
        "kernels": [TESTS, "[gpu]~[model]"],
        "small": [SPEED, "generate", "-m", SMALL, *flags, "--k", 5],
        "head128": [SPEED, "generate", "-m", work["head128"], *flags, "--k", 2],
    }
    report["tools"], bad = {}, []
    for name in TOOLS:
        for target, command in targets.items():
            left = seconds_left(args)
            if left < 5:
                report["tools"][f"{name} {target}"] = f"skipped: the {args.minutes:g} minutes are over"
                continue
            try:
                watch = [tool, "--tool", name, "--kernel-regex", "kns=5speed", "--error-exitcode", 99]
                out, code = run(*watch, *command, timeout=min(90, left))
            except Failed as error:
                report["tools"][f"{name} {target}"] = f"skipped: {error}"
                continue
            summary = [line for line in out.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
            if not summary:  # the tool did not start the program
                last = out.strip().splitlines()[-1:] or ["no output"]
                report["tools"][f"{name} {target}"] = (
                    f"skipped: the tool refuses this machine: {last[0].strip()[-160:]}"
                )
            elif code:
                report["tools"][f"{name} {target}"] = f"FAILED (exit {code}): {summary[-1].strip('= ')}"
                bad.append(f"{name} {target}: {summary[-1].strip('= ')}")
            else:
                report["tools"][f"{name} {target}"] = summary[-1].strip("= ")
    if bad:
        raise Failed("; ".join(bad))
    if all(text.startswith("skipped") for text in report["tools"].values()):
        raise Skip("; ".join(sorted(set(report["tools"].values()))))


# ---- report ----------------------------------------------------------------------------------------------------------


def machine(device):
    def text(*command):
        try:
            out, code = run(*command, timeout=30)
            return out.strip() if code == 0 else ""
        except (OSError, Failed):
            return ""

    query = text("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader")
    if device == "cuda" and not query:
        raise SystemExit("gpu-check: nvidia-smi finds no GPU; this check needs one")
    nvcc = text("nvcc", "--version") or text("/usr/local/cuda/bin/nvcc", "--version")
    return {
        "commit": text("git", "describe", "--always", "--dirty"),
        "gpu": query.splitlines()[0] if query else "none",
        "toolkit": nvcc.splitlines()[-1] if nvcc else "unknown",
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def markdown(record):
    lines = [
        "# Checked on a GPU",
        "",
        f"{record['gpu']}; toolkit {record['toolkit']}; commit {record['commit']}; "
        f"{record['time']}; seed {record['seed']}. `make gpu-check` writes this file; "
        "[check.json](check.json) is its record.",
        "",
        "| step | result | seconds |",
        "|---|---|---|",
    ]
    for name, step in record["steps"].items():
        lines.append(f"| {name} | {step['result']} | {step['seconds']:.0f} |")
    cases = record["steps"].get("hf", {}).get("cases", [])
    if cases:
        lines += [
            "",
            "Distance from Hugging Face in fp32 on the same GPU: mean KL divergence in nats, and rows whose "
            "most likely token differs.",
            "",
            "| model | policy | rows | KL | KL, HF bf16 | other token | HF bf16 |",
            "|---|---|---|---|---|---|---|",
        ]
        for c in cases:
            if "skipped" in c:
                lines.append(f"| {c['model']} | skipped: {c['skipped']} | | | | | |")
            else:
                lines.append(
                    f"| {c['model']} | {c['policy']} | {c['rows']} | {c['kl']:.1e} | {c['hf_bf16_kl']:.1e} | "
                    f"{c['other_token']} | {c['hf_bf16_other_token']} |"
                )
    tools = record["steps"].get("sanitizer", {}).get("tools", {})
    if tools:
        lines += ["", "| compute-sanitizer | |", "|---|---|", *(f"| {name} | {text} |" for name, text in tools.items())]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="for all steps together")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu")
    parser.add_argument("--only", default=",".join(STEPS), help="steps, as kernels,hf")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000, help="of the random inputs")
    args = parser.parse_args()
    args.began = time.time()
    wanted = args.only.split(",")
    unknown = [name for name in wanted if name not in STEPS]
    if unknown:
        parser.error(f"no step {unknown[0]}; there are {', '.join(STEPS)}")
    record = {**machine(args.device), "seed": args.seed, "steps": {}}
    with tempfile.TemporaryDirectory() as scratch:
        import random_models

        def made(name, spec):
            checkpoint = random_models.write_checkpoint(Path(scratch) / name, spec, args.seed, "BF16")
            return random_models.export(checkpoint, Path(scratch) / f"{name}.safetensors")

        work = {
            "head128": made("head128", HEAD128),
            "swiftkv": made("swiftkv", SWIFTKV),
            "llama": lambda: made("llama-3.1-8b-layers", LLAMA),
        }
        for name in STEPS:
            if name not in wanted:
                continue
            report, start = {}, time.time()
            try:
                if seconds_left(args) < STEPS[name]:
                    raise Skip(f"{max(0, seconds_left(args)):.0f} s are left, it needs {STEPS[name]}")
                globals()[name](report, args, work)
                report["result"] = "passed"
            except Skip as why:
                report["result"] = f"skipped: {why}"
            except Failed as why:
                report["result"] = f"FAILED: {why}"
            except Exception as error:  # the other steps still run
                traceback.print_exc()
                report["result"] = f"FAILED: {type(error).__name__}: {error}"
            report["seconds"] = round(time.time() - start, 1)
            record["steps"][name] = report
            print(f"gpu-check: {name}: {report['result']} ({report['seconds']:.0f} s)", flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "check.json").write_text(json.dumps(record, indent=1) + "\n")
            (args.out / "check.md").write_text(markdown(record))
    print(f"gpu-check: report in {args.out}/check.md")
    return any(step["result"].startswith("FAILED") for step in record["steps"].values())


if __name__ == "__main__":
    sys.exit(main())
