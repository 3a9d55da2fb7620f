"""Merges a LoRA adapter, a folder as PEFT writes it, into the weights of its base model."""

import math
import re

import numpy as np

from .failure import Failure, unsupported
from .files import Safetensors, Weight, read_json

# What an adapter's config may hold beside the keys that are read here. They say how it was trained, or for what.
HARMLESS = set(
    """alora_invocation_tokens arrow_config auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying
    eva_config inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout
    alpha_pattern megatron_core peft_type peft_version qalora_group_size r rank_pattern revision runtime_config
    speed_adapted target_modules task_type trainable_token_indices use_rslora use_qalora""".split()
)
PROJECTION = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def check_adapter_config(config, path):
    """Refuses by name what is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise unsupported(f"the adapter type {config.get('peft_type')!r}", path)
    for key, feature in (
        ("use_dora", "DoRA"),
        ("use_qalora", "QALoRA"),
        ("use_bdlora", "block-diagonal LoRA"),
        ("modules_to_save", "whole modules beside LoRA (modules_to_save)"),
        ("trainable_token_indices", "trained tokens (trainable_token_indices)"),
        ("fan_in_fan_out", "fan_in_fan_out"),
        ("lora_bias", "lora_bias"),
        ("layer_replication", "layer_replication"),
        ("megatron_config", "megatron_config"),
        ("target_parameters", "target_parameters"),
        ("alora_invocation_tokens", "aLoRA"),
    ):
        if config.get(key):
            raise unsupported(feature, path)
    if config.get("bias", "none") != "none":
        raise unsupported(f"trained biases (bias {config['bias']!r})", path)
    known = HARMLESS | {"exclude_modules", "modules_to_save", "use_dora", "fan_in_fan_out", "lora_bias"}
    for key, value in config.items():
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise unsupported(f"{key} ({str(value)[:100]}) in its config", path)


def of_pattern(patterns, name, default):
    """The value of the first key of `patterns` that fits the module's name, as PEFT chooses it."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})$", name):
            return value
    return default


def scale_of(config, name, rank, path):
    """alpha / r, with rank-stabilised LoRA alpha / sqrt(r)."""
    expected = of_pattern(config.get("rank_pattern"), name, config.get("r"))
    if expected != rank:
        raise Failure(f"{path}: {name} has rank {rank}, its config says {expected!r}; get the adapter again")
    alpha = of_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise Failure(f"{path}: lora_alpha is {alpha!r}, expected a number; get the adapter again")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_float(stored):
    return stored.dtype in ("F32", "F16", "BF16")


def widened(x):
    """float32 of a stored array; uint16 holds bf16."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def merge_adapter(folder, tensors):
    """(the tensors with the adapter's change added, its config, how many tensors it changes). W becomes W + scale B A,
    computed in float32."""
    config = read_json(folder / "adapter_config.json")
    check_adapter_config(config, folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise Failure(f"{path}: no such file; save the adapter with PEFT's save_pretrained", 2)
    file, parts = Safetensors(path), {}
    out = dict(tensors)
    for name in file.tensors:
        # PEFT stores a layer at the vocabulary's end whole beside its LoRA weights.
        base = re.fullmatch(r"base_model\.model\.((?:model\.embed_tokens|lm_head)\.)base_layer\.weight", name)
        if base and base[1] + "weight" in tensors and is_float(file.tensors[name]):
            out[base[1] + "weight"] = Weight(file.tensors[name].shape, file.rows(name))
            continue
        found = re.fullmatch(
            rf"base_model\.model\.(model\.layers\.\d+\.{PROJECTION}|lm_head)\.lora_([AB])\.(default\.)?weight", name
        )
        if not found or not is_float(file.tensors[name]):
            raise unsupported(f"the tensor {name}", path)
        parts.setdefault(found[1], {})[found[4]] = file.array(name)
    for name, pair in parts.items():
        weight = out.get(name + ".weight")
        if weight is None:
            raise Failure(f"{path}: {name} is no weight of this base model; give the base that it was trained on")
        if set(pair) != {"A", "B"}:
            raise Failure(f"{path}: {name} has lora_A or lora_B alone; get the adapter again")
        a, b = widened(pair["A"]), widened(pair["B"])
        shapes = f"lora_B {list(b.shape)} by lora_A {list(a.shape)}"
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != weight.shape:
            raise Failure(f"{path}: {name}: {shapes} does not fit {list(weight.shape)}; give its own base")
        scale = np.float32(scale_of(config, name, a.shape[0], path))

        def rows(first, last, weight=weight, a=a, b=b, scale=scale):
            return widened(weight.rows(first, last)) + scale * (b[first:last] @ a)

        out[name + ".weight"] = Weight(weight.shape, rows)
    if not parts:
        raise Failure(f"{path}: holds no LoRA weights; get the adapter again")
    return out, config, len(parts)
