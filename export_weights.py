#!/usr/bin/env python3
"""export_weights.py CHECKPOINT OUT.safetensors: turn a Llama-architecture checkpoint into the one file `speed` reads.

CHECKPOINT is a Hugging Face folder (config.json, tokenizer.json, *.safetensors in F32, F16 or BF16) or a .gguf file.
OUT holds everything in one .safetensors container: weights in bf16 under Hugging Face's names, and in the header's
metadata the config, the tokenizer's rules and the chat template's turn marks, each as JSON.

A checkpoint that the engine would compute wrongly is refused by the name of the feature. Needs numpy, jinja2 for a chat
template, gguf for a GGUF file.
"""
import signal
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C just ends it, until there is something to tidy up

import argparse
import json
import math
import os
import re
import resource
import struct
import sys
import warnings
import weakref
import zlib
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("export_weights.py: numpy: not installed; pip install numpy")

FORMAT = "speed 1"
ALIGNMENT = 64        # of the first tensor, in bytes
CHUNK = 1 << 22       # elements converted at a time: memory stays small whatever the model's size
JSON_LIMIT = 64 << 20  # bytes of a JSON file or of a header: four times Llama 3's tokenizer.json, and what Python makes
                      # of as much hostile JSON, 2 GB, most machines can hold
TEMPLATE_LIMIT = 1 << 20  # bytes of a chat template, and of what it may render
TEMPLATE_SECONDS, TEMPLATE_MEMORY = 10, 1 << 30  # of processor time, in bytes: what rendering it may take
WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}

MOST_TOKENS = 1 << 24

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# Hugging Face's Digits goes by Rust's char::is_numeric, which knows 13 code points that \p{N} of its regex engine lacks.
DIGIT = r"[\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]"
# tokenizer.ggml.pre -> (split patterns, ignore_merges), as llama.cpp's llama-vocab.cpp has them
GGUF_SPLIT = {
    "gpt-2": ([GPT2_SPLIT], False),
    "smollm": ([DIGIT, GPT2_SPLIT], False),
    "llama-bpe": ([LLAMA3_SPLIT], True),
    "llama3": ([LLAMA3_SPLIT], True),
    "llama-v3": ([LLAMA3_SPLIT], True),
}


class Failure(Exception):
    """What went wrong, why, and what to do, in one line. `code`: 2 if another command line would mend it, else 1."""

    def __init__(self, message, code=1):
        super().__init__(one_line(message))
        self.code = code


