"""Reads the one file that the engine's exporter writes: weights under Hugging Face's names, config and tokenizer."""

import json
from collections.abc import Iterable
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
    rules = about["tokenizer"]
    special, added = dict(rules["special"]), dict(rules.get("added", []))
    token = ["".join(letter[b] for b in data[a:z]) for a, z in zip(offsets[:-1], offsets[1:], strict=True)]
    for i in rules.get("unmatched", []):  # spelled in plain letters, not in those of bytes
        token[i] = data[offsets[i] : offsets[i + 1]].decode()
    vocab = {text: i for i, text in enumerate(token) if text and i not in special and i not in added}
    vocab.update({text: i for i, text in [*special.items(), *added.items()]})
    pairs = [(token[a], token[b]) for a, b, _ in merges]
    bpe = Tokenizer(models.BPE(vocab, pairs, ignore_merges=rules["ignore_merges"]))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules["split"]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(text, normalized=False) for _, text in sorted(special.items())])
    bpe.add_tokens([AddedToken(text, normalized=False) for _, text in sorted(added.items())])
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
        tokenizer.chat_template = chat_template(chat, special.values())
    return tokenizer


def chat_template(chat: dict[str, Any], special: Iterable[str]) -> str:
    """The jinja template that writes a conversation with the given turn marks (tokenizer.h says what they hold). Dates:
    the marks' default."""
    if isinstance(chat["trim"], bool):  # files exported before: marks by role
        chat = _by_place(chat)

    def text(mark: str) -> str:
        return "{{ " + json.dumps(mark.replace("{date}", chat["date_default"] or ""), ensure_ascii=False) + " }}"

    def content(name: str, place: str) -> str:
        return name + {"none": "", "left": ".lstrip()", "right": ".rstrip()", "both": ".strip()"}[chat["trim"][place]]

    if chat["system"] is None:
        begin = "{{ raise_exception('this template takes no system text') }}"
    else:
        begin = (
            f"{text(chat['system'][0])}{{{{ {content('messages[0].content', 'system')} }}}}{text(chat['system'][1])}"
        )
        if chat["system_empty"] is not None:
            begin = (
                f"{{% if {content('messages[0].content', 'system')} %}}{begin}"
                f"{{% else %}}{text(chat['system_empty'])}{{% endif %}}"
            )
    last, past = chat["generation"], chat["past"]
    # The marks do not say where an answer's end becomes the next user's header: a last answer ends with its stop token.
    ends = [past[1].index(token) + len(token) for token in special if token in past[1]]
    close = past[1][: min(ends, default=len(past[1]))]
    return (
        "{% set given = messages[0].role == 'system' %}"
        f"{{% if given %}}{begin}{{% set turns = messages[1:] %}}"
        f"{{% else %}}{text(chat['open'])}{{% set turns = messages %}}{{% endif %}}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        f"{{% if given and loop.first %}}{{{{ {content('m.content', 'after_system')} }}}}"
        f"{{% else %}}{{{{ {content('m.content', 'user')} }}}}{{% endif %}}"
        f"{{% if not loop.last %}}{text(past[0])}{{% else %}}{text(last[0])}{{% endif %}}"
        f"{{% else %}}{{{{ {content('m.content', 'assistant')} }}}}"
        f"{{% if not loop.last %}}{text(past[1])}{{% else %}}{text(close)}{{% endif %}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{text(last[1])}{{% endif %}}"
    )


def _by_place(chat: dict[str, Any]) -> dict[str, Any]:
    """Marks by role, as older files have them, as marks by place."""
    side, (user, end), (answer, close) = "both" if chat["trim"] else "none", chat["user"], chat["assistant"]
    before, after = chat["system"]
    default = "" if chat["system_default"] is None else before + chat["system_default"] + after
    return {
        "trim": dict.fromkeys(("system", "after_system", "user", "assistant"), side),
        "open": chat["begin"] + default + user,
        "system": [chat["begin"] + before, after + user],
        "system_empty": None,
        "generation": [end, answer],
        "past": [end + answer, close + user],
        "date_default": chat["date_default"],
    }
