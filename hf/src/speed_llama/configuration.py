"""LlamaConfig with a policy. It opens any Llama's config.json, and SwiftKV's published ones."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedTokenizerBase

from .policy import Schedule, make_schedule

# What the policy adds to config.json stands under a key of its own, which other readers of Llama checkpoints pass over.
KEY = "speed_policy"
FIELDS = ("policy", "num_key_value_layers", "anchor", "kept_layers", "keep_answers", "decode_marker")


def complete(fields: dict[str, Any], swiftkv_layers: int | None) -> dict[str, Any]:
    """The fields of a policy with the K that it implies: none under full and share, under swiftkv that of the model's
    weights. ValueError for one that does not exist."""
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]} is no field of the policy; there are {', '.join(FIELDS)}")
    k = {"full": None, "share": None, "swiftkv": swiftkv_layers}
    if fields.get("policy") in k and fields.get("num_key_value_layers") is None:
        return {**fields, "num_key_value_layers": k[fields["policy"]]}
    return fields


@strict
class SpeedLlamaConfig(LlamaConfig):
    """A Llama's config and its policy.

    policy: full, speed, pop, swiftkv or share (policy.py says what each does).
    num_key_value_layers: K; a prompt token visits layers 0..K-1. None under full and share, which have no K.
    anchor: under speed, upper layers see position 0, the BoS.
    kept_layers: under share, the layers that keep a cache of their own, ascending, 0 among them.
    keep_answers: under speed with one cache for several turns, earlier answers keep their slots in upper layers.
    decode_marker: token ids that open an answer; the tail of a prompt from the last of them on is decode-phase.
    swiftkv_layers, key_value_group_size, swiftkv_only: the K and the group size that the model's SwiftKV projections
    were trained for (None: it has none), and whether it lacks the ordinary ones above K.
    has_rope_divisors: the file divided the RoPE frequencies, for which config.json has no place.
    """

    model_type = "speed_llama"
    base_model_tp_plan = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.q_proj_swiftkv": "colwise",
        "layers.*.self_attn.k_proj_swiftkv": "colwise",
        "layers.*.self_attn.v_proj_swiftkv": "colwise",
    }

    policy: str = "full"
    num_key_value_layers: int | None = None
    key_value_group_size: int = 1
    anchor: bool = True
    kept_layers: list[int] | None = None
    keep_answers: bool = False
    decode_marker: list[int] | None = None
    swiftkv_layers: int | None = None
    swiftkv_only: bool = False
    has_rope_divisors: bool = False

    def schedule(self) -> Schedule:
        """What each layer does under the present policy; ValueError if the fields do not fit together."""
        return make_schedule(
            self.policy,
            self.num_hidden_layers,
            self.num_key_value_layers,
            self.kept_layers,
            self.swiftkv_layers,
            self.key_value_group_size,
            not self.swiftkv_only,
        )

    def describe(self) -> str:
        """The policy in a few words. Two that fill a cache differently differ."""
        what = f" kept layers {self.kept_layers}" if self.policy == "share" else f" K={self.num_key_value_layers}"
        return self.policy + what * (self.policy != "full") + " without anchor" * (not self.anchor)

    def split_matters(self) -> bool:
        """Whether the logits depend on where the prompt ends. If not, a split only saves work."""
        return self.policy in ("speed", "pop") and self.num_key_value_layers not in (None, self.num_hidden_layers)

    def use_chat_template_of(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets decode_marker to the assistant header of the tokenizer's chat template: each row of a batch of chats
        splits where its last header begins. ValueError if the template adds none."""
        chat = [{"role": "user", "content": "?"}]
        without = tokenizer.apply_chat_template(chat, tokenize=False)
        with_header = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        header = with_header[len(without) :]
        if not header or not with_header.startswith(without):
            raise ValueError("the chat template adds no assistant header; set decode_marker yourself")
        self.decode_marker = tokenizer.encode(header, add_special_tokens=False)

    @classmethod
    def get_config_dict(cls, *args, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Takes models of type llama and llama_swiftkv too; refuses others by name."""
        values, kwargs = super().get_config_dict(*args, **kwargs)
        kind = values.get("model_type", "llama")
        if kind not in ("llama", "llama_swiftkv", cls.model_type):
            raise ValueError(f"model type {kind!r}: speed_llama runs Llama models only")
        return {**values, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "SpeedLlamaConfig":
        """A saved policy is read; a published SwiftKV config, which names K and no policy, gets policy swiftkv. Keyword
        arguments override; a K that is None does not."""
        values = dict(config_dict)
        saved = values.pop(KEY, None)
        k = values.get("num_key_value_layers")
        if k is not None and k < values.get("num_hidden_layers", 32) and "swiftkv_layers" not in values:
            values["swiftkv_layers"] = k
            values.setdefault("policy", "swiftkv")
        if saved is not None:
            values.update(saved)
        given = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        if given.get("num_key_value_layers") is None:
            given.pop("num_key_value_layers", None)
        values.update(complete(given, values.get("swiftkv_layers")))
        return super().from_dict(values, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Writes config.json as a plain Llama's (or SwiftKV's), with the policy under a key of its own. What reads
        Llama checkpoints, the engine's exporter too, reads the folder; SpeedLlamaForCausalLM also finds the policy."""
        if self.has_rope_divisors:
            raise ValueError("this model came with RoPE frequency divisors, for which config.json has no place")
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        values = json.loads(path.read_text())
        for name in (*FIELDS, "key_value_group_size", "swiftkv_layers", "has_rope_divisors"):
            values.pop(name, None)
        values["model_type"], values["architectures"] = "llama", ["LlamaForCausalLM"]
        values[KEY] = {name: getattr(self, name) for name in FIELDS}
        if self.swiftkv_layers is not None:
            values["model_type"], values["architectures"] = "llama_swiftkv", ["LlamaSwiftKVForCausalLM"]
            values["num_key_value_layers"] = self.swiftkv_layers
            values["key_value_group_size"] = self.key_value_group_size
        path.write_text(json.dumps(values, indent=2) + "\n")