def one_line(text):
    """Names and words out of files are a stranger's: on one line, not endless, and nothing a terminal obeys."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return text if len(text) <= 2000 else f"{text[:1000]}...{text[-1000:]}"


def unsupported(feature, what="this checkpoint"):
    return Failure(f"{what}: uses {feature}, which speed does not have; take a checkpoint without it")


# ---- JSON and safetensors, read without trust ------------------------------------------------------------------------

def parse_json(text, what):
    """The JSON object in `text`. Duplicate keys, NaN and Infinity are errors."""
    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def constant(name):
        raise ValueError(f"{name} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except RecursionError:
        raise Failure(f"{what}: JSON nested too deeply; get the file again") from None
    except ValueError as error:
        raise Failure(f"{what}: not valid JSON ({error}); get the file again") from None


def read_json(path, required=True):
    """The JSON object in the file; {} if it is absent and not required."""
    if path.is_file():
        return parse_json(read_limited(path, JSON_LIMIT), path)
    if required:
        raise Failure(f"{path}: no such file; give a folder as transformers' save_pretrained writes it", 2)
    return {}


def read_limited(path, limit):
    if path.stat().st_size > limit:
        raise Failure(f"{path}: larger than {limit >> 20} MB, which no checkpoint needs; get the file again")
    return path.read_bytes()


def damaged(path, why):
    return Failure(f"{path}: {why}; the file is damaged or incomplete, get it again")


class Reader:
    """A file, read by offsets and not mapped: one that is cut short meanwhile is an error here, not a signal."""

    def __init__(self, path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size

    def read(self, begin, end):
        """Bytes [begin, end), as uint8."""
        data = np.empty(end - begin, np.uint8)
        done = 0
        while done < data.size:
            got = os.preadv(self.descriptor, [memoryview(data)[done:]], begin + done)
            if got == 0:
                raise damaged(self.path, f"it ends at byte {begin + done} and did not before")
            done += got
        return data


class Safetensors(Reader):
    """A .safetensors file. `tensors`: name -> (dtype, shape, begin, end), offsets from the start of the file. Every
    size, offset, overlap and gap is checked before anything is used."""

    def __init__(self, path):
        def bad(why):
            return damaged(path, why)

        super().__init__(path)
        size = self.size
        if size < 8:
            raise bad(f"expected at least 8 bytes, got {size}")
        length = int.from_bytes(self.read(0, 8).tobytes(), "little")
        if length > min(size - 8, JSON_LIMIT):
            raise bad(f"the header says it has {length} bytes, the file has {size}")
        header = parse_json(self.read(8, 8 + length).tobytes(), f"{path}: header")
        self.metadata = header.pop("__metadata__", {})
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise bad("__metadata__ is not a map of strings")
        start = 8 + length
        self.tensors = {}
        for name, entry in header.items():
            if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
                raise bad(f"{name}: expected the keys dtype, shape, data_offsets")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not is_naturals(shape) or len(shape) > 8 or not is_naturals(offsets) or len(offsets) != 2:
                raise bad(f"{name}: bad shape {shape} or data_offsets {offsets}")
            if dtype not in list(WIDTH):
                raise unsupported(f"the dtype {dtype} in {name}", path)
            begin, end = offsets
            needed = math.prod(shape) * WIDTH[dtype]
            if end - begin != needed:
                raise bad(f"{name}: {dtype} {shape} needs {needed} bytes, got {end - begin}")
            self.tensors[name] = (dtype, tuple(shape), start + begin, start + end)
        position = start
        for name, (_, _, begin, end) in sorted(self.tensors.items(), key=lambda item: item[1][2:]):
            if begin != position:
                raise bad(f"{name}: {'gap' if begin > position else 'overlap'}: starts at {begin}, expected {position}")
            position = end
        if position != size:
            raise bad(f"the tensors end at byte {position}, the file has {size}")

    def array(self, name):
        """The tensor as stored; BF16 as uint16."""
        dtype, shape, begin, end = self.tensors[name]
        return self.read(begin, end).view(STORED[dtype]).reshape(shape)

    def rows(self, name):
        """rows(a, b) of the tensor as stored; BF16 as uint16."""
        dtype, shape, begin, _ = self.tensors[name]
        width = math.prod(shape[1:]) * WIDTH[dtype]

        def rows(a, b):
            b = min(b, shape[0])
            return self.read(begin + a * width, begin + b * width).view(STORED[dtype]).reshape(b - a, *shape[1:])

        return rows


def is_naturals(value):
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


# ---- bf16 ------------------------------------------------------------------------------------------------------------

class Rounding:
    """Rounds to bf16 (round to nearest, ties to even) and keeps account of what that changed."""

    def __init__(self):
        self.values = self.changed = 0
        self.error2 = self.norm2 = 0.0

    def __call__(self, x, name):
        """x: float32, float16, or uint16 holding bf16. Returns uint16 holding bf16. NaN, Inf, overflow: errors."""
        if x.dtype == np.uint16:
            if np.any((x & 0x7F80) == 0x7F80):
                raise Failure(f"{name}: holds NaN or Inf; the checkpoint is broken, get it again")
            self.values += x.size
            return x
        x = np.ascontiguousarray(x, np.float32)
        bits = x.view(np.uint32)
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        if not np.isfinite(x).all() or np.any((rounded & 0x7F80) == 0x7F80):
            raise Failure(f"{name}: holds NaN, Inf or a value beyond bf16; the checkpoint is broken, get it again")
        back = (rounded.astype(np.uint32) << 16).view(np.float32)
        self.values += x.size
        self.changed += int(np.count_nonzero(back != x))
        self.error2 += float(np.sum(np.square(back.astype(np.float64) - x)))
        self.norm2 += float(np.sum(np.square(x, dtype=np.float64)))
        return rounded

    def __str__(self):
        if not self.changed:
            return "bf16 already, nothing changed"
        share, relative = 100 * self.changed / self.values, math.sqrt(self.error2 / self.norm2)
        return f"rounding to bf16 changed {share:.1f} % of them, by {relative:.2e} of their norm"


# ---- config ----------------------------------------------------------------------------------------------------------

# The limits are the engine's (model.h): no file is written that it would refuse.

def number(config, key, default=None, low=1e-6, high=1e6):
    value = config.get(key, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise Failure(f"config: {key} is {value!r}, expected a number from {low:g} to {high:g}; repair the config")
    return value


def integer(config, key, default=None, high=1 << 30):
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not 1 <= value <= high:
        raise Failure(f"config: {key} is {value!r}, expected an integer from 1 to {high}; repair the config")
    return value


def token_ids(config, key, vocab_size, default=None):
    """A token id, a list of them, or null, as a list."""
    value = config.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise Failure(f"config: {key} holds {i!r}, expected ids below {vocab_size}; repair the config")
    return ids


def check_rope(config):
    """(theta, llama3 scaling or None) from either spelling: rope_theta beside rope_scaling, or rope_parameters."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise Failure(f"config: rope_scaling is {rope!r}, expected an object; repair the config")
    theta = number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0, 1, 1e12)
    if number({**config, **rope}, "partial_rotary_factor", 1) != 1 or config.get("rope_interleaved"):
        raise unsupported("partial or interleaved RoPE")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise unsupported(f"RoPE scaling of type {kind!r}")
    scaling = {key: number(rope, key, low=1 if key == "factor" else 1e-6)
               for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise Failure("config: rope scaling: low_freq_factor is not below high_freq_factor; repair the config")
    key = "original_max_position_embeddings"  # Hugging Face looks beside, then inside, then falls back to the context
    scaling[key] = integer({**rope, **{k: v for k, v in config.items() if k == key and v is not None}}, key,
                           config.get("max_position_embeddings", 2048))
    return theta, scaling


def check_adapted(config, layers):
    out = []
    for entry in config.get("speed_adapted", []):
        if not isinstance(entry, dict) or set(entry) - {"policy", "k", "bos"} or \
                entry.get("policy") not in ("full", "speed", "pop", "swiftkv", "share"):
            raise Failure(f"config: speed_adapted: {entry!r} is no policy with k and bos; repair the config")
        if entry.get("k") is not None and (type(entry["k"]) is not int or not 1 <= entry["k"] <= layers):
            raise Failure(f"config: speed_adapted: k is {entry['k']!r}, expected 1 to {layers}; repair the config")
        out.append({"policy": entry["policy"], "k": entry.get("k"), "bos": bool(entry.get("bos", True))})
    return out


def check_config(config, generation, name):
    """The exported config, every key present, from Hugging Face's config.json; missing keys take its defaults
    (transformers' LlamaConfig). What the engine lacks is refused by name."""
    if config.get("model_type", "llama") not in ("llama", "llama_swiftkv"):
        raise unsupported(f"the architecture {config['model_type']!r}")
    for architecture in config.get("architectures") or []:
        if architecture not in ("LlamaForCausalLM", "LlamaSwiftKVForCausalLM"):
            raise unsupported(f"the architecture {architecture!r}")
    for feature in ("attention_bias", "mlp_bias", "quantization_config", "sliding_window", "use_sliding_window"):
        if config.get(feature):
            raise unsupported(feature)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise unsupported(f"the activation {config['hidden_act']!r}")

    layers = integer(config, "num_hidden_layers", 32, high=4096)
    hidden = integer(config, "hidden_size", 4096, high=1 << 17)
    heads = integer(config, "num_attention_heads", 32, high=4096)
    vocab = integer(config, "vocab_size", 32000, high=MOST_TOKENS)
    kv_heads = integer(config, "num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        raise Failure(f"config: {heads} attention heads do not divide among {kv_heads} key heads; repair the config")
    if config.get("head_dim") is None and hidden % heads:
        raise Failure(f"config: hidden_size {hidden} is no multiple of {heads} heads; repair the config")
    head_dim = integer(config, "head_dim", hidden // heads, high=1024)
    if head_dim % 2:
        raise Failure(f"config: head_dim is {head_dim}, RoPE needs an even number; repair the config")
    theta, scaling = check_rope(config)
    bos = token_ids(config, "bos_token_id", vocab, 1)
    if len(bos) > 1:
        raise unsupported("several BoS ids")
    eos = token_ids(config, "eos_token_id", vocab, 2)
    eos += token_ids(generation, "eos_token_id", vocab)
    adapted = check_adapted(config, layers)
    swiftkv = None
    k = integer(config, "num_key_value_layers", layers, high=layers)
    if k < layers:
        group = integer(config, "key_value_group_size", 1, high=layers)
        swiftkv = {"num_key_value_layers": k, "key_value_group_size": group, "original_projections": True}
        adapted.append({"policy": "swiftkv", "k": k, "bos": True})
    return {
        "name": name, "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": integer(config, "intermediate_size", 11008, high=1 << 20), "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6, 1e-30, 1),
        "max_position_embeddings": integer(config, "max_position_embeddings", 2048),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "rope_theta": theta, "rope_scaling": scaling, "bos_token_id": bos[0] if bos else None,
        "eos_token_id": list(dict.fromkeys(eos)), "swiftkv": swiftkv, "adapted": adapted,
    }


def expected_tensors(config):
    """name -> shape of every weight, in the order of the forward pass. Sets of names that may be absent altogether come
    second: the ordinary projections above K of a SwiftKV model."""
    d, f = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    swiftkv = config["swiftkv"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    originals = []
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        above = i - swiftkv["num_key_value_layers"] if swiftkv else -1
        if above == 0:
            shapes["model.norm_swiftkv.weight"] = (d,)
        shapes[layer + "input_layernorm.weight"] = (d,)
        for p, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[layer + f"self_attn.{p}_proj.weight"] = (rows, d)
            if above >= 0:
                originals.append(layer + f"self_attn.{p}_proj.weight")
                if p == "q" or above % swiftkv["key_value_group_size"] == 0:
                    shapes[layer + f"self_attn.{p}_proj_swiftkv.weight"] = (rows, d)
        shapes[layer + "self_attn.o_proj.weight"] = (d, q)
        shapes[layer + "post_attention_layernorm.weight"] = (d,)
        shapes[layer + "mlp.gate_proj.weight"] = (f, d)
        shapes[layer + "mlp.up_proj.weight"] = (f, d)
        shapes[layer + "mlp.down_proj.weight"] = (d, f)
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return shapes, originals


# ---- tokenizer -------------------------------------------------------------------------------------------------------

def byte_letters():
    """Byte-level BPE writes each byte as one printable letter (GPT-2's bytes_to_unicode): letter -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def component_name(component):
    return repr(component.get("type", "?") if isinstance(component, dict) else component)


def sequence(component, key):
    """A tokenizer component as a list: a Sequence is opened, null is empty."""
    if component is None:
        return []
    if isinstance(component, dict) and component.get("type") == "Sequence":
        return [leaf for part in component.get(key) or [] for leaf in sequence(part, key)]
    return [component]


def split_patterns(pre_tokenizer):
    """The regular expressions, in order, of a pre-tokenizer that ends in ByteLevel."""
    def refuse(part):
        return unsupported(f"the pre-tokenizer {component_name(part)} ({json.dumps(part)[:200]})", "tokenizer.json")

    parts = sequence(pre_tokenizer, "pretokenizers")
    patterns = []
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "Split":
            regex = part["pattern"].get("Regex") if isinstance(part.get("pattern"), dict) else None
            if not isinstance(regex, str) or part.get("behavior") != "Isolated" or part.get("invert"):
                raise refuse(part)
            patterns.append(regex)
        elif kind == "Digits":
            patterns.append(DIGIT if part.get("individual_digits") else DIGIT + "+")
        elif kind == "ByteLevel":
            if part.get("add_prefix_space") or i != len(parts) - 1:
                raise refuse(part)
            if part.get("use_regex", True):
                patterns.append(GPT2_SPLIT)
            if len(patterns) > 16 or any(not 0 < len(p.encode()) <= 4096 for p in patterns):
                raise unsupported("more than 16 split patterns, or one longer than 4096 bytes", "tokenizer.json")
            return patterns
        else:
            raise refuse(part)
    raise unsupported("a pre-tokenizer without ByteLevel at its end", "tokenizer.json")


class Tokenizer:
    """Byte-level BPE. vocab: token as byte letters -> id. merges: pairs of tokens, by rank. special: id -> text, the
    tokens that are matched in text before BPE. bos, eos: a token's text or None, for the chat template."""

    def __init__(self, vocab, merges, special, split, ignore_merges, template, bos, eos):
        self.vocab, self.merges, self.special, self.split = vocab, merges, special, split
        self.ignore_merges, self.template, self.bos, self.eos = ignore_merges, template, bos, eos

    def size(self):
        return 1 + max([*self.vocab.values(), *self.special], default=-1)

    def tensors(self, vocab_size):
        """The tensors tokenizer.bytes, tokenizer.offsets and tokenizer.merges."""
        if self.size() > vocab_size:
            raise Failure(f"tokenizer: has {self.size()} tokens, vocab_size is {vocab_size}; use the checkpoint's own")
        letters = byte_letters()
        spelling = [b""] * vocab_size
        for token, i in self.vocab.items():
            try:
                spelling[i] = bytes(letters[c] for c in token)
            except KeyError:  # not reachable by BPE; Hugging Face decodes such a token to its own text
                spelling[i] = token.encode()
        ordinary = [spelling[i] for i in self.vocab.values() if i not in self.special and spelling[i]]
        if len(set(ordinary)) != len(ordinary):
            raise Failure("tokenizer: two tokens have the same bytes; get the file again")
        for i, text in self.special.items():
            spelling[i] = text.encode()
            if len(spelling[i]) > 1024:
                raise Failure(f"tokenizer: the added token {i} is longer than 1024 bytes; get the file again")
        merges = np.empty((len(self.merges), 3), np.uint32)
        for rank, (left, right) in enumerate(self.merges):
            what = f"tokenizer: merge {rank} ({left!r}, {right!r})"
            try:
                merges[rank] = a, b, ab = self.vocab[left], self.vocab[right], self.vocab[left + right]
            except KeyError as error:
                raise Failure(f"{what}: {error} is no token; get the file again") from None
            if not spelling[a] or not spelling[b] or spelling[ab] != spelling[a] + spelling[b]:
                raise Failure(f"{what}: does not join the bytes of two tokens; get the file again")
            if self.special.keys() & {a, b, ab}:
                raise Failure(f"{what}: holds an added token; get the file again")
        if len(set(self.merges)) != len(self.merges):
            raise Failure("tokenizer: a merge appears twice; get the file again")
        offsets = np.cumsum([0, *map(len, spelling)])
        if offsets[-1] >= 1 << 32:
            raise Failure("tokenizer: more than 4 GiB of tokens; get the file again")
        return {"tokenizer.offsets": offsets.astype(np.uint32), "tokenizer.merges": merges,
                "tokenizer.bytes": np.frombuffer(b"".join(spelling), np.uint8)}

    def metadata(self):
        return {"split": self.split, "ignore_merges": self.ignore_merges,
                "special": [[i, text] for i, text in sorted(self.special.items())]}


def added_tokens(data, settings):
    """id -> text of the added tokens, special or not (Hugging Face matches both in text), of tokenizer.json and
    tokenizer_config.json together."""
    more = settings.get("added_tokens_decoder") or {}
    added, ids, normalized = {}, {}, 0
    for token in [*(data.get("added_tokens") or []), *({**t, "id": int(i)} for i, t in more.items())]:
        text, i = token["content"], token["id"]
        if not isinstance(text, str) or not text or not is_naturals([i]):
            raise Failure(f"tokenizer: added token {token!r} has no content or no id; get the files again")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise unsupported(f"{flag} on the added token {text!r}", "tokenizer")
        if added.get(i, text) != text or ids.get(text, i) != i:
            raise Failure(f"tokenizer: added token {text!r} clashes with another one at id {i}; get the files again")
        if token.get("normalized"):
            normalized += 1
            if normalized > 1000:  # each is held against all others
                raise unsupported("normalized on more than 1000 added tokens", "tokenizer")
            if any(text in t or t in text for j, t in added.items() if j != i):
                raise unsupported(f"normalized on the added token {text!r}, which overlaps another,", "tokenizer")
        added[i], ids[text] = text, i
    return added


def read_template(folder, settings):
    """The checkpoint's chat template for plain conversations, or None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_limited(path, TEMPLATE_LIMIT).decode("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise Failure("tokenizer_config.json: chat_template is neither a string nor a list; get the file again")
    return template


def read_tokenizer(folder):
    """A Tokenizer from tokenizer.json and tokenizer_config.json; whatever would change ids is refused by name."""
    path = folder / "tokenizer.json"
    data, settings = read_json(path), read_json(folder / "tokenizer_config.json", required=False)
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise unsupported(f"a tokenizer of type {component_name(model)}", path)
    for feature in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(feature):
            raise unsupported(f"the BPE option {feature}", path)
    for normalizer in sequence(data.get("normalizer"), "normalizers"):
        raise unsupported(f"the normalizer {component_name(normalizer)}", path)
    for decoder in sequence(data.get("decoder"), "decoders"):
        if decoder.get("type") != "ByteLevel":
            raise unsupported(f"the decoder {component_name(decoder)}", path)
    for processor in sequence(data.get("post_processor"), "processors"):
        kind = component_name(processor)
        # BoS in front is the engine's own rule; anything else that is put around the text is not
        pieces = [next(iter(p)) for p in processor["single"]] if kind == "'TemplateProcessing'" else None
        if kind != "'ByteLevel'" and pieces not in (["SpecialToken", "Sequence"], ["Sequence"]):
            raise unsupported(f"the post-processor {kind} (only one BoS in front is possible)", path)
    vocab = model["vocab"]
    if not is_naturals(list(vocab.values())) or len(set(vocab.values())) != len(vocab):
        raise Failure(f"{path}: vocab: an id is no number or two tokens share it; get the file again")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    for rank, merge in enumerate(merges):
        if len(merge) != 2:
            raise Failure(f"{path}: merge {rank} is not a pair of tokens; get the file again")
    special = added_tokens(data, settings)
    at = {i: token for token, i in vocab.items()}
    for i, text in special.items():
        if vocab.get(text, i) != i or at.get(i, text) != text:
            raise Failure(f"{path}: added token {text!r} and token {i} of the vocabulary clash; get the file again")
    if model.get("unk_token") is not None and not set(byte_letters()) <= set(vocab):
        raise unsupported("an unk_token for bytes that have no token", path)
    # either a string or an added token written out
    bos, eos = (t.get("content") if isinstance(t, dict) else t for t in map(settings.get, ("bos_token", "eos_token")))
    return Tokenizer(vocab, merges, special, split_patterns(data.get("pre_tokenizer")),
                     bool(model.get("ignore_merges")), read_template(folder, settings), bos, eos)


# ---- chat template ---------------------------------------------------------------------------------------------------

def llama3_chat(template, system_prefix="", system_default=None, date_default=None):
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return {"template": template, "trim": True, "begin": "<|begin_of_text|>",
            "system": [header("system") + system_prefix, "<|eot_id|>"], "system_default": system_default,
            "user": [header("user"), "<|eot_id|>"], "assistant": [header("assistant"), "<|eot_id|>"],
            "date_default": date_default}


def known_chats(plain):
    """The chat templates the engine knows, as turn marks. `plain`: what the template in question makes of a
    conversation without a system text; ChatML's default system text, in which its variants differ, is read off it."""
    prefix, date = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n", "26 Jul 2024"
    default = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", plain, re.DOTALL)
    if default and len(default[1].encode()) > 16384:  # the engine's limit
        default = None
    chatml = {"template": "chatml", "trim": False, "begin": "",
              "system": ["<|im_start|>system\n", "<|im_end|>\n"], "system_default": default and default[1],
              "user": ["<|im_start|>user\n", "<|im_end|>\n"], "assistant": ["<|im_start|>assistant\n", "<|im_end|>\n"],
              "date_default": None}
    return [llama3_chat("llama-3"), llama3_chat("llama-3.1", prefix, "", date),
            llama3_chat("llama-3.2", prefix, "", date), chatml]


def render_marks(chat, messages, date):
    """The text the engine makes of a conversation: begin, each content between its marks, the generation header."""
    if messages[0]["role"] != "system" and chat["system_default"] is not None:
        messages = [{"role": "system", "content": chat["system_default"]}, *messages]
    text = chat["begin"]
    for message in messages:
        before, after = chat[message["role"]]
        text += before + (message["content"].strip() if chat["trim"] else message["content"]) + after
    return (text + chat["assistant"][0]).replace("{date}", date)


def recognise_chat(tokenizer):
    """The `chat` metadata for the tokenizer's template, or None if there is none or it renders some conversation unlike
    every known one. Templates are compared by what they render, as Hugging Face renders them."""
    if not tokenizer.template:
        return None
    try:
        import jinja2
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise Failure("jinja2: not installed, and the chat template needs it; pip install jinja2") from None

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    if len(tokenizer.template) > TEMPLATE_LIMIT:
        return None
    today = "01 Jan 2000"
    names = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    names = {key: text for key, text in names.items() if text is not None}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[jinja2.ext.loopcontrols])
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda _: today)

    def render(messages):
        try:
            return environment.from_string(tokenizer.template).render(
                messages=messages, add_generation_prompt=True, **names)
        except Exception:  # a template is foreign code: whatever it raises, it is not one of the known ones
            return None

    def turns(*contents):
        roles = ["user", "assistant"] * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents)]

    def system(content):
        return [{"role": "system", "content": content}]

    conversations = [turns("Hi."), turns("  a b\n\n", " c \t", "\u3000d\x1c"), turns("1", "2", "3", "4", "5"),
                     system("Be brief.") + turns("Hi."), system(" \n s t \n") + turns("x", "y", " z"),
                     system("") + turns("Hi."), turns("\n"), turns("a<b>'\"\\ é", "", "c")]
    rendered = in_a_child(lambda: [render(c) for c in conversations]) or [None]
    for chat in known_chats(rendered[0] or ""):
        date = today if chat["template"] == "llama-3.2" else chat["date_default"] or ""
        marks = [m for role in ("system", "user", "assistant") for m in chat[role]] + [chat["begin"]]
        spelled = set(re.findall(r"<\|\w+\|>", "".join(marks)))
        if spelled <= set(tokenizer.special.values()) and \
                rendered == [render_marks(chat, c, date) for c in conversations]:
            return chat
    return None


