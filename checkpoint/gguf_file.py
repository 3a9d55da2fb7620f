"""Reads a GGUF file, with Hugging Face's names and order of rows.

The file is not trusted. The Python package gguf is: it knows the sizes of quantised blocks and dequantises them.
"""

import math
import re
import struct
from typing import ClassVar, NamedTuple

import numpy as np

from .failure import Failure, damaged, unsupported
from .files import JSON_LIMIT, Checkpoint, Reader, Weight
from .tokenizer import DIGIT, GPT2_SPLIT, LLAMA3_SPLIT, Tokenizer

# tokenizer.ggml.pre -> (split patterns, ignore_merges), as in llama.cpp's llama-vocab.cpp
GGUF_SPLIT = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), ([GPT2_SPLIT], False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), ([DIGIT, GPT2_SPLIT], False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), ([LLAMA3_SPLIT], True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), ([LLAMA3_SPLIT], False)),
}
# Control tokens by which a file without tokenizer.ggml.pre shows that it has Llama 3's vocabulary.
LLAMA3_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
GGUF_CONFIG = {
    "llama.block_count": "num_hidden_layers",
    "llama.context_length": "max_position_embeddings",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
    "llama.vocab_size": "vocab_size",
    "llama.rope.freq_base": "rope_theta",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
}
GGUF_NEEDED = (
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
)


class GgufTensor(NamedTuple):
    """A tensor in the file. Its shape is as Hugging Face writes it. Offsets are from the start of the file."""

    shape: tuple
    kind: object  # gguf.GGMLQuantizationType
    begin: int
    end: int


class Entry(NamedTuple):
    """A tensor as the header describes it. The offset is from the start of the data."""

    offset: int
    name: str
    shape: tuple
    kind: object


class Gguf(Reader):
    """A GGUF file (github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian, version 2 or 3. `values`: its
    metadata. `tensors`: name -> GgufTensor. Every count, length and offset is checked before it is used."""

    NUMBERS: ClassVar = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    STRING, ARRAY = 8, 9

    def __init__(self, path, gguf):
        super().__init__(path)
        self.gguf = gguf
        self.head, self.at = self.read(0, min(self.size, JSON_LIMIT)).tobytes(), 0
        if self.head[:4] != b"GGUF":
            raise self.bad("does not begin with GGUF")
        _, version, n_tensors, n_values = self.take("IIQQ")
        if version in (2 << 24, 3 << 24):
            raise unsupported("big-endian GGUF", path)
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
        for offset, name, shape, kind in sorted(entries, key=lambda entry: entry.offset):
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
            self.tensors[name] = GgufTensor(shape, kind, begin, position)
        del self.head

    def bad(self, why):
        return damaged(self.path, why)

    def take(self, format):
        """The next numbers. `format` holds struct's letters."""
        return struct.unpack("<" + format, self.bytes(struct.calcsize("<" + format)))

    def bytes(self, size):
        if size > len(self.head) - self.at:
            raise self.bad(
                "it ends within its header"
                if len(self.head) == self.size
                else f"its header is longer than {JSON_LIMIT >> 20} MB"
            )
        self.at += size
        return self.head[self.at - size : self.at]

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
        name, (rank,) = self.string(), self.take("I")
        if not 1 <= rank <= 4:
            raise self.bad(f"{name} has {rank} dimensions")
        shape = tuple(reversed(self.take(f"{rank}Q")))
        if 0 in shape:
            raise self.bad(f"{name} has the shape {list(shape)}")
        kind, offset = self.take("IQ")
        try:
            return Entry(offset, name, shape, self.gguf.GGMLQuantizationType(kind))
        except ValueError:
            raise unsupported(f"the tensor type {kind} in {name}", self.path) from None

    def rows(self, name, head_dim):
        """rows(a, b) of a tensor, dequantised. head_dim: None, except for Q and K. llama.cpp stores their rows
        interleaved (pair i of a head is rows 2i, 2i+1). Hugging Face stores them in halves (pair i is rows i and
        head_dim/2 + i)."""
        shape, kind, begin, end = self.tensors[name]
        count = shape[0] if len(shape) > 1 else 1  # a vector is one row, since blocks cannot be cut
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


