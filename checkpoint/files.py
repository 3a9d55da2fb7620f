"""JSON and .safetensors files. They are not trusted: every size, offset and count is checked before it is used."""

import json
import math
import os
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .failure import Failure, damaged, unsupported

# Limit of a JSON file and of a header, in bytes. It is four times Llama 3's tokenizer.json. Hostile JSON of that size
# takes Python 2 GB, which most machines have.
JSON_LIMIT = 64 << 20
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
WIDTH |= {f"{sign}{8 * width}": width for sign in "IU" for width in (1, 2, 4, 8)}
STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}


class Weight(NamedTuple):
    """A tensor that is not read yet. rows(a, b) reads rows a..b of its first dimension, as float32, as float16, or as
    uint16 that holds bf16."""

    shape: tuple
    rows: Callable


class Checkpoint(NamedTuple):
    """What both readers return."""

    config: dict  # with the keys of Hugging Face's config.json, not checked yet
    generation: dict  # generation_config.json
    tokenizer: object  # a tokenizer.Tokenizer
    tensors: dict  # Hugging Face's name -> Weight
    extra: dict  # name -> array, copied to the exported file unchanged
    files: list  # the names of the files that were read, the weights first


class TensorInfo(NamedTuple):
    """A tensor in a .safetensors file. begin and end are offsets from the start of the file."""

    dtype: str
    shape: tuple
    begin: int
    end: int


def parse_json(text, what):
    """The JSON object in `text`. A key that appears twice, NaN and Infinity are errors."""

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


class Reader:
    """A file, read by offsets. It is not mapped: if it is cut short meanwhile, that is an error here, not a signal."""

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
    """A .safetensors file. `tensors`: name -> TensorInfo. Every size, offset, overlap and gap is checked first."""

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
            self.tensors[name] = TensorInfo(dtype, tuple(shape), start + begin, start + end)
        position = start
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != position:
                kind = "gap" if info.begin > position else "overlap"
                raise bad(f"{name}: {kind}: starts at {info.begin}, expected {position}")
            position = info.end
        if position != size:
            raise bad(f"the tensors end at byte {position}, the file has {size}")

    def array(self, name):
        """The tensor as stored; BF16 as uint16."""
        info = self.tensors[name]
        return self.read(info.begin, info.end).view(STORED[info.dtype]).reshape(info.shape)

    def rows(self, name):
        """rows(a, b) of the tensor as stored; BF16 as uint16."""
        dtype, shape, begin, _ = self.tensors[name]
        width = math.prod(shape[1:]) * WIDTH[dtype]

        def rows(a, b):
            b = min(b, shape[0])
            return self.read(begin + a * width, begin + b * width).view(STORED[dtype]).reshape(b - a, *shape[1:])

        return rows


def is_parameter(name):
    """Whether a tensor of this name takes part in a computation. The others are buffers that old versions of
    transformers saved, such as rotary tables and masks: they follow from the config."""
    mask = name.endswith(("attn.bias", "attention.bias"))
    return "lora" in name or (name.endswith((".weight", ".bias")) and not mask)


def is_naturals(value):
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in value)