def in_a_child(work):
    """What work() returns, as JSON keeps it, out of a process of its own: a template is a program, and may run for ever
    or take all memory. None if it failed or was ended for that."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():  # that numpy's threads are not forked: the child needs none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            memory = pages * resource.getpagesize() + TEMPLATE_MEMORY
            resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            text = json.dumps(work()).encode()
            with open(writer, "wb") as file:
                file.write(text)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            text = file.read(16 * TEMPLATE_LIMIT)
        return json.loads(text)
    except ValueError:
        return None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- checkpoints -----------------------------------------------------------------------------------------------------
# A checkpoint is (config, generation config, Tokenizer, tensors, extra), where tensors is name -> (shape, rows) and
# rows(a, b) gives rows a..b of the first dimension as float32, float16 or uint16 (bf16). extra: tensors copied as is.

def folder_tensors(folder):
    """The tensors of a folder's .safetensors files: those the index names, else the one or the many."""
    index = folder / "model.safetensors.index.json"
    where = read_json(index)["weight_map"] if index.is_file() else None
    if where is not None:
        if not all(Path(file).name == file for file in where.values()):
            raise Failure(f"{index}: weight_map names a file outside the folder; get the file again")
        paths = [folder / file for file in dict.fromkeys(where.values())]
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise Failure(f"{folder}: no .safetensors file; save the model with transformers' save_pretrained", 2)
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise Failure(f"{path}: no such file, but the index names it; get the whole checkpoint")
        file = Safetensors(path)
        for name, (dtype, shape, _, _) in file.tensors.items():
            if where is not None and where.get(name) != path.name:
                continue
            if name in tensors:
                raise Failure(f"{folder}: {name} is in two files; keep one checkpoint in the folder", 2)
            if dtype not in ("F32", "F16", "BF16"):
                raise unsupported(f"the dtype {dtype} in {name}", folder)
            tensors[name] = shape, file.rows(name)
    for name in where or ():
        if name not in tensors:
            raise Failure(f"{folder}: {name} is not in {where[name]}, as the index says; get the whole checkpoint")
    return tensors


