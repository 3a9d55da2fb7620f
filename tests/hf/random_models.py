"""Small random Llama checkpoints as Hugging Face folders, made from a seed with numpy alone.

The weights are scaled so that every part matters. Attention scores have a standard deviation of 1 to 2, and every layer
changes the residual stream by about its own size. So a fault in any part shows in the logits. All values are exact in
bf16, so that the exported file and the folder hold the same numbers.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from places import ROOT

sys.path.insert(0, str(ROOT))
import export_weights
from checkpoint.config import check_config, expected_tensors
from checkpoint.tokenizer import LLAMA3_SPLIT, byte_letters

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content.strip() }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MERGES = ["t h", "th e", "i n", "a n", "Ġ a", "Ġ the", "e r", "o n", "Ġ s", "an d", "Ġ b", "o r", "Ġ and"]
BOS = 256 + len(MERGES)  # id of SPECIAL[0]
FIRST_UNUSED = BOS + len(SPECIAL)

# name -> spec: the config keys that differ from `base_config`. Together the specs cover 1, 2 and 3 query heads for each
# KV head, head sizes from 8 to 64, tied and untied output heads, odd sizes of vocabulary and MLP, llama3 scaling beyond
# its original length, and SwiftKV's groups.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SPECS = {
    "scaled": dict(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=75,
        vocab_size=277,
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
    ),
    "tied": dict(
        hidden_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=101,
        vocab_size=301,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "wide": dict(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=129,
        vocab_size=283,
        rope_theta=100000.0,
        rms_norm_eps=1e-6,
    ),
    "single": dict(
        hidden_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=63,
        vocab_size=279,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        rope_scaling={**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 64},
    ),
}
for _group, _layers, _k in ((1, 4, 2), (2, 6, 1), (4, 8, 2)):
    SPECS[f"swiftkv{_group}"] = dict(
        hidden_size=48,
        num_hidden_layers=_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=75,
        vocab_size=277,
        rope_theta=500000.0,
        num_key_value_layers=_k,
        key_value_group_size=_group,
    )
    SPECS[f"swiftkv{_group}-bare"] = dict(SPECS[f"swiftkv{_group}"], original_projections=False)


# The models of tests/golden are even smaller.
GOLDEN = {
    "scaled": dict(
        hidden_size=30,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=45,
        vocab_size=277,
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
    ),
    "tied": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=37,
        vocab_size=275,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    ),
    "swiftkv": dict(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=41,
        vocab_size=275,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        num_key_value_layers=2,
        key_value_group_size=2,
    ),
}


def base_config(spec):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": [BOS + 1, BOS + 4],
        **{k: v for k, v in spec.items() if k != "original_projections"},
    }


def to_bf16(x):
    """float32 rounded to values that bf16 holds exactly."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def random_tensors(config, seed, original_projections=True):
    """name -> float32 array, exact in bf16, for every weight of the config."""
    rng = np.random.default_rng(seed)
    exported = check_config(config, {}, "random")
    shapes, originals = expected_tensors(exported)
    gain = {"q_proj": 1.25, "k_proj": 1.25, "o_proj": 1.5, "gate_proj": 1.5, "down_proj": 1.5}
    tensors = {}
    for name, shape in shapes.items():
        if name in originals and not original_projections:
            continue
        kind = name.split(".")[-2].removesuffix("_swiftkv")
        if "norm" in kind:
            x = 1 + 0.2 * rng.standard_normal(shape)
        elif kind == "embed_tokens":
            x = rng.standard_normal(shape)
        else:
            x = rng.standard_normal(shape) * gain.get(kind, 1.0) / math.sqrt(shape[1])
        tensors[name] = to_bf16(x)
    return tensors


def write_safetensors(path, tensors, dtype="F32"):
    """Writes float32 arrays (exact in bf16) as F32, F16 or BF16."""

    def stored(x):
        if dtype == "BF16":
            return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)
        return x.astype({"F32": np.float32, "F16": np.float16}[dtype])

    header, blobs, position = {}, [], 0
    for name, x in tensors.items():
        blob = stored(x).tobytes()
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [position, position + len(blob)]}
        blobs.append(blob)
        position += len(blob)
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def tokenizer_json():
    """A byte-level BPE tokenizer with Llama-3's split pattern and special tokens."""
    letters = sorted(byte_letters().items(), key=lambda item: item[1])
    vocab = {letter: i for i, (letter, _) in enumerate(letters)}
    for merge in MERGES:
        vocab[merge.replace(" ", "")] = len(vocab)
    added = [
        {
            "id": BOS + i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, text in enumerate(SPECIAL)
    ]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": MERGES,
        },
    }


def write_checkpoint(folder, spec, seed=0, dtype="F32"):
    """Writes the Hugging Face folder of a spec and returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = base_config(spec)
    tensors = random_tensors(config, seed, spec.get("original_projections", True))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": LLAMA3_TEMPLATE})
    )
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    return folder


def export(folder, out):
    """Runs the exporter in this process. Raises an exception if it fails."""
    export_weights.export(Path(folder), Path(out), False, force=True)
    return Path(out)