def gguf_config(values, path):
    """The keys of config.json from GGUF metadata. A llama.* key that has no equivalent is refused by name."""
    field = values.get

    def read(key):
        if not isinstance(field(key), (int, float)):
            raise Failure(f"{path}: {key} is {field(key)!r}, expected a number; get the file again")
        return field(key)

    if field("general.architecture") != "llama":
        raise unsupported(f"the architecture {field('general.architecture')!r}", path)
    config = {ours: read(key) for key, ours in GGUF_CONFIG.items() if key in GGUF_NEEDED or field(key) is not None}
    config = {"vocab_size": len(field("tokenizer.ggml.tokens")), "bos_token_id": None, **config}
    stops = [field(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    config["eos_token_id"] = [i for i in dict.fromkeys(stops) if i is not None]
    head_dim = config.get("head_dim") or config["hidden_size"] // max(1, config["num_attention_heads"])
    for key, same in (("llama.attention.value_length", head_dim), ("llama.rope.dimension_count", head_dim)):
        if field(key) not in (None, same):
            raise unsupported(f"{key} {field(key)} beside heads of {head_dim}", path)
    known = {*GGUF_CONFIG, "llama.attention.value_length", "llama.rope.dimension_count"}
    unscaled = field("llama.rope.scaling.type") == "none" or (
        field("llama.rope.scaling.type") in (None, "linear") and field("llama.rope.scaling.factor") in (None, 0, 1)
    )
    for key in values:
        off = key.startswith("llama.expert") and field(key) in (0, False)
        off = off or (key.startswith("llama.rope.scaling") and unscaled)
        off = off or (key == "llama.rope.scale_linear" and field(key) == 1)
        if key.startswith("llama.") and key not in known and not off:
            raise unsupported(f"{key} ({field(key)!r})", path)
    return config


def gguf_tokenizer(values, path):
    field = values.get
    if field("tokenizer.ggml.model") != "gpt2":
        raise unsupported(f"a tokenizer of type {field('tokenizer.ggml.model')!r}", path)
    pre = field("tokenizer.ggml.pre")
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    normal, control, user, unused = 1, 3, 4, 5  # gguf.TokenType
    if pre in (None, "default") and {t for t, k in zip(tokens, kinds, strict=False) if k == control} >= LLAMA3_TOKENS:
        pre = "llama-bpe"
    if pre not in GGUF_SPLIT:
        raise unsupported(f"the pre-tokenizer {pre!r}", path)
    if field("tokenizer.ggml.add_space_prefix"):
        raise unsupported("tokenizer.ggml.add_space_prefix", path)
    if set(kinds) - {normal, control, user, unused}:
        raise unsupported(f"a token type among {sorted(set(kinds))}", path)
    vocab = {t: i for i, t in enumerate(tokens) if kinds[i] == normal}
    special, plain = ({i: t for i, t in enumerate(tokens) if kinds[i] == kind} for kind in (control, user))
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    if len(kinds) != len(tokens) or len(vocab) != kinds.count(normal) or any(len(merge) != 2 for merge in merges):
        raise Failure(f"{path}: token types, tokens or merges do not fit together; get the file again")
    split, ignore_merges = GGUF_SPLIT[pre]
    names = {}
    for name in ("bos", "eos", "unknown", "seperator", "padding", "cls", "mask"):  # spelt so in GGUF
        i = field(f"tokenizer.ggml.{name}_token_id")
        short = {"unknown": "unk", "seperator": "sep", "padding": "pad"}.get(name, name)
        if type(i) is int and 0 <= i < len(tokens):
            names[f"{short}_token"] = tokens[i]
    return Tokenizer(vocab, merges, special, plain, split, ignore_merges, field("tokenizer.chat_template"), names)


def gguf_parts(path, gguf):
    """(metadata, tensor name -> Gguf that holds it, the paths). A checkpoint in several files, NAME-00001-of-00003.gguf
    and so on, is read whole, whichever of them is named."""
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    paths = [path]
    if named and 1 < int(named[3]) <= 1000:
        paths = [path.with_name(f"{named[1]}-{i + 1:05}-of-{named[3]}.gguf") for i in range(int(named[3]))]
    where, files = {}, []
    for i, part in enumerate(paths):
        if not part.is_file():
            raise Failure(f"{part}: no such file, but it is a part of the checkpoint; get all {len(paths)} parts")
        file = Gguf(part, gguf)
        count, number = file.values.get("split.count", 0), file.values.get("split.no", 0)
        if (count or 1) != len(paths) or number != i:
            raise Failure(
                f"{part}: part {number!r} of {count!r} by its header, {i} of {len(paths)} by its name; "
                "give all parts their own names, as they were published"
            )
        for name in file.tensors:
            if name in where:
                raise Failure(f"{part}: {name} is in two parts; get the parts again")
            where[name] = file
        files.append(file)
    expected = files[0].values.get("split.tensors.count")
    if len(paths) > 1 and expected != len(where):
        raise Failure(f"{path}: the parts hold {len(where)} tensors, expected {expected!r}; get the parts again")
    return files[0].values, where, paths


def read_gguf(path, tokenizer_only):
    try:
        import gguf
    except ImportError:
        raise Failure("gguf: not installed, and a GGUF file needs it; pip install gguf") from None
    values, where, paths = gguf_parts(path, gguf)
    config, tokenizer = gguf_config(values, path), gguf_tokenizer(values, path)
    tensors, extra = {}, {}
    for name, file in [] if tokenizer_only else where.items():
        shape = file.tensors[name].shape
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
        tensors[ours] = Weight(shape, file.rows(name, head_dim))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return Checkpoint(config, {}, tokenizer, tensors, extra, [part.name for part in paths])