def read_folder(folder, tokenizer_only):
    tokenizer = read_tokenizer(folder)
    config = read_json(folder / "config.json", required=not tokenizer_only)
    generation = read_json(folder / "generation_config.json", required=False)
    return config, generation, tokenizer, {} if tokenizer_only else folder_tensors(folder), {}


GGUF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
GGUF_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_CONFIG = {
    "llama.block_count": "num_hidden_layers", "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size", "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads", "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim", "llama.vocab_size": "vocab_size",
    "llama.rope.freq_base": "rope_theta", "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "tokenizer.ggml.bos_token_id": "bos_token_id", "tokenizer.ggml.eos_token_id": "eos_token_id",
}
GGUF_NEEDED = ("llama.block_count", "llama.embedding_length", "llama.feed_forward_length", "llama.attention.head_count",
               "llama.attention.layer_norm_rms_epsilon")


def gguf_config(field, path):
    """config.json's keys from GGUF metadata. llama.* keys without an equivalent are refused by name."""
    def read(key):
        if not isinstance(field(key), (int, float)):
            raise Failure(f"{path}: {key} is {field(key)!r}, expected a number; get the file again")
        return field(key)

    if field("general.architecture") != "llama":
        raise unsupported(f"the architecture {field('general.architecture')!r}", path)
    if (field("split.count") or 1) != 1:
        raise unsupported("a GGUF in several parts", path)
    config = {ours: read(key) for key, ours in GGUF_CONFIG.items() if key in GGUF_NEEDED or field(key) is not None}
    config = {"vocab_size": len(field("tokenizer.ggml.tokens")), "bos_token_id": None, **config}
    stops = [field(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    config["eos_token_id"] = [i for i in dict.fromkeys(stops) if i is not None]
    head_dim = config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])
    for key, same in (("llama.attention.value_length", head_dim), ("llama.rope.dimension_count", head_dim)):
        if field(key) not in (None, same):
            raise unsupported(f"{key} {field(key)} beside heads of {head_dim}", path)
    known = {*GGUF_CONFIG, "llama.attention.value_length", "llama.rope.dimension_count"}
    for key in field.keys:
        off = key.startswith(("llama.expert", "llama.rope.scaling")) and field(key) in (0, "none", False)
        if key.startswith("llama.") and key not in known and not off:
            raise unsupported(f"{key} ({field(key)!r})", path)
    return config


