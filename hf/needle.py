"""RULER's needle by K: a passage of 1K to 8K tokens, a number hidden in it, asked for. Table and plot in docs/hf.

    hf/run.sh python hf/needle.py [--samples 1024:16,2048:12,4096:8,8192:4] [--plot-only]

The prompts and the score are lm-evaluation-harness's task niah_single_1, as `python -m speed_llama.evaluation` runs
it with --apply_chat_template. But a prompt is prefilled once for all K: below K the caches are those of full depth
(the tests hold that to the bit), so each K starts from the lowest K layers of one full cache and runs only the
prompt's tail, from the assistant header on. Results come a line a prompt into docs/hf/needle.jsonl; a run that was
stopped goes on.
"""

import argparse
import json
import os
import random
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from speed_llama import PolicyCache, SpeedLlamaForCausalLM, read_tokenizer

OUT = Path(__file__).resolve().parents[1] / "docs" / "hf"
CACHE = Path(os.environ.get("SPEED_CACHE") or Path.home() / ".cache" / "speed")
SMOLLM2 = Path(os.environ.get("SPEED_MODEL", CACHE / "smollm2-135m-instruct.safetensors"))
VARIANTS = [(k, True) for k in (30, 28, 26, 24, 23, 22, 21, 20)] + [(24, False)]
NEW_TOKENS = 10  # the answer is asked for by "... is" and has seven digits, a token each; RULER allows 128


def prompts(tokenizer, length: int, count: int) -> list[dict]:
    """`count` documents of niah_single_1 at this length, by its own generator (which draws from `random`)."""
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    random.seed(1234 + length)
    return generate_samples(get_haystack(type_haystack="repeat"), max_seq_length=length, template=TEMPLATE,
                            type_haystack="repeat", type_needle_k="words", type_needle_v="numbers", num_samples=count,
                            TOKENIZER=tokenizer)  # fmt: skip


@torch.no_grad()
def answers(model, tokenizer, document: dict) -> tuple[int, dict[str, bool]]:
    """(tokens of the prompt, found or not by variant)."""
    chat = [{"role": "user", "content": document["input"]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + document["gen_prefix"]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    marker = model.config.decode_marker
    split = max(i for i in range(ids.shape[1]) if ids[0, i : i + len(marker)].tolist() == marker)
    model.set_policy(policy="full")
    full = PolicyCache()
    model.model(ids[:, :split], past_key_values=full, use_cache=True)
    found = {}
    for k, anchor in VARIANTS:
        layers = len(full.layers)
        if k == layers:
            model.set_policy(policy="full")
        else:
            model.set_policy(policy="speed", num_key_value_layers=k, anchor=anchor)
        lower = [(layer.keys, layer.values) for layer in full.layers[:k]]
        cache = PolicyCache.from_layers(lower, torch.tensor([split]))
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        out = model.generate(ids, past_key_values=cache, decode_start=[split], **settings)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        found[f"{k}" + ("" if anchor else " no anchor")] = all(x in answer for x in document["outputs"])
    return ids.shape[1], found


def wilson(found: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson)."""
    z, p = 1.96, found / count
    middle, half = p + z * z / (2 * count), z * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    return 100 * (middle - half) / (1 + z * z / count), 100 * (middle + half) / (1 + z * z / count)


def plot(lines: list[dict]) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "needle", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    lengths = sorted({line["length"] for line in lines})
    names = [f"{k}" + ("" if anchor else " no anchor") for k, anchor in VARIANTS]
    rows = ["| K | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    counts = {length: [line["found"] for line in lines if line["length"] == length] for length in lengths}
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for name in names:
        cells = []
        for length in lengths:
            n, hits = len(counts[length]), sum(found[name] for found in counts[length])
            low, high = wilson(hits, n)
            cells.append(f"{hits} of {n} ({low:.0f}–{high:.0f} %)")
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    ks = [k for k, anchor in VARIANTS if anchor]
    for i, length in enumerate(lengths):
        n = len(counts[length])
        hits = [sum(found[str(k)] for found in counts[length]) for k in ks]
        share = [100 * x / n for x in hits]
        bounds = [wilson(x, n) for x in hits]
        errors = [[max(0, s - b[0]) for s, b in zip(share, bounds, strict=True)],
                  [max(0, b[1] - s) for s, b in zip(share, bounds, strict=True)]]  # fmt: skip
        shifted = [k + 0.12 * (i - 1.5) for k in ks]
        axes.errorbar(
            shifted, share, errors, marker="o", markersize=3, capsize=2, linewidth=1, label=f"{length:,} tokens"
        )
    axes.set_xlabel("K, layers a prompt token visits (30: all)")
    axes.set_ylabel("needle found, %")
    axes.set_ylim(-3, 103)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(OUT / "needle.svg", metadata={"Date": None})
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="1024:16,2048:12,4096:8,8192:4", help="LENGTH:COUNT, ...")
    parser.add_argument("--plot-only", action="store_true")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    log = OUT / "needle.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not options.plot_only:
        tokenizer = read_tokenizer(SMOLLM2)
        model = SpeedLlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
        model.config.use_chat_template_of(tokenizer)
        wanted = {int(a): int(b) for a, b in (pair.split(":") for pair in options.samples.split(","))}
        documents = {length: prompts(tokenizer, length, count) for length, count in wanted.items()}
        done = {(line["length"], line["index"]) for line in lines}
        # by the share of each length done, so that a run that is stopped has done alike of each
        order = sorted(((i + 1) / count, length, i) for length, count in wanted.items() for i in range(count))
        for _, length, i in order:
            if (length, i) in done:
                continue
            start = time.process_time()
            tokens, found = answers(model, tokenizer, documents[length][i])
            line = {"length": length, "index": i, "tokens": tokens, "found": found,
                    "cpu_s": round(time.process_time() - start, 1)}  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            lines.append(line)
            print(json.dumps(line), flush=True)
    plot(lines)


if __name__ == "__main__":
    main()
