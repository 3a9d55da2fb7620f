"""SmolLM2 through transformers under a policy, beside `./speed` and beside stock transformers: one table.

    hf/run.sh python hf/compare.py [--quick]

distance: largest relative difference of a row of logits between this package and the engine, on 200 tokens of prose
with a tail of 8. text: whether both answer a question with the same 40 greedy tokens. Then the CPU time of one thread,
the least of a few, to prefill 512 and 4,096 tokens and for one more token, beside stock transformers in the same
process, in turn.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from speed_llama import PolicyCache, SpeedLlamaForCausalLM, read_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SPEED = os.environ.get("SPEED", str(ROOT / "speed"))
CACHE = Path(os.environ.get("SPEED_CACHE") or Path.home() / ".cache" / "speed")
SMOLLM2 = Path(os.environ.get("SPEED_MODEL", CACHE / "smollm2-135m-instruct.safetensors"))
POLICIES = {"full": {}, "speed:24": {"num_key_value_layers": 24}, "speed:15": {"num_key_value_layers": 15},
            "pop:20": {"num_key_value_layers": 20}}  # fmt: skip
QUESTION = "Explain in two sentences why the sky is blue."
PROSE = "The sea was calm, and nobody on the island had seen a ship for eleven days. Then a boy ran down the hill. " * 9
TOLERANCE = 2e-5  # see tests/conftest.py


def engine(*arguments) -> bytes:
    done = subprocess.run([SPEED, *map(str, arguments)], capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"compare.py: {SPEED}: {done.stderr.decode().strip()}")
    return done.stdout


def flags(name: str) -> list[str]:
    policy, _, k = name.partition(":")
    return ["--policy", policy, *(["--k", k] if k else [])]


def distance(model, tokenizer, name: str) -> float:
    tokens = [tokenizer.bos_token_id, *tokenizer(PROSE)["input_ids"][:199]]
    split = len(tokens) - (1 if name.startswith("pop") else 8)
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids", Path(folder) / "out.npy"
        ids.write_text(" ".join(map(str, tokens)))
        engine("logits", "-m", SMOLLM2, "--tokens-file", ids, "--split", split, "--out", out, *flags(name))
        expected = np.load(out).astype(np.float64)
    with torch.no_grad():
        got = model(torch.tensor([tokens]), decode_start=split).logits[0, split:].double().numpy()
    error = np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)
    return float(error.max()) if np.isfinite(error).all() else float("inf")


def same_text(model, tokenizer, name: str) -> bool:
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = engine("generate", "-m", SMOLLM2, "--chat", "-p", QUESTION, "-n", 40, *flags(name)).decode()
    return tokenizer.decode(out, skip_special_tokens=True).strip() == expected.strip()


@torch.no_grad()
def times(model, cache, ids, tail: int) -> tuple[float, float]:
    """CPU seconds to prefill ids, the last `tail` of them decode-phase, and for a token after them (mean of 8)."""
    mine = {"decode_start": ids.shape[1] - tail} if isinstance(cache, PolicyCache) else {}
    start = time.process_time()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **mine)
    prompt, start = time.process_time() - start, time.process_time()
    for _ in range(8):
        model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return prompt, (time.process_time() - start) / 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="times at 512 tokens only, once")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    tokenizer = read_tokenizer(SMOLLM2)
    model = SpeedLlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    model.config.use_chat_template_of(tokenizer)
    stock = LlamaForCausalLM(model.config).eval()
    stock.load_state_dict(model.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    lengths = (512,) if quick else (512, 4096)
    measured = {(name, n): [] for name in ("stock", *POLICIES) for n in lengths}
    for repetition in range(1 if quick else 3):
        for n in lengths[: 2 - repetition // 2]:  # the longer ones twice: they take most of the time
            ids = torch.randint(0, 40000, (1, n), generator=generator)
            measured["stock", n].append(times(stock, DynamicCache(), ids, 4))
            for name, k in POLICIES.items():
                model.set_policy(policy=name.partition(":")[0], **k)
                measured[name, n].append(times(model, PolicyCache(), ids, 1 if name.startswith("pop") else 4))
    heads = [f"{n:,} tokens" for n in lengths]
    print(f"SmolLM2-135M-Instruct, fp32, one thread, torch {torch.__version__}; CPU time, in brackets beside stock's")
    print("| policy | distance | text | " + " | ".join(f"{h}, s | next token, ms" for h in heads) + " |")
    print("|---" * (3 + 2 * len(heads)) + "|")
    good = True
    for name in ("stock", *POLICIES):
        cells = ["", ""]
        if name != "stock":
            model.set_policy(policy=name.partition(":")[0], **POLICIES[name])
            error, same = distance(model, tokenizer, name), same_text(model, tokenizer, name)
            good &= same and error <= TOLERANCE
            cells = [f"{error:.1e}", "same" if same else "DIFFERS"]
        for n in lengths:
            for i, unit in ((0, 1), (1, 1000)):
                mine, theirs = (min(x[i] for x in measured[who, n]) for who in (name, "stock"))
                cells.append(f"{unit * mine:.{2 - i - i}f} ({mine / theirs:.2f})")
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