def gguf_tokenizer(field, path):
    if field("tokenizer.ggml.model") != "gpt2":
        raise unsupported(f"a tokenizer of type {field('tokenizer.ggml.model')!r}", path)
    pre = field("tokenizer.ggml.pre")
    if pre not in GGUF_SPLIT:
        raise unsupported(f"the pre-tokenizer {pre!r}", path)
    if field("tokenizer.ggml.add_space_prefix"):
        raise unsupported("tokenizer.ggml.add_space_prefix", path)
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    normal, control, user, unused = 1, 3, 4, 5  # gguf.TokenType
    if set(kinds) - {normal, control, user, unused}:
        raise unsupported(f"a token type among {sorted(set(kinds))}", path)
    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] == normal}
    special = {i: t for i, t in enumerate(tokens) if kinds[i] in (control, user)}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    if len(kinds) != len(tokens) or len(vocab) != kinds.count(normal) or any(len(merge) != 2 for merge in merges):
        raise Failure(f"{path}: token types, tokens or merges do not fit together; get the file again")
    split, ignore_merges = GGUF_SPLIT[pre]
    bos, eos = (tokens[i] if type(i) is int and 0 <= i < len(tokens) else None
                for i in (field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")))
    return Tokenizer(vocab, merges, special, split, ignore_merges, field("tokenizer.chat_template"), bos, eos)


class Gguf(Reader):
    """A GGUF file (github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian, version 2 or 3. `values`: its
    metadata; `tensors`: name -> (shape, type, begin, end), shapes as Hugging Face writes them, offsets from the start
    of the file. Every count, length and offset is held against what is there before anything is made of it."""
    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, path, gguf):
        super().__init__(path)
        self.gguf = gguf
        self.head, self.at = self.read(0, min(self.size, JSON_LIMIT)).tobytes(), 0
        if self.head[:4] != b"GGUF":
            raise self.bad("does not begin with GGUF")
        _, version, n_tensors, n_values = self.take("IIQQ")
        if version not in (2, 3):
            raise self.bad(f"GGUF version {version}, expected 2 or 3")
        self.values = {}
        for _ in range(n_values):
            key = self.string()
            if key in self.values:
                raise self.bad(f"{key} is there twice")
            self.values[key] = self.value(*self.take("I"), key)
        entries = [self.entry() for _ in range(n_tensors)]
        alignment = self.values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
            raise self.bad(f"general.alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        self.tensors, position = {}, start
        for offset, name, shape, kind in sorted(entries, key=lambda entry: entry[0]):
            begin = start + offset
            if name in self.tensors:
                raise self.bad(f"{name} is there twice")
            if begin < position or offset % alignment:
                raise self.bad(f"{name} begins at byte {begin}, in another tensor or unaligned")
            block, width = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise self.bad(f"{name}: rows of {shape[-1]} values, its blocks have {block}")
            position = begin + math.prod(shape) // block * width
            if position > self.size:
                raise self.bad(f"{name} ends at byte {position}, the file at {self.size}")
            self.tensors[name] = shape, kind, begin, position
        del self.head

    def bad(self, why):
        return damaged(self.path, why)

    def take(self, format):
        """Numbers, by struct's letters."""
        return struct.unpack("<" + format, self.bytes(struct.calcsize("<" + format)))

    def bytes(self, size):
        if size > len(self.head) - self.at:
            raise self.bad("it ends within its header" if len(self.head) == self.size else
                           f"its header is longer than {JSON_LIMIT >> 20} MB")
        self.at += size
        return self.head[self.at - size:self.at]

    def string(self):
        text = self.bytes(*self.take("Q"))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"a text in its header is not UTF-8: {text[:50]!r}") from None

    def value(self, kind, key):
        if kind == self.STRING:
            return self.string()
        if kind in self.NUMBERS:
            return self.take(self.NUMBERS[kind])[0]
        if kind != self.ARRAY:
            raise self.bad(f"{key} is of type {kind}, which GGUF does not have")
        kind, count = self.take("IQ")
        if kind == self.STRING:
            return [self.string() for _ in range(count)]
        if kind not in self.NUMBERS:
            raise self.bad(f"{key} is a list of type {kind}")
        letter = self.NUMBERS[kind]
        return list(struct.unpack(f"<{count}{letter}", self.bytes(count * struct.calcsize("<" + letter))))

    def entry(self):
        """(offset, name, shape, type) of a tensor."""
        name, (rank,) = self.string(), self.take("I")
        if not 1 <= rank <= 4:
            raise self.bad(f"{name} has {rank} dimensions")
        shape = tuple(reversed(self.take(f"{rank}Q")))
        if 0 in shape:
            raise self.bad(f"{name} has the shape {list(shape)}")
        kind, offset = self.take("IQ")
        try:
            return offset, name, shape, self.gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise unsupported(f"the tensor type {kind} in {name}", self.path) from None

    def rows(self, name, head_dim):
        """rows(a, b) of a tensor, dequantised. head_dim: for Q and K, whose rows llama.cpp stores interleaved (pair i
        of a head is rows 2i, 2i+1); Hugging Face has them in halves (pair i is rows i and head_dim/2 + i)."""
        shape, kind, begin, end = self.tensors[name]
        count = shape[0] if len(shape) > 1 else 1  # a vector is one row, which a quantised one cannot be cut within
        width = (end - begin) // count

        def rows(a, b):
            first, last = (a, min(b, count)) if len(shape) > 1 else (0, 1)
            data = self.read(begin + first * width, begin + last * width).reshape(last - first, *shape[1:-1], -1)
            try:
                x = self.gguf.quants.dequantize(data, kind)
            except NotImplementedError:
                raise unsupported(f"the tensor type {kind.name} in {name}", self.path) from None
            if len(shape) == 1:
                return x[0, a:b]
            if head_dim is None:
                return x
            return x.reshape(-1, head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)

        return rows


def read_gguf(path, tokenizer_only):
    try:
        import gguf
    except ImportError:
        raise Failure("gguf: not installed, and a GGUF file needs it; pip install gguf") from None
    file = Gguf(path, gguf)
    values = file.values

    def field(key):
        return values.get(key)

    field.keys = values
    config, tokenizer = gguf_config(field, path), gguf_tokenizer(field, path)
    tensors, extra = {}, {}
    for name in [] if tokenizer_only else file.tensors:
        shape = file.tensors[name][0]
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        other = re.fullmatch(r"(\w+)\.weight", name)
        head_dim = None
        if name == "rope_freqs.weight":
            if len(shape) != 1 or shape[0] > 512:
                raise Failure(f"{path}: rope_freqs.weight has the shape {list(shape)}; get the file again")
            extra["rope.freq_divisors"] = np.ascontiguousarray(file.rows(name, None)(0, shape[0]), np.float32)
            continue
        if layer and layer[2] in GGUF_LAYER:
            ours = f"model.layers.{layer[1]}.{GGUF_LAYER[layer[2]]}.weight"
            if layer[2] in ("attn_q", "attn_k"):
                head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        elif other and other[1] in GGUF_OTHER:
            ours = GGUF_OTHER[other[1]] + ".weight"
        else:
            raise unsupported(f"the tensor {name}", path)
        if ours in tensors:
            raise Failure(f"{path}: {name} is there twice; get the file again")
        tensors[ours] = shape, file.rows(name, head_dim)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config, {}, tokenizer, tensors, extra


def select_tensors(config, tensors, extra):
    """The weights to write, name -> (shape, rows) in order. Missing, misshapen and unknown ones are errors; sets
    config["swiftkv"]["original_projections"]."""
    shapes, originals = expected_tensors(config)
    if originals:
        config["swiftkv"]["original_projections"] = any(name in tensors for name in originals)
        if not config["swiftkv"]["original_projections"]:
            shapes = {name: shape for name, shape in shapes.items() if name not in originals}
    for name, shape in shapes.items():
        if name not in tensors:
            raise Failure(f"{name}: missing in the checkpoint; get the whole checkpoint")
        if tensors[name][0] != shape:
            raise Failure(f"{name}: expected the shape {list(shape)} by the config, got {list(tensors[name][0])}; "
                          "use the config that belongs to the weights")
    for name in tensors.keys() - shapes.keys():
        if re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
            continue  # a buffer old versions of transformers saved; it follows from the config
        if name == "model.norm_swiftkv.weight" and not config["swiftkv"]:
            continue  # part of every SwiftKV model, unused when all layers have keys and values of their own
        if name == "lm_head.weight":
            embedding = tensors["model.embed_tokens.weight"]
            if tensors[name][0] == embedding[0] and \
                    all(np.array_equal(tensors[name][1](i, i + 1024), embedding[1](i, i + 1024))
                        for i in range(0, embedding[0][0], 1024)):
                continue
            raise unsupported("tie_word_embeddings with a head that differs from the embedding")
        raise unsupported(f"the tensor {name}")
    half = (config["head_dim"] // 2,)
    divisors = extra.get("rope.freq_divisors")
    if divisors is not None and (divisors.shape != half or not np.all(np.isfinite(divisors) & (divisors > 0))):
        raise Failure(f"rope_freqs.weight: expected {half[0]} positive numbers, got the shape {list(divisors.shape)}; "
                      "get the file again")
    return {name: tensors[name] for name in shapes}


# ---- writing ---------------------------------------------------------------------------------------------------------

def weight_chunks(name, shape, rows, head_dim, rounding):
    """The tensor in bf16, piece by piece. Pieces are whole heads, so that a permutation in a head stays inside one."""
    step = max(1, CHUNK // (math.prod(shape[1:]) * head_dim)) * head_dim
    for a in range(0, shape[0], step):
        yield rounding(rows(a, min(a + step, shape[0])), name)


def write_file(out, metadata, entries):
    """Writes a .safetensors file: entries are (name, dtype, shape, chunks). It appears under its name only when it is
    complete, on the disk, and reads back as it was written. Returns its size in bytes."""
    header, position = {"__metadata__": metadata}, 0
    for name, dtype, shape, _ in entries:
        end = position + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if out.exists() and not out.is_file():
        raise Failure(f"{out}: not a regular file; give the name of a file to write", 2)
    part = out.with_name(f".{out.name[:200]}.{os.getpid()}.part")
    try:
        checks = {}
        with open(part, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, _, _, chunks in entries:
                checks[name] = 0
                for chunk in chunks:
                    data = memoryview(np.ascontiguousarray(chunk)).cast("B") if chunk.size else b""
                    checks[name] = zlib.crc32(data, checks[name])
                    file.write(data)
                show_progress(file.tell(), 8 + len(text) + position)
            file.flush()
            os.fsync(file.fileno())
        back = Safetensors(part)
        for name, dtype, shape, _ in entries:
            _, got, begin, end = back.tensors[name]
            check = 0
            for at in range(begin, end, CHUNK):
                check = zlib.crc32(back.read(at, min(at + CHUNK, end)), check)
            if got != tuple(shape) or check != checks[name]:
                raise Failure(f"{out}: {name} does not read back as written; check the disk")
        os.replace(part, out)
        size = back.size
        del back
        with open(out, "rb") as file:  # out of the page cache: the engine's first reading brings it back in large pages
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return size
    finally:
        part.unlink(missing_ok=True)


def show_progress(done, total):
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB" if done < total else "\r\x1b[K")
        sys.stderr.flush()


def tokenizer_config(config, generation, tokenizer, name):
    """The few config keys of a file without weights; ids from the config if there is one, else by the tokens' texts."""
    ids = {text: i for i, text in tokenizer.special.items()}
    config = {"bos_token_id": ids.get(tokenizer.bos), "eos_token_id": ids.get(tokenizer.eos), **config}
    vocab = integer(config, "vocab_size", tokenizer.size(), high=MOST_TOKENS)
    bos, eos = (token_ids(config, key, vocab) for key in ("bos_token_id", "eos_token_id"))
    eos += token_ids(generation, "eos_token_id", vocab)
    return {"name": name, "vocab_size": vocab, "bos_token_id": bos[0] if bos else None,
            "eos_token_id": list(dict.fromkeys(eos)), "tokenizer_only": True}


def export(checkpoint, out, tokenizer_only):
    """Exports and returns the summary, a list of lines."""
    if not checkpoint.exists():
        raise Failure(f"{checkpoint}: no such file or folder; give a Hugging Face folder or a .gguf file", 2)
    if out.is_dir() or not out.parent.is_dir():
        raise Failure(f"{out}: not a file in an existing folder; give another output file", 2)
    if out.exists() and (out.resolve().parent == checkpoint.resolve() or out.resolve() == checkpoint.resolve()):
        raise Failure(f"{out}: would overwrite a file of the checkpoint; give another output file", 2)
    if not checkpoint.is_dir() and checkpoint.suffix != ".gguf":
        raise Failure(f"{checkpoint}: neither a folder nor a .gguf file; give a Hugging Face folder or a .gguf file", 2)
    folder = checkpoint.is_dir()
    if not folder and not checkpoint.is_file():
        raise Failure(f"{checkpoint}: not a regular file; give a Hugging Face folder or a .gguf file", 2)
    config, generation, tokenizer, tensors, extra = (read_folder if folder else read_gguf)(checkpoint, tokenizer_only)
    name = one_line(checkpoint.resolve().name if folder else checkpoint.stem)
    rounding = Rounding()
    if tokenizer_only:
        config, weights = tokenizer_config(config, generation, tokenizer, name), {}
    else:
        config = check_config(config, generation, name)
        weights = select_tensors(config, tensors, extra)
    chat = recognise_chat(tokenizer)
    words = tokenizer.tensors(config["vocab_size"])
    metadata = {"format": FORMAT, "config": json.dumps(config), "tokenizer": json.dumps(tokenizer.metadata()),
                "chat": json.dumps(chat)}
    # widest dtypes first, so that every tensor is aligned
    entries = [(n, "U32", words[n].shape, [words[n]]) for n in ("tokenizer.offsets", "tokenizer.merges")]
    entries += [(n, "F32", x.shape, [x]) for n, x in extra.items()]
    entries += [(n, "BF16", shape, weight_chunks(n, shape, rows, config["head_dim"], rounding))
                for n, (shape, rows) in weights.items()]
    entries += [("tokenizer.bytes", "U8", words["tokenizer.bytes"].shape, [words["tokenizer.bytes"]])]
    size = write_file(out, metadata, entries)

    return [f"wrote {out}: {size / 1e6:.1f} MB, {len(entries)} tensors",
            *summary(config, tokenizer, chat, rounding, extra)]


def summary(c, tokenizer, chat, rounding, extra):
    if "tokenizer_only" not in c:
        scaling = f", llama3 scaling by {c['rope_scaling']['factor']:g}" if c["rope_scaling"] else ""
        scaling += ", with frequency divisors" if extra else ""
        head = "tied" if c["tie_word_embeddings"] else "untied"
        yield (f"model: {c['name']}, {c['num_hidden_layers']} layers, hidden {c['hidden_size']}, "
               f"{c['num_attention_heads']} query and {c['num_key_value_heads']} KV heads of {c['head_dim']}, "
               f"MLP {c['intermediate_size']}, {head} head, RoPE theta {c['rope_theta']:g}{scaling}, "
               f"context {c['max_position_embeddings']}")
        if c["swiftkv"]:
            kept = "kept" if c["swiftkv"]["original_projections"] else "absent"
            yield (f"SwiftKV: from layer {c['swiftkv']['num_key_value_layers']} up, groups of "
                   f"{c['swiftkv']['key_value_group_size']}, ordinary projections {kept}")
        yield f"weights: {rounding}"
    template = chat["template"] if chat else "unknown, --chat will not work" if tokenizer.template else "none"
    yield (f"tokenizer: {c['vocab_size']} tokens, {len(tokenizer.merges)} merges, {len(tokenizer.special)} special, "
           f"BoS {c['bos_token_id']}, EoS {c['eos_token_id']}; chat template: {template}")


def main(arguments):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Failure(f"command line: {message}; see --help", 2)

    parser = Parser(prog="export_weights.py", description=__doc__.split(": ", 1)[1],
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="file to write")
    parser.add_argument("--tokenizer-only", action="store_true", help="no weights, for `speed tokenize` and `info`")
    try:
        options = parser.parse_args(arguments)
        with np.errstate(all="ignore"):  # what comes of strange numbers is checked; numpy's warnings are not for users
            summary = export(options.checkpoint, options.out, options.tokenizer_only)
    except Failure as failure:
        return fail(failure, failure.code)
    except OSError as error:
        return fail(f"{error.filename or options.out}: {error.strerror or error}; free the space or the permission it "
                    "needs, nothing was written")
    except (MemoryError, RecursionError):
        return fail(f"{options.checkpoint}: it takes more memory than there is; get the file again if it is not that "
                    "large, nothing was written")
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # a value of a kind no checkpoint has
        return fail(f"{options.checkpoint}: not as a checkpoint should be ({type(error).__name__}: "
                    f"{str(error)[:200]}); get it again")
    except KeyboardInterrupt as stop:
        return fail("interrupted; nothing was written", 128 + (stop.args or (signal.SIGINT,))[0])
    try:
        print("\n".join(summary), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries once more at its end
        return fail(f"standard output: {error.strerror}; check where it goes, {options.out} is written")
    return 0


def fail(why, code=1):
    print(f"export_weights.py: {one_line(why)}", file=sys.stderr)
    return code


def stop(number, _):
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)  # a second one must not stop the tidying up
    raise KeyboardInterrupt(number)


STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

if __name__ == "__main__":
    for each in STOPS:
        if signal.getsignal(each) == signal.SIG_DFL:  # not one that whoever started this has it ignore
            signal.signal(each, stop)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe ends it silently
    sys.exit(main(sys.argv[1:]))
