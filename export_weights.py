#!/usr/bin/env python3
"""export_weights.py CHECKPOINT OUT.safetensors: turn a Llama-architecture checkpoint into the one file `speed` reads.

CHECKPOINT is a Hugging Face folder (config.json, tokenizer.json, *.safetensors in F32, F16 or BF16) or a .gguf file.
OUT holds everything in one .safetensors container: weights in bf16 under Hugging Face's names, and in the header's
metadata the config, the tokenizer's rules and the chat template's turn marks, each as JSON.

--adapter merges a LoRA adapter, a folder as PEFT writes it, into the weights. What a model was trained for is said by
the key speed_adapted in its config.json or in adapter_config.json, a list of {"policy": "speed", "k": 20, "bos": true},
with k null for any K; or by --adapted speed:20, or --adapted speed for any K. The engine then takes that policy by
itself, and does not warn.

A checkpoint with a feature that the engine lacks is refused, and the message names the feature. Needs numpy; jinja2 for
a chat template; gguf for a GGUF file.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: there is nothing to clean up yet

import argparse
import hashlib
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

try:
    import numpy as np
except ImportError:
    sys.exit("export_weights.py: numpy: not installed; pip install numpy")

from checkpoint.adapter import merge_adapter
from checkpoint.chat import recognise_chat
from checkpoint.config import check_config, expected_tensors, parse_adapted, tokenizer_config
from checkpoint.failure import Failure, one_line, unsupported
from checkpoint.files import WIDTH, Safetensors, is_parameter
from checkpoint.folder import read_folder
from checkpoint.gguf_file import read_gguf

FORMAT = "speed 1"
ALIGNMENT = 64  # of the first tensor, in bytes
CHUNK = 1 << 22  # elements converted at a time, so that a large model needs no more memory than a small one


# ---- weights ---------------------------------------------------------------------------------------------------------


def select_tensors(config, tensors, extra):
    """The weights to write, name -> Weight, in order. A weight that is missing, of the wrong shape or unknown is an
    error. Sets config["swiftkv"]["original_projections"]."""
    shapes, originals = expected_tensors(config)
    if originals:
        config["swiftkv"]["original_projections"] = any(name in tensors for name in originals)
        if not config["swiftkv"]["original_projections"]:
            shapes = {name: shape for name, shape in shapes.items() if name not in originals}
    for name, shape in shapes.items():
        if name not in tensors:
            raise Failure(f"{name}: missing in the checkpoint; get the whole checkpoint")
        if tensors[name].shape != shape:
            raise Failure(
                f"{name}: expected the shape {list(shape)} by the config, got {list(tensors[name].shape)}; "
                "use the config that belongs to the weights"
            )
    for name in tensors.keys() - shapes.keys():
        if not is_parameter(name):
            continue
        if name == "model.norm_swiftkv.weight" and not config["swiftkv"]:
            continue  # every SwiftKV model has it; not used if all layers have keys and values of their own
        if name == "lm_head.weight":
            head, embedding = tensors[name], tensors["model.embed_tokens.weight"]
            if head.shape == embedding.shape and all(
                np.array_equal(head.rows(i, i + 1024), embedding.rows(i, i + 1024))
                for i in range(0, embedding.shape[0], 1024)
            ):
                continue
            raise unsupported("tie_word_embeddings with a head that differs from the embedding")
        raise unsupported(f"the tensor {name}")
    half = (config["head_dim"] // 2,)
    divisors = extra.get("rope.freq_divisors")
    if divisors is not None and (divisors.shape != half or not np.all(np.isfinite(divisors) & (divisors > 0))):
        raise Failure(
            f"rope_freqs.weight: expected {half[0]} positive numbers, got the shape {list(divisors.shape)}; "
            "get the file again"
        )
    return {name: tensors[name] for name in shapes}


class Rounding:
    """Rounds to bf16 (to nearest, ties to even), and counts how many values that changed and by how much."""

    def __init__(self):
        self.values = self.changed = 0
        self.error2 = self.norm2 = 0.0

    def __call__(self, x, name):
        """x: float32, float16, or uint16 that holds bf16. Returns uint16 that holds bf16. NaN, Inf and overflow are
        errors."""
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


def weight_chunks(name, shape, rows, head_dim, rounding):
    """The tensor in bf16, in pieces. Each piece holds whole heads, because the rows of a head may be permuted."""
    step = max(1, CHUNK // (math.prod(shape[1:]) * head_dim)) * head_dim
    for a in range(0, shape[0], step):
        yield rounding(rows(a, min(a + step, shape[0])), name)


# ---- writing ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to write. Its data is the chunks, one after the other."""

    name: str
    dtype: str
    shape: tuple
    chunks: Iterable


