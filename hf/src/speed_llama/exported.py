"""Reads the one file that the engine's exporter writes: weights under Hugging Face's names, config and tokenizer."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SAME_NAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
             "bos_token_id", "eos_token_id")  # fmt: skip


def _metadata(path: Path, file) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if metadata.get("format") != "speed 1":
        raise ValueError(f"{path}: not a file of the engine's exporter (format 'speed 1')")
    return {key: json.loads(metadata[key]) for key in ("config", "tokenizer", "chat")}


def read_exported(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """(what SpeedLlamaConfig.from_dict takes, weights in bf16 by name, divisors of the RoPE frequencies or None)."""
    with safe_open(path, "pt") as file:
        config = _metadata(path, file)["config"]
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("tokenizer.")}  # noqa: SIM118
    divisors = tensors.pop("rope.freq_divisors", None)
    rope = {"rope_type": "llama3", **config["rope_scaling"]} if config["rope_scaling"] else {"rope_type": "default"}
    values = {name: config[name] for name in SAME_NAME}
    values.update(
        rope_parameters={"rope_theta": config["rope_theta"], **rope}, model_type="speed_llama", dtype="bfloat16"
    )
    if swiftkv := config["swiftkv"]:
        values.update(
            num_key_value_layers=swiftkv["num_key_value_layers"],
            key_value_group_size=swiftkv["key_value_group_size"],
            swiftkv_only=not swiftkv["original_projections"],
        )
    elif adapted := [each for each in config.get("adapted") or [] if each["policy"] != "swiftkv"]:
        values["speed_adapted"] = adapted
    return values, tensors, divisors


def lacks_ordinary(folder: Path, layer: int) -> bool:
    """Whether a SwiftKV folder's weights leave out the ordinary projections of an upper layer. No config says so."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return bool(names) and f"model.layers.{layer}.self_attn.q_proj.weight" not in names


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The exported file's tokenizer with its chat template. Like Hugging Face's own of SmolLM2 it puts no BoS in
    front."""
    with safe_open(path, "np") as file:
        about = _metadata(Path(path), file)
        offsets, merges = file.get_tensor("tokenizer.offsets"), file.get_tensor("tokenizer.merges")
        data = file.get_tensor("tokenizer.bytes").tobytes()
    # Byte-level BPE writes each byte as one printable letter; ByteLevel.alphabet names them in no order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {b: chr(b) for b in plain}
    letter.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)})
    special = dict(about["tokenizer"]["special"])
    token = ["".join(letter[b] for b in data[a:z]) for a, z in zip(offsets[:-1], offsets[1:], strict=True)]
    vocab = {text: i for i, text in enumerate(token) if text and i not in special}
    vocab.update({text: i for i, text in special.items()})
    pairs = [(token[a], token[b]) for a, b, _ in merges]
    bpe = Tokenizer(models.BPE(vocab, pairs, ignore_merges=about["tokenizer"]["ignore_merges"]))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in about["tokenizer"]["split"]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, normalized=False) for _, text in sorted(special.items())])
    config, chat = about["config"], about["chat"]
    named = {"bos_token": config["bos_token_id"], "eos_token": (config["eos_token_id"] or [None])[0]}
    named["pad_token"] = named["eos_token"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        model_max_length=config.get("max_position_embeddings", 2048),
        **{name: special.get(i, token[i]) for name, i in named.items() if i is not None},
    )
    if chat:
        tokenizer.chat_template = chat_template(chat)
    return tokenizer


def chat_template(chat: dict[str, Any]) -> str:
    """The jinja template that writes a conversation with the given turn marks. Dates: the marks' default."""

    def text(x: str) -> str:
        x = json.dumps(x.replace("{date}", chat["date_default"] or ""), ensure_ascii=False)
        return "{{ " + x + " }}"

    content = "m.content | trim" if chat["trim"] else "m.content"
    turns = "".join(
        f"{'{% if' if i == 0 else '{% elif'} m.role == '{role}' %}}{text(chat[role][0])}{{{{ {content} }}}}"
        f"{text(chat[role][1])}"
        for i, role in enumerate(("system", "user", "assistant"))
    )
    default = ""
    if chat["system_default"] is not None:
        before, after = chat["system"]
        default = (
            "{% if messages[0].role != 'system' %}" + text(before + chat["system_default"] + after) + "{% endif %}"
        )
    return (
        text(chat["begin"]) + default + "{% for m in messages %}" + turns + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + text(chat["assistant"][0]) + "{% endif %}"
    )