def write_file(out, metadata, entries):
    """Writes a .safetensors file and returns its size in bytes. The file gets its name only when it is complete and on
    the disk, and reads back as it was written. Its metadata also get the SHA-256 of all tensors' data."""
    digest, place = hashlib.sha256(), b"0" * 64
    header, position = {"__metadata__": {**metadata, "sha256": place.decode()}}, 0
    for name, dtype, shape, _ in entries:
        end = position + math.prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
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
                    digest.update(data)
                    file.write(data)
                show_progress(file.tell(), 8 + len(text) + position)
            file.seek(8 + text.index(b'"sha256":"' + place) + len(b'"sha256":"'))
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        back = Safetensors(part)
        for entry in entries:
            name, stored = entry.name, back.tensors[entry.name]
            check = 0
            for at in range(stored.begin, stored.end, CHUNK):
                check = zlib.crc32(back.read(at, min(at + CHUNK, stored.end)), check)
            if stored.shape != tuple(entry.shape) or check != checks[name]:
                raise Failure(f"{out}: {name} does not read back as written; check the disk")
        os.replace(part, out)
        size = back.size
        del back
        # The file leaves the page cache, so that the engine's first read brings it back in large pages.
        with open(out, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return size
    finally:
        part.unlink(missing_ok=True)


def show_progress(done, total):
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done / 1e6:.0f} of {total / 1e6:.0f} MB" if done < total else "\r\x1b[K")
        sys.stderr.flush()


# ---- the command -----------------------------------------------------------------------------------------------------


def export(checkpoint, out, tokenizer_only, force=False, adapter=None, adapted=None):
    """Exports the checkpoint. Returns the lines of the summary."""
    if not checkpoint.exists():
        raise Failure(f"{checkpoint}: no such file or folder; give a Hugging Face folder or a .gguf file", 2)
    out = out.resolve() if out.is_symlink() else out  # the file that a link points to is written, not the link
    if out.is_symlink() or out.is_dir() or not out.parent.is_dir():
        raise Failure(f"{out}: not a file in an existing folder; give another output file", 2)
    if out.exists() and (out.resolve().parent == checkpoint.resolve() or out.resolve() == checkpoint.resolve()):
        raise Failure(f"{out}: would overwrite a file of the checkpoint; give another output file", 2)
    if out.exists() and not out.is_file():
        raise Failure(f"{out}: not a regular file; give the name of a file to write", 2)
    if out.exists() and not force:
        raise Failure(f"{out}: is there already; add --force to overwrite it, or give another output file", 2)
    if not checkpoint.is_dir() and checkpoint.suffix != ".gguf":
        raise Failure(f"{checkpoint}: neither a folder nor a .gguf file; give a Hugging Face folder or a .gguf file", 2)
    folder = checkpoint.is_dir()
    if not folder and not checkpoint.is_file():
        raise Failure(f"{checkpoint}: not a regular file; give a Hugging Face folder or a .gguf file", 2)
    source = (read_folder if folder else read_gguf)(checkpoint, tokenizer_only)
    merged, entries_adapted = [], [parse_adapted(text) for text in adapted or ()]
    if adapter is not None:
        if tokenizer_only:
            raise Failure("--adapter: has no meaning with --tokenizer-only; leave one out", 2)
        if not adapter.is_dir():
            raise Failure(f"{adapter}: no such folder; give a LoRA adapter as PEFT's save_pretrained writes it", 2)
        tensors, adapter_config, changed = merge_adapter(adapter, source.tensors)
        source = source._replace(tensors=tensors)
        entries_adapted = entries_adapted or adapter_config.get("speed_adapted") or []
        merged = [f"adapter: {one_line(adapter.name)}, merged into {changed} weights"]
    if entries_adapted:
        source.config["speed_adapted"] = entries_adapted
    tokenizer, extra = source.tokenizer, source.extra
    name = one_line(checkpoint.resolve().name if folder else re.sub(r"-\d{5}-of-\d{5}$", "", checkpoint.stem))
    rounding, notes = Rounding(), []
    if tokenizer_only:
        config, weights = tokenizer_config(source.config, source.generation, tokenizer, name, notes), {}
    else:
        config = check_config(source.config, source.generation, name, tokenizer, notes)
        weights = select_tensors(config, source.tensors, extra)
    beyond = tokenizer.leave_out_beyond(config["vocab_size"])
    if beyond:
        notes.append(
            f"tokenizer: {len(beyond)} added tokens have no row in the embedding, and are left out: "
            f"{', '.join(beyond[:5])}{', ...' if len(beyond) > 5 else ''}"
        )
    chat = recognise_chat(tokenizer, beyond)
    words = tokenizer.tensors(config["vocab_size"])
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config),
        "tokenizer": json.dumps(tokenizer.metadata()),
        "chat": json.dumps(chat),
    }
    # The widest dtypes come first, so that every tensor is aligned.
    entries = [Entry(n, "U32", words[n].shape, [words[n]]) for n in ("tokenizer.offsets", "tokenizer.merges")]
    entries += [Entry(n, "F32", x.shape, [x]) for n, x in extra.items()]
    entries += [
        Entry(n, "BF16", shape, weight_chunks(n, shape, rows, config["head_dim"], rounding))
        for n, (shape, rows) in weights.items()
    ]
    entries += [Entry("tokenizer.bytes", "U8", words["tokenizer.bytes"].shape, [words["tokenizer.bytes"]])]
    size = write_file(out, metadata, entries)

    return [
        f"wrote {out}: {size / 1e6:.1f} MB, {len(entries)} tensors",
        f"read: {', '.join(source.files)}",
        *summary(config, tokenizer, chat, rounding, extra),
        *merged,
        *map(one_line, notes),
    ]


def summary(c, tokenizer, chat, rounding, extra):
    if "tokenizer_only" not in c:
        scaling = f", llama3 scaling by {c['rope_scaling']['factor']:g}" if c["rope_scaling"] else ""
        scaling += ", with frequency divisors" if extra else ""
        head = "tied" if c["tie_word_embeddings"] else "untied"
        yield (
            f"model: {c['name']}, {c['num_hidden_layers']} layers, hidden {c['hidden_size']}, "
            f"{c['num_attention_heads']} query and {c['num_key_value_heads']} KV heads of {c['head_dim']}, "
            f"MLP {c['intermediate_size']}, {head} head, RoPE theta {c['rope_theta']:g}{scaling}, "
            f"context {c['max_position_embeddings']}"
        )
        if c["swiftkv"]:
            kept = "kept" if c["swiftkv"]["original_projections"] else "absent"
            yield (
                f"SwiftKV: from layer {c['swiftkv']['num_key_value_layers']} up, groups of "
                f"{c['swiftkv']['key_value_group_size']}, ordinary projections {kept}"
            )
        yield f"weights: {rounding}"
    yield (
        f"tokenizer: {c['vocab_size']} tokens, {len(tokenizer.merges)} merges, {len(tokenizer.special)} special, "
        f"{len(tokenizer.plain)} added, BoS {c['bos_token_id']}, EoS {c['eos_token_id']}"
    )
    if chat is None:
        yield "chat template: none"
    elif "refused" in chat:
        yield f"chat template: --chat will not work: {chat['refused']}"
    else:
        yield f"chat template: its answers begin with {chat['template']}"


def main(arguments):
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Failure(f"command line: {message}; see --help", 2)

    parser = Parser(
        prog="export_weights.py",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="Hugging Face folder or .gguf file")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path, help="file to write")
    parser.add_argument("--tokenizer-only", action="store_true", help="no weights, for `speed tokenize` and `info`")
    parser.add_argument("--adapter", metavar="FOLDER", type=Path, help="merge this LoRA adapter into the weights")
    parser.add_argument(
        "--adapted", metavar="POLICY[:K]", action="append", help="what it was trained for: speed:20; speed for any K"
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it is there")
    try:
        options = parser.parse_args(arguments)
        with np.errstate(all="ignore"):  # bad numbers are found and reported here; numpy need not warn of them too
            o = options
            summary = export(o.checkpoint, o.out, o.tokenizer_only, o.force, o.adapter, o.adapted)
    except Failure as failure:
        return fail(failure, failure.code)
    except OSError as error:
        return fail(
            f"{error.filename or options.out}: {error.strerror or error}; free the space or the permission it "
            "needs, nothing was written"
        )
    except (MemoryError, RecursionError):
        return fail(
            f"{options.checkpoint}: it takes more memory than there is; get the file again if it is not that "
            "large, nothing was written"
        )
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # The checkpoint holds a value of a type that no checkpoint has there.
        return fail(
            f"{options.checkpoint}: not as a checkpoint should be ({type(error).__name__}: "
            f"{str(error)[:200]}); get it again"
        )
    except KeyboardInterrupt as stop:
        return fail("interrupted; nothing was written", 128 + (stop.args or (signal.SIGINT,))[0])
    try:
        print("\n".join(summary), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries to write again when it ends
        return fail(f"standard output: {error.strerror}; check where it goes, {options.out} is written")
    return 0


def fail(why, code=1):
    print(f"export_weights.py: {one_line(why)}", file=sys.stderr)
    return code


def stop(number, _):
    for other in STOPS:
        signal.signal(other, signal.SIG_IGN)  # a second signal must not stop the cleaning up
    raise KeyboardInterrupt(number)


STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP

if __name__ == "__main__":
    for each in STOPS:
        if signal.getsignal(each) == signal.SIG_DFL:  # the parent process may have set it to be ignored
            signal.signal(each, stop)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a closed pipe ends it silently
    sys.exit(main(sys.argv[1:]))
