"""Tests of export_weights.py and checkpoint/: round trips, refused features, hostile files, and no output file after a
failure.

Needs numpy and jinja2. The GGUF tests need gguf, and are skipped without it.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import ClassVar
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "hf")]
import chat_templates  # noqa: E402

import export_weights  # noqa: E402
import random_models  # noqa: E402
from checkpoint import files, gguf_file  # noqa: E402
from checkpoint.chat import TEMPLATE_LIMIT, recognise_chat  # noqa: E402
from checkpoint.config import check_config, expected_tensors  # noqa: E402
from checkpoint.failure import Failure  # noqa: E402
from checkpoint.pattern import check_pattern  # noqa: E402
from checkpoint.tokenizer import DIGIT, GPT2_SPLIT, LLAMA3_SPLIT, Tokenizer  # noqa: E402

try:
    import gguf
except ImportError:
    gguf = None

START_BYTES = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
DROP = object()  # as a value: remove the key
SMALL = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=19,
    vocab_size=275,
    rope_theta=500000.0,
    rope_scaling=random_models.LLAMA3,
)
SWIFTKV = dict(SMALL, num_hidden_layers=5, num_key_value_layers=2, key_value_group_size=2)


def export(*arguments):
    """(exit code, stdout, stderr) of the exporter, run in this process. No input may take it more than 5 seconds."""
    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = export_weights.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    if time.process_time() - began > 5:
        raise AssertionError(f"{time.process_time() - began:.1f} s of processor time: {arguments}")
    return code, out.getvalue(), err.getvalue()


def tearDownModule():
    """No input may make the exporter use much memory. The valid ones here need a few MB."""
    took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - START_BYTES
    if took > 256 << 20:
        raise AssertionError(f"the tests took {took >> 20} MB")


def change(target, changes):
    """A copy of a nested dict with the values at paths like "model.type" replaced."""
    target = copy.deepcopy(target)
    for path, value in changes.items():
        *parents, last = path.split(".")
        at = target
        for key in parents:
            at = at[int(key) if isinstance(at, list) else key]
        if value is DROP:
            del at[last]
        else:
            at[int(last) if isinstance(at, list) else last] = value
    return target


class Case(unittest.TestCase):
    def setUp(self):
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        self.checkpoint, self.out = self.folder / "model", self.folder / "out.safetensors"

    def tearDown(self):
        self.scratch.cleanup()

    def write(self, spec=None, dtype="F32", seed=5):
        return random_models.write_checkpoint(self.checkpoint, spec or SMALL, seed, dtype)

    def rewrite(self, name, changes):
        path = self.checkpoint / name
        path.write_text(json.dumps(change(json.loads(path.read_text()), changes)))

    def accept(self, *more):
        code, out, err = export(self.checkpoint, self.out, "--force", *more)
        self.assertEqual((code, err), (0, ""))
        return files.Safetensors(self.out), out

    def survive(self, *more):
        """The exporter accepts the checkpoint, or says why not in one line and writes no file. Returns what it said."""
        code, _, err = export(self.checkpoint, self.out, *more)
        if code:
            self.assertEqual(code, 1, err)
            self.assertRegex(err, r"\Aexport_weights\.py: [^\n]+: [^\n]+\n\Z")
            self.assertFalse(self.out.exists())
        else:
            self.out.unlink()
        return err

    def refuse(self, word, code=1, arguments=None):
        """The exporter says `word` in one line, exits with `code` and writes no file."""
        before = sorted(self.folder.iterdir())
        got, out, err = export(*((self.checkpoint, self.out, "--force") if arguments is None else arguments))
        self.assertEqual(out, "")
        self.assertRegex(err, r"\Aexport_weights\.py: [^\n]+: [^\n]+; [^\n]+\n\Z")
        self.assertIn(word, err)
        self.assertEqual(got, code, err)
        self.assertEqual(sorted(self.folder.iterdir()), before)


def meta(file, key):
    return json.loads(file.metadata[key])


class RoundTrip(Case):
    def test_weights_keep_every_bit_in_each_dtype(self):
        expected = random_models.random_tensors(random_models.base_config(SMALL), 5)
        for dtype in ("F32", "F16", "BF16"):
            self.write(dtype=dtype)
            if dtype == "F16":  # bf16 has a wider range, so compare with the values that F16 holds
                expected = {
                    name: random_models.to_bf16(x.astype(np.float16).astype(np.float32)) for name, x in expected.items()
                }
            if dtype == "BF16":
                expected = random_models.random_tensors(random_models.base_config(SMALL), 5)
            file, _ = self.accept()
            for name, x in expected.items():
                np.testing.assert_array_equal(file.array(name), (x.view(np.uint32) >> 16).astype(np.uint16), name)

    def test_layout(self):
        self.write()
        file, out = self.accept()
        raw = self.out.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        self.assertEqual(start % 64, 0)
        self.assertEqual(set(file.metadata), {"format", "config", "tokenizer", "chat", "sha256"})
        self.assertEqual(file.metadata["sha256"], hashlib.sha256(raw[start:]).hexdigest())
        self.assertEqual(file.metadata["format"], "speed 1")
        dtypes = [t.dtype for t in sorted(file.tensors.values(), key=lambda t: t.begin)]
        self.assertEqual(dtypes, sorted(dtypes, key=["U32", "F32", "BF16", "U8"].index))
        self.assertIn("275 tokens", out)
        self.assertIn("read: model.safetensors, tokenizer.json, tokenizer_config.json, config.json\n", out)
        self.assertIn("chat template: its answers begin with <|start_header_id|>assistant<|end_header_id|>\n", out)

    def test_config(self):
        self.write()
        config = meta(self.accept()[0], "config")
        self.assertEqual(
            config,
            {
                "name": "model",
                "vocab_size": 275,
                "hidden_size": 24,
                "intermediate_size": 19,
                "num_hidden_layers": 2,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 4,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 512,
                "tie_word_embeddings": False,
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "bos_token_id": 269,
                "eos_token_id": [270, 273],
                "swiftkv": None,
                "adapted": [],
            },
        )

    def test_missing_keys_take_hugging_face_defaults(self):
        self.write(dict(SMALL, num_key_value_heads=6, rope_scaling=None))
        self.rewrite(
            "config.json",
            dict.fromkeys(
                (
                    "rms_norm_eps",
                    "max_position_embeddings",
                    "tie_word_embeddings",
                    "bos_token_id",
                    "eos_token_id",
                    "hidden_act",
                    "rope_theta",
                    "num_key_value_heads",
                    "head_dim",
                    "architectures",
                    "model_type",
                ),
                DROP,
            ),
        )
        config = meta(self.accept()[0], "config")
        self.assertEqual(
            [
                config[key]
                for key in (
                    "rms_norm_eps",
                    "max_position_embeddings",
                    "bos_token_id",
                    "eos_token_id",
                    "rope_theta",
                    "num_key_value_heads",
                    "head_dim",
                )
            ],
            [1e-6, 2048, 269, [270], 10000.0, 6, 4],
        )

    def test_transformers_5_writes_rope_parameters(self):
        self.write()
        published = meta(self.accept()[0], "config")
        self.rewrite(
            "config.json",
            {
                "rope_theta": DROP,
                "rope_scaling": DROP,
                "rope_parameters": {**random_models.LLAMA3, "rope_theta": 500000.0},
            },
        )
        self.assertEqual(meta(self.accept()[0], "config"), published)

    def test_original_length_defaults_to_the_context(self):
        self.write()
        self.rewrite("config.json", {"rope_scaling.original_max_position_embeddings": DROP})
        self.assertEqual(meta(self.accept()[0], "config")["rope_scaling"]["original_max_position_embeddings"], 512)

    def test_generation_config_adds_stop_tokens(self):
        self.write()
        (self.checkpoint / "generation_config.json").write_text('{"eos_token_id": [273, 274]}')
        self.assertEqual(meta(self.accept()[0], "config")["eos_token_id"], [270, 273, 274])

    def test_adapted(self):
        self.write()
        pop = {"policy": "pop", "k": None, "bos": True}
        self.rewrite("config.json", {"speed_adapted": [{"policy": "speed", "k": 1}, pop]})
        self.assertEqual(meta(self.accept()[0], "config")["adapted"], [{"policy": "speed", "k": 1, "bos": True}, pop])
        for wrong in ({"policy": "sped"}, {"policy": "speed", "k": 3}, {"policy": "speed", "k": 0}, "speed"):
            self.rewrite("config.json", {"speed_adapted": [wrong]})
            self.refuse("speed_adapted")

    def shard(self):
        file = files.Safetensors(self.checkpoint / "model.safetensors")
        names = list(file.tensors)
        where = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
        for shard in set(where.values()):
            random_models.write_safetensors(
                self.checkpoint / shard, {name: file.array(name) for name in names if where[name] == shard}
            )
        (self.checkpoint / "model.safetensors").unlink()
        (self.checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return where

    def test_shards(self):
        self.write()
        self.accept()
        whole = self.out.read_bytes()
        self.shard()
        self.accept()
        self.assertEqual(self.out.read_bytes(), whole)
        (self.checkpoint / "model.safetensors.index.json").unlink()
        self.accept()
        self.assertEqual(self.out.read_bytes(), whole)
        self.out.unlink()

    def test_broken_shards(self):
        self.write()
        where = self.shard()
        index = self.checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": "../x.safetensors"}}))
        self.refuse("weight_map")
        index.write_text(json.dumps({"weight_map": {**where, "model.norm.weight": "absent.safetensors"}}))
        self.refuse("absent.safetensors: no such file")
        index.write_text(json.dumps({"weight_map": {**where, "model.more.weight": where["model.norm.weight"]}}))
        self.refuse("model.more.weight is not in")
        index.unlink()
        random_models.write_safetensors(
            self.checkpoint / "more.safetensors", {"model.norm.weight": np.ones(24, np.float32)}
        )
        self.refuse("in two files", 2)

    def test_tied_head(self):
        self.write(dict(SMALL, tie_word_embeddings=True))
        self.assertNotIn("lm_head.weight", self.accept()[0].tensors)
        tensors = random_models.random_tensors(random_models.base_config(dict(SMALL, tie_word_embeddings=True)), 5)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.assertNotIn("lm_head.weight", self.accept()[0].tensors)
        self.out.unlink()
        tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.refuse("tie_word_embeddings")

    def test_rotary_buffers_of_old_checkpoints_are_left_out(self):
        self.write()
        tensors = random_models.random_tensors(random_models.base_config(SMALL), 5)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.accept()

    def test_tokenizer_tensors(self):
        self.write()
        file, _ = self.accept()
        offsets, data = file.array("tokenizer.offsets"), file.array("tokenizer.bytes").tobytes()
        words = [data[offsets[i] : offsets[i + 1]] for i in range(275)]
        self.assertEqual(words[:256], [bytes([i]) for i in range(256)])
        self.assertEqual(
            words[256:258] + words[268:271], [b"th", b"the", b" and", b"<|begin_of_text|>", b"<|end_of_text|>"]
        )
        self.assertEqual(words[274:], [b""])
        merges = file.array("tokenizer.merges")
        self.assertEqual(merges.shape, (13, 3))
        for left, right, merged in merges:
            self.assertEqual(words[left] + words[right], words[merged])
        self.assertEqual(
            meta(file, "tokenizer"),
            {
                "split": [LLAMA3_SPLIT],
                "ignore_merges": True,
                "special": [[269 + i, text] for i, text in enumerate(random_models.SPECIAL)],
            },
        )

    def test_tokenizer_only(self):
        self.write()
        (self.checkpoint / "model.safetensors").unlink()
        file, _ = self.accept("--tokenizer-only")
        self.assertEqual(set(file.tensors), {"tokenizer.bytes", "tokenizer.offsets", "tokenizer.merges"})
        self.assertEqual(
            meta(file, "config"),
            {
                "name": "model",
                "vocab_size": 275,
                "bos_token_id": 269,
                "eos_token_id": [270, 273],
                "tokenizer_only": True,
            },
        )
        (self.checkpoint / "config.json").unlink()
        file, _ = self.accept("--tokenizer-only")
        self.assertEqual(
            meta(file, "config"),
            {"name": "model", "vocab_size": 274, "bos_token_id": 269, "eos_token_id": [270], "tokenizer_only": True},
        )


class WhichFileCounts(Case):
    def summary(self, *more):
        file, out = self.accept(*more)
        return file, meta(file, "config"), out

    def test_the_single_file_beats_an_index(self):
        self.write()
        self.accept()
        whole = self.out.read_bytes()
        index = self.checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
        self.accept()
        self.assertEqual(self.out.read_bytes(), whole)
        other = random_models.random_tensors(random_models.base_config(SMALL), 6)
        random_models.write_safetensors(self.checkpoint / "other.safetensors", other)
        index.write_text(json.dumps({"weight_map": dict.fromkeys(other, "other.safetensors")}))
        _, _, out = self.summary()
        self.assertEqual(self.out.read_bytes(), whole)
        self.assertIn("read: model.safetensors, tokenizer.json,", out)
        (self.checkpoint / "model.safetensors").unlink()
        self.assertIn("read: other.safetensors, tokenizer.json,", self.summary()[2])
        self.assertNotEqual(self.out.read_bytes(), whole)

    def test_bos_and_eos(self):
        self.write()
        settings = json.loads((self.checkpoint / "tokenizer_config.json").read_text())
        both = {"bos_token_id": 271, "eos_token_id": [272, 273]}
        for config, generation_config, tokens, bos, eos in (
            ({}, both, {"eos_token": "<|eot_id|>"}, 271, [272, 273]),
            ({}, {}, {}, 269, [270]),
            ({}, {}, {"bos_token": None, "eos_token": None}, 1, [2]),
            ({"bos_token_id": None, "eos_token_id": None}, {}, {"bos_token": None, "eos_token": None}, None, []),
            ({"bos_token_id": 272, "eos_token_id": 271}, {}, {"eos_token": "<|eot_id|>"}, 272, [271, 273]),
            ({"bos_token_id": 269, "eos_token_id": [-1, 270, 275]}, {}, {}, 269, [270]),
            ({"bos_token_id": 269, "eos_token_id": 270}, {"eos_token_id": [-1, 274]}, {}, 269, [270, 274]),
        ):
            self.rewrite("config.json", {"bos_token_id": 0, "eos_token_id": 0})
            self.rewrite("config.json", {"bos_token_id": DROP, "eos_token_id": DROP})
            self.rewrite("config.json", config)
            (self.checkpoint / "generation_config.json").write_text(json.dumps(generation_config))
            (self.checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, **tokens}))
            with self.subTest(config=config, generation=generation_config, tokens=tokens):
                _, got, out = self.summary()
                self.assertEqual((got["bos_token_id"], got["eos_token_id"]), (bos, eos))
                self.assertEqual("Hugging Face's default" in out, bos == 1)
                self.assertEqual("left out" in out, "-1" in str(config) + str(generation_config))

    def test_special_tokens_map(self):
        """It counts only where tokenizer_config.json does not list the added tokens itself."""
        self.write()
        settings = json.loads((self.checkpoint / "tokenizer_config.json").read_text())
        self.rewrite("config.json", {"bos_token_id": DROP, "eos_token_id": DROP})
        path = self.checkpoint / "special_tokens_map.json"
        path.write_text(json.dumps({"bos_token": "<|end_of_text|>", "eos_token": {"content": "<|eot_id|>"}}))
        _, config, out = self.summary()
        self.assertEqual((config["bos_token_id"], config["eos_token_id"]), (270, [273]))
        self.assertIn("special_tokens_map.json", out)
        settings["added_tokens_decoder"] = {"273": {"content": "<|eot_id|>", "special": True}}
        (self.checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
        _, config, out = self.summary()
        self.assertEqual((config["bos_token_id"], config["eos_token_id"]), (269, [270]))
        self.assertNotIn("special_tokens_map.json", out)

    def test_what_changes_no_result_is_left_out(self):
        self.write(dict(SMALL, rope_scaling=None))
        self.accept()
        whole = self.out.read_bytes()
        for scaling in ({"type": "linear", "factor": 1.0}, {"rope_type": "none"}, {"rope_type": None}, {}):
            self.rewrite("config.json", {"rope_scaling": scaling})
            self.accept()
            self.assertEqual(self.out.read_bytes(), whole)
        self.rewrite("config.json", {"layer_types": ["full_attention"] * 2, "kv_sharing_map": None, "my_note": "x"})
        self.assertIn("my_note is not known, and left out", self.summary()[2])
        self.assertEqual(self.out.read_bytes(), whole)
        tensors = random_models.random_tensors(random_models.base_config(SMALL), 5)
        for name in (
            "model.layers.0.self_attn.rotary_emb.cos_cached",
            "model.rotary_emb.inv_freq",
            "model.layers.1.self_attn.masked_bias",
            "model.layers.1.self_attn.bias",
        ):
            tensors[name] = np.ones((2, 3), np.float32)
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.accept()
        self.assertEqual(self.out.read_bytes(), whole)

    def test_a_token_without_a_row_is_left_out(self):
        self.write()
        self.accept()
        before = meta(files.Safetensors(self.out), "tokenizer")
        data = random_models.tokenizer_json()
        data["added_tokens"] += [{"id": 275, "content": "<pad>", "special": True}]
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        file, _, out = self.summary()
        self.assertIn("1 added tokens have no row in the embedding, and are left out: <pad>", out)
        self.assertEqual(meta(file, "tokenizer"), before)
        data["added_tokens"][-1]["id"] = 274
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        file, _, out = self.summary()
        self.assertNotIn("left out", out)
        self.assertEqual(meta(file, "tokenizer")["special"][-1], [274, "<pad>"])

    def test_added_tokens_that_are_not_special(self):
        self.write()
        data = random_models.tokenizer_json()
        data["added_tokens"] += [{"id": 274, "content": "<think>", "special": False}]
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        file, _, out = self.summary()
        self.assertEqual(meta(file, "tokenizer")["added"], [[274, "<think>"]])
        self.assertEqual(len(meta(file, "tokenizer")["special"]), 5)
        self.assertIn("5 special, 1 added", out)
        # Special is a token if either file says so.
        settings = json.loads((self.checkpoint / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"] = {"274": {"content": "<think>", "special": True}}
        (self.checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
        self.assertNotIn("added", meta(self.summary()[0], "tokenizer"))

    def test_tokens_in_plain_letters(self):
        self.write()
        data = random_models.tokenizer_json()
        data["model"]["vocab"]["\u3042"] = 274
        data["model"]["merges"] = [*data["model"]["merges"], "\u3042 t"]
        data["model"]["vocab"]["\u3042t"] = 275
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        self.rewrite("config.json", {"vocab_size": 276})
        file, _ = self.accept("--tokenizer-only")
        self.assertEqual(meta(file, "tokenizer")["unmatched"], [274, 275])
        self.assertEqual(file.array("tokenizer.merges").shape, (13, 3))

    def test_a_link_is_followed(self):
        self.write()
        self.accept()
        whole = self.out.read_bytes()
        target = self.folder / "target"
        target.write_bytes(b"older")
        self.out.unlink()
        self.out.symlink_to("target")
        self.refuse("--force", 2, (self.checkpoint, self.out))
        self.accept()
        self.assertTrue(self.out.is_symlink())
        self.assertEqual(target.read_bytes(), whole)
        target.unlink()
        export(self.checkpoint, self.out)
        self.assertEqual(target.read_bytes(), whole)


class SplitPatterns(Case):
    """tests/test_tokenizer.cpp gives the engine the same list."""

    def test_accepted_and_refused(self):
        list_ = json.loads((ROOT / "tests" / "patterns.json").read_text())
        self.assertGreater(len(list_["accepted"]), 30)
        self.assertGreater(len(list_["refused"]), 60)
        for pattern in list_["accepted"]:
            with self.subTest(pattern=pattern):
                check_pattern(pattern)
        for pattern in list_["refused"]:
            with self.subTest(pattern=pattern), self.assertRaisesRegex(Failure, "split pattern"):
                check_pattern(pattern)

    def test_caseless(self):
        r"""Within (?i: Oniguruma lets a ligature of \S stand for two letters; the engine does not."""
        for pattern in (r"(?i:[x-z\S]b)", r"(?i:\S)b", r"(?i:[^a]b)", r"(?i:\p{L})"):
            with self.subTest(pattern=pattern), self.assertRaisesRegex(Failure, r"within \(\?i:"):
                check_pattern(pattern)

    def test_by_name(self):
        self.write()
        for pattern, word in (
            (r"\p{Han}+", "general category"),
            (r"\b", "escape"),
            ("[[:alpha:]]", "[:"),
            ("a*", "empty"),
        ):
            self.rewrite("tokenizer.json", {"pre_tokenizer.pretokenizers.0.pattern.Regex": pattern})
            self.refuse(word)
        self.rewrite("tokenizer.json", {"pre_tokenizer.pretokenizers.0.pattern.Regex": r"\p{P}|[[a-z]&&[^q]]+|\w|\d"})
        self.accept()


class Adapters(Case):
    def write_adapter(self, changes=None, rank=3, dtype="F32", names=("q_proj", "v_proj", "down_proj")):
        folder = self.folder / "adapter"
        folder.mkdir(exist_ok=True)
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(names), "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps({**config, **(changes or {})}))
        rng, tensors = np.random.default_rng(1), {}
        for name, x in random_models.random_tensors(random_models.base_config(SMALL), 5).items():
            if name.split(".")[-2] in names:
                at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                tensors[at + "A.weight"] = random_models.to_bf16(rng.standard_normal((rank, x.shape[1])))
                tensors[at + "B.weight"] = random_models.to_bf16(rng.standard_normal((x.shape[0], rank)))
        random_models.write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
        return folder, tensors

    def test_merged(self):
        self.write()
        plain = random_models.random_tensors(random_models.base_config(SMALL), 5)
        for changes, scale in (
            ({}, 2.0),
            ({"use_rslora": True}, 6 / 3**0.5),
            ({"rank_pattern": {"q_proj": 3}, "r": 8, "alpha_pattern": {}}, None),
            ({"alpha_pattern": {"layers.1.self_attn.q_proj": 12}}, {"model.layers.1.self_attn.q_proj.weight": 4.0}),
        ):
            folder, lora = self.write_adapter(changes)
            if scale is None:
                self.refuse("rank", 1, (self.checkpoint, self.out, "--adapter", folder, "--force"))
                continue
            for dtype in ("F32", "BF16"):
                self.write_adapter(changes, dtype=dtype)
                file, out = self.accept("--adapter", folder)
                self.assertIn("adapter: adapter, merged into 6 weights", out)
                changed = 0
                for name, x in plain.items():
                    at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                    expected = x.astype(np.float64)
                    if at + "A.weight" in lora:
                        by = scale.get(name, 2.0) if isinstance(scale, dict) else scale
                        delta = lora[at + "B.weight"].astype(np.float64) @ lora[at + "A.weight"].astype(np.float64)
                        expected = expected + by * delta
                        changed += 1
                    got = (file.array(name).astype(np.uint32) << 16).view(np.float32)
                    # half a step of bf16, and the rounding of float32 sums
                    bound = 2.0**-8 * np.abs(expected) + 1e-5
                    self.assertTrue(np.all(np.abs(got - expected) <= bound), name)
                self.assertEqual(changed, 6)

    def test_what_it_was_trained_for(self):
        self.write()
        entry = {"policy": "speed", "k": 1, "bos": True}
        folder, _ = self.write_adapter({"speed_adapted": [entry]})
        adapted = lambda *more: meta(self.accept(*more)[0], "config")["adapted"]  # noqa: E731
        self.assertEqual(adapted("--adapter", folder), [entry])
        self.assertEqual(adapted(), [])
        self.assertEqual(adapted("--adapted", "speed:2"), [{**entry, "k": 2}])
        self.assertEqual(adapted("--adapted", "speed"), [{**entry, "k": None}])
        both = ("--adapted", "speed:1:no-bos", "--adapted", "pop")
        self.assertEqual(adapted(*both), [{**entry, "bos": False}, {"policy": "pop", "k": None, "bos": True}])
        self.out.unlink()
        for wrong, code in (("speed:x", 2), ("speed:1:2", 2), ("sped", 1), ("speed:3", 1)):
            self.refuse("adapted", code, (self.checkpoint, self.out, "--adapted", wrong))

    def test_refused_by_name(self):
        self.write()
        for changes, word in (
            ({"use_dora": True}, "DoRA"),
            ({"peft_type": "LOHA"}, "'LOHA'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"bias": "all"}, "biases"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out"),
            ({"some_new_method": 3}, "some_new_method"),
            ({"lora_alpha": None}, "lora_alpha"),
            ({"r": 4}, "rank 3"),
        ):
            folder, _ = self.write_adapter(changes)
            with self.subTest(changes=changes):
                self.refuse(word, 1, (self.checkpoint, self.out, "--adapter", folder))
        folder, tensors = self.write_adapter()
        path, first = folder / "adapter_model.safetensors", next(iter(tensors))
        for change, word in (
            ({first: tensors[first][:, 1:]}, "does not fit"),
            ({first: None}, "alone"),
            ({first.replace("lora_A", "lora_magnitude_vector"): tensors[first]}, "lora_magnitude_vector"),
            ({first.replace("layers.0", "layers.7"): tensors[first]}, "no weight of this base"),
            (dict.fromkeys(tensors), "no LoRA weights"),
        ):
            new = {n: x for n, x in {**tensors, **change}.items() if x is not None}
            random_models.write_safetensors(path, new)
            self.refuse(word, 1, (self.checkpoint, self.out, "--adapter", folder))
        path.unlink()
        self.refuse("adapter_model", 2, (self.checkpoint, self.out, "--adapter", folder))
        self.refuse("no such folder", 2, (self.checkpoint, self.out, "--adapter", self.folder / "absent"))
        self.refuse("--tokenizer-only", 2, (self.checkpoint, self.out, "--adapter", folder, "--tokenizer-only"))


class Rounding(unittest.TestCase):
    def test_nearest_even(self):
        rng = np.random.default_rng(1)
        x = rng.standard_normal(20000) * 10.0 ** rng.integers(-30, 30, 20000)
        ties = (rng.integers(0, 0x7F00, 5000, np.uint32) << 16 | 0x8000).view(np.float32)
        x = np.concatenate([x, [0.0, -0.0, 1e-40, -1e-45, 3.3e38, 2**-126], ties]).astype(np.float32)
        rounded = export_weights.Rounding()(x, "x")
        below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
        above = ((x.view(np.uint32) & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32).astype(np.float64)
        value = (rounded.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        to_below, to_above = abs(x - below), abs(above - x)
        even = (x.view(np.uint32) >> 16) % 2 == 0
        expected = np.where((to_below < to_above) | ((to_below == to_above) & even), below, above)
        np.testing.assert_array_equal(value, expected)

    def test_counts(self):
        rounding = export_weights.Rounding()
        rounding(np.array([1, 2, 1 + 2**-9, 4], np.float32), "x")
        self.assertEqual((rounding.values, rounding.changed), (4, 1))
        self.assertAlmostEqual(rounding.error2, 2.0**-18)
        self.assertIn("25.0 %", str(rounding))
        self.assertIn("nothing changed", str(export_weights.Rounding()))

    def test_what_bf16_cannot_hold(self):
        for x in (
            np.array([np.nan], np.float32),
            np.array([np.inf], np.float16),
            np.array([3.4e38], np.float32),
            np.array([0x7F80], np.uint16),
            np.array([0xFFC0], np.uint16),
        ):
            with self.assertRaisesRegex(Failure, "some.weight"):
                export_weights.Rounding()(x, "some.weight")


class SwiftKV(Case):
    def test_with_and_without_original_projections(self):
        for originals in (True, False):
            self.write(dict(SWIFTKV, original_projections=originals))
            file, out = self.accept()
            self.assertEqual(
                meta(file, "config")["swiftkv"],
                {"num_key_value_layers": 2, "key_value_group_size": 2, "original_projections": originals},
            )
            self.assertEqual(meta(file, "config")["adapted"], [{"policy": "swiftkv", "k": 2, "bos": True}])
            leaders = [i for i in range(5) if f"model.layers.{i}.self_attn.k_proj_swiftkv.weight" in file.tensors]
            self.assertEqual(leaders, [2, 4])
            self.assertEqual("model.layers.3.self_attn.k_proj.weight" in file.tensors, originals)
            self.assertIn("SwiftKV", out)

    def test_published_spellings(self):
        self.write(SWIFTKV)
        self.rewrite(
            "config.json",
            {"swiftkv": True, "model_type": "llama_swiftkv", "architectures": ["LlamaSwiftKVForCausalLM"]},
        )
        self.accept()
        # null: all layers have keys and values of their own, and the norm is not used
        self.write()
        self.rewrite("config.json", {"swiftkv": False, "num_key_value_layers": None, "key_value_group_size": None})
        tensors = random_models.random_tensors(random_models.base_config(SMALL), 5)
        tensors["model.norm_swiftkv.weight"] = np.ones(24, np.float32)
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.assertIsNone(meta(self.accept()[0], "config")["swiftkv"])

    def test_incomplete(self):
        self.write(SWIFTKV)
        tensors = random_models.random_tensors(random_models.base_config(SWIFTKV), 5)
        for name in (
            "model.layers.3.self_attn.k_proj.weight",
            "model.norm_swiftkv.weight",
            "model.layers.4.self_attn.v_proj_swiftkv.weight",
            "model.layers.3.self_attn.q_proj_swiftkv.weight",
        ):
            random_models.write_safetensors(
                self.checkpoint / "model.safetensors", {n: x for n, x in tensors.items() if n != name}
            )
            self.refuse(f"{name}: missing")
        tensors["model.layers.3.self_attn.k_proj_swiftkv.weight"] = np.ones((8, 24), np.float32)
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        self.refuse("model.layers.3.self_attn.k_proj_swiftkv.weight")
        for key, value in (("num_key_value_layers", 0), ("num_key_value_layers", 6), ("key_value_group_size", 0)):
            self.write(SWIFTKV)
            self.rewrite("config.json", {key: value})
            self.refuse(key)


class Refusals(Case):
    def test_features_of_the_config(self):
        for changes, word in (
            ({"attention_bias": True}, "attention_bias"),
            ({"mlp_bias": True}, "mlp_bias"),
            ({"sliding_window": 4096}, "sliding_window"),
            ({"hidden_act": "gelu"}, "'gelu'"),
            ({"model_type": "mistral"}, "'mistral'"),
            ({"architectures": ["LlamaForSequenceClassification"]}, "Sequence"),
            ({"quantization_config": {"bits": 4}}, "quantization_config"),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
            ({"kv_sharing_map": {"1": 0}}, "kv_sharing_map"),
            ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
            ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'"),
            ({"partial_rotary_factor": 0.5}, "partial"),
            ({"rope_interleaved": True}, "interleaved"),
            ({"bos_token_id": [1, 2]}, "several BoS"),
        ):
            self.write()
            self.rewrite("config.json", changes)
            self.refuse(word)

    def test_numbers_of_the_config(self):
        for key in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "rope_scaling.factor",
            "rope_scaling.low_freq_factor",
            "rope_scaling.original_max_position_embeddings",
        ):
            for value in (0, -1, 1e300, 10**30, "7", [], True):
                self.write()
                self.rewrite("config.json", {key: value})
                self.refuse(key.split(".")[-1])
        for key, value, word in (
            ("head_dim", 3, "even"),
            ("num_key_value_heads", 4, "divide"),
            ("bos_token_id", -1, "bos"),
            ("eos_token_id", [1.5], "eos"),
            ("hidden_size", 25, "expected"),
            ("rope_scaling.high_freq_factor", 1.0, "low_freq_factor"),
            ("rope_scaling", 8, "rope_scaling"),
        ):
            self.write()
            self.rewrite("config.json", {key: value})
            self.refuse(word)
        self.rewrite("config.json", {"hidden_size": 25, "head_dim": DROP})
        self.refuse("multiple")

    def test_config_is_not_json(self):
        self.write()
        for text, word in (
            (b'{"hidden_size": NaN}', "NaN"),
            (b'{"a": 1, "a": 2}', "twice"),
            (b"[" * 100000, "deep"),
            (b"[]", "object"),
            (b"\xff{}", "JSON"),
            (b"", "JSON"),
            (b'{"a": Infinity}', "Infinity"),
            (b'{"a":' * 100000, "deep"),
            (b'{"a": ' + b"9" * 10000 + b"}", "JSON"),
        ):
            (self.checkpoint / "config.json").write_bytes(text)
            self.refuse(word)

    def test_tensors(self):
        self.write()
        tensors = random_models.random_tensors(random_models.base_config(SMALL), 5)

        def rewritten(**changes):
            new = {**tensors, **{k.replace("__", "."): v for k, v in changes.items()}}
            random_models.write_safetensors(
                self.checkpoint / "model.safetensors", {n: x for n, x in new.items() if x is not None}
            )

        rewritten(model__layers__1__mlp__up_proj__weight=None)
        self.refuse("model.layers.1.mlp.up_proj.weight: missing")
        rewritten(model__layers__0__self_attn__q_proj__bias=np.ones(24, np.float32))
        self.refuse("model.layers.0.self_attn.q_proj.bias")
        rewritten(model__norm__weight=np.ones(23, np.float32))
        self.refuse("model.norm.weight: expected the shape [24] by the config, got [23]")
        for bad in (np.nan, np.inf):
            x = tensors["model.layers.1.mlp.down_proj.weight"].copy()
            x[3, 4] = bad
            rewritten(model__layers__1__mlp__down_proj__weight=x)
            self.refuse("model.layers.1.mlp.down_proj.weight: holds NaN")

    def test_features_of_the_tokenizer(self):
        clean = random_models.tokenizer_json()
        bert = {"type": "BertPreTokenizer"}
        for changes, word in (
            ({"model.type": "Unigram"}, "'Unigram'"),
            ({"model.merges": DROP}, "'BPE'"),
            ({"model.dropout": 0.1}, "dropout"),
            ({"model.byte_fallback": True}, "byte_fallback"),
            ({"model.end_of_word_suffix": "</w>"}, "end_of_word_suffix"),
            ({"normalizer": {"type": "NFC"}}, "'NFC'"),
            ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "'Lowercase'"),
            ({"pre_tokenizer": None}, "ByteLevel"),
            ({"pre_tokenizer": bert}, "'BertPreTokenizer'"),
            ({"pre_tokenizer.pretokenizers.0": bert}, "'BertPreTokenizer'"),
            ({"pre_tokenizer.pretokenizers.0.behavior": "Removed"}, "'Split'"),
            ({"pre_tokenizer.pretokenizers.0.invert": True}, "'Split'"),
            ({"pre_tokenizer.pretokenizers.0.pattern": {"String": " "}}, "'Split'"),
            ({"pre_tokenizer.pretokenizers.1.add_prefix_space": True}, "'ByteLevel'"),
            ({"pre_tokenizer.pretokenizers": [clean["decoder"], bert]}, "'ByteLevel'"),
            ({"decoder": {"type": "WordPiece"}}, "'WordPiece'"),
            ({"post_processor": {"type": "BertProcessing"}}, "'BertProcessing'"),
            (
                {
                    "post_processor": {
                        "type": "TemplateProcessing",
                        "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
                    }
                },
                "'TemplateProcessing'",
            ),
            ({"added_tokens.0.lstrip": True}, "lstrip"),
            ({"added_tokens.0.rstrip": True}, "rstrip"),
            ({"added_tokens.0.single_word": True}, "single_word"),
            ({"added_tokens.0.id": 5}, "clash"),
            ({"added_tokens.1.id": 269}, "clash"),
            ({"model.vocab.the": 300}, "vocab_size"),
            ({"added_tokens.1.content": "|>x", "added_tokens.1.normalized": True}, "normalized"),
            ({"added_tokens.1.content": "<|begin_of_text|><|", "added_tokens.1.normalized": True}, "normalized"),
            ({"added_tokens.0.content": ""}, "added token"),
            ({"added_tokens.0.id": "5"}, "added token"),
            ({"model.vocab": []}, "list"),
            ({"added_tokens": 3}, "int"),
            ({"model.vocab.the": 256}, "share it"),
            ({"model.vocab.the": -1}, "vocab"),
            ({"model.vocab.the": 1.5}, "vocab"),
            ({"model.merges.3": "a"}, "merge 3"),
            ({"model.merges.3": ["a", 1]}, "1"),
            ({"model.merges.3": "q z"}, "'qz'"),
            ({"model.merges.3": "t h"}, "twice"),
            ({"model.merges": 1}, "int"),
            ({"model.unk_token": "?", "model.vocab.Ā": DROP}, "unk_token"),
        ):
            self.write()
            (self.checkpoint / "tokenizer.json").write_text(json.dumps(change(clean, changes)))
            with self.subTest(changes=str(changes)):
                self.refuse(word)

    def test_accepted_tokenizers(self):
        digits = {"type": "Digits", "individual_digits": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        for changes, split in (
            ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]}}, [DIGIT, GPT2_SPLIT]),
            ({"pre_tokenizer": byte_level}, [GPT2_SPLIT]),
            ({"normalizer": {"type": "Sequence", "normalizers": []}}, [LLAMA3_SPLIT]),
            ({"model.merges": [m.split(" ") for m in random_models.MERGES]}, [LLAMA3_SPLIT]),
            ({"added_tokens.0.special": False, "added_tokens.0.normalized": True}, [LLAMA3_SPLIT]),
            (
                {
                    "post_processor": {
                        "type": "TemplateProcessing",
                        "single": [{"SpecialToken": {"id": "<|begin_of_text|>"}}, {"Sequence": {"id": "A"}}],
                    }
                },
                [LLAMA3_SPLIT],
            ),
        ):
            self.write()
            self.rewrite("tokenizer.json", changes)
            self.assertEqual(meta(self.accept()[0], "tokenizer")["split"], split)

    def test_command_line(self):
        self.write()
        self.refuse("required", 2, ())
        self.refuse("--what", 2, (self.checkpoint, self.out, "--what"))
        self.refuse("no such file or folder", 2, (self.folder / "absent", self.out))
        self.refuse("out.safetensors", 2, (self.checkpoint, self.folder / "absent" / "out.safetensors"))
        self.refuse("existing folder", 2, (self.checkpoint, self.folder))
        self.refuse("overwrite", 2, (self.checkpoint, self.checkpoint / "model.safetensors"))
        self.refuse(".gguf", 2, (self.checkpoint / "config.json", self.out))
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            self.write()
            (self.checkpoint / name).unlink()
            self.refuse("safetensors" if name.startswith("model") else name, 2)
        self.write()
        self.out.write_bytes(b"older")
        self.refuse("--force", 2, (self.checkpoint, self.out))
        self.assertEqual(self.out.read_bytes(), b"older")
        self.accept()
        self.out.unlink()
        code, out, err = export("--help")
        self.assertEqual((code, err), (0, ""))
        self.assertIn("--tokenizer-only", out)


class HostileSafetensors(Case):
    def test_truncated_anywhere(self):
        self.write()
        path = self.checkpoint / "model.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        for size in [*range(0, start, 17), *range(start - 3, start + 40), len(whole) - 1]:
            path.write_bytes(whole[:size])
            self.refuse("model.safetensors")
        path.write_bytes(whole + b"\0")
        self.refuse("the tensors end at byte")
        path.write_bytes((1 << 63).to_bytes(8, "little") + whole[8:])
        self.refuse("header says")

    def test_header(self):
        self.write()
        path = self.checkpoint / "model.safetensors"
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        second = "model.layers.0.input_layernorm.weight"
        c, d = header[second]["data_offsets"]
        for changes, word in (
            ({(second, "data_offsets"): [c - 4, d - 4]}, "overlap"),
            ({(second, "data_offsets"): [c + 4, d + 4]}, "gap"),
            ({(second, "data_offsets"): [c, d + 4]}, "needs 96 bytes, got 100"),
            ({(second, "data_offsets"): [d, c]}, "needs 96 bytes, got -96"),
            ({(second, "data_offsets"): [len(data), len(data) + 96]}, "gap"),
            ({(second, "data_offsets"): [-96, 0]}, "data_offsets"),
            ({(second, "data_offsets"): [c]}, "data_offsets"),
            ({(second, "data_offsets"): [c, 1.5]}, "data_offsets"),
            ({(second, "shape"): [25]}, "needs 100 bytes"),
            ({(second, "shape"): [-24]}, "shape"),
            ({(second, "shape"): [2**70]}, "shape"),
            ({(second, "shape"): "24"}, "shape"),
            ({(second, "shape"): [2**61, 2**61]}, "needs"),
            ({(second, "dtype"): "F16"}, "needs 48 bytes"),
            ({(second, "dtype"): "I64"}, "I64"),
            ({(second, "dtype"): None}, "None"),
            ({(second, "dtype"): ["F32"]}, "F32"),
            ({(second,): 7}, "expected the keys"),
            ({("__metadata__",): {"a": 1}}, "__metadata__"),
            ({("__metadata__",): []}, "__metadata__"),
        ):
            new = copy.deepcopy(header)
            for keys, value in changes.items():
                at = new
                for key in keys[:-1]:
                    at = at[key]
                at[keys[-1]] = value
            text = json.dumps(new).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + data)
            with self.subTest(word=word, changes=str(changes)):
                self.refuse(word)
        for text in (
            b"[]",
            b"{",
            b"",
            b"\xff",
            b'{"a": {}, "a": {}}',
            b'{"a":' * 50000 + b"1" + b"}" * 50000,
            b"[" * 10**6,
        ):
            path.write_bytes(len(text).to_bytes(8, "little") + text + data)
            self.refuse("model.safetensors: header")

    def test_random_damage_never_shows_a_stack_trace(self):
        self.write()
        path = self.checkpoint / "model.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        rng = np.random.default_rng(2)
        refused = 0
        for _ in range(300):
            damaged = bytearray(whole)
            for at in rng.integers(0, start, rng.integers(1, 4)):
                damaged[at] = rng.integers(0, 256)
            path.write_bytes(damaged)
            code, _, err = export(self.checkpoint, self.out)
            self.assertIn(code, (0, 1))
            if code:
                refused += 1
                self.assertRegex(err, r"\Aexport_weights\.py: [^\n]+\n\Z")
                self.assertFalse(self.out.exists())
            else:
                self.out.unlink()
        self.assertGreater(refused, 200)

    def test_random_damage_to_the_json_files(self):
        rng = np.random.default_rng(3)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            self.write()
            tree = json.loads((self.checkpoint / name).read_text())

            def places(node, path=()):
                items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
                for key, value in items:
                    yield (*path, key)
                    yield from places(value, (*path, key))

            spots = list(places(tree))
            for spot in [spots[i] for i in rng.permutation(len(spots))[:60]]:
                for wrong in (None, -1, "x", [], {}, 1e9, [None], {"a": None}):
                    new = copy.deepcopy(tree)
                    at = new
                    for key in spot[:-1]:
                        at = at[key]
                    at[spot[-1]] = wrong
                    (self.checkpoint / name).write_text(json.dumps(new))
                    with self.subTest(spot=spot, wrong=wrong):
                        self.survive("--tokenizer-only")


class HostileFolders(Case):
    def test_names_that_are_not_regular_files(self):
        self.write()
        (self.folder / "loop").symlink_to("loop")
        self.refuse("loop: no such file or folder", 2, (self.folder / "loop", self.out))
        self.refuse("model.safetensors", 2, (self.checkpoint, self.folder / "loop" / "model.safetensors"))
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            for make in (lambda path: path.symlink_to(path.name), os.mkfifo, Path.mkdir):
                self.write()
                (self.checkpoint / name).unlink()
                make(self.checkpoint / name)
                with self.subTest(name=name):
                    self.refuse(
                        "safetensors" if name.startswith("model") else name, 1 if name.startswith("model") else 2
                    )
                (self.checkpoint / name).rmdir() if make == Path.mkdir else (self.checkpoint / name).unlink()
        os.mkfifo(self.folder / "pipe.gguf")
        self.refuse("not a regular file", 2, (self.folder / "pipe.gguf", self.out))
        os.mkfifo(self.out)
        self.write()
        self.refuse("not a regular file", 2)

    def test_files_that_are_too_large(self):
        for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"):
            self.write()
            if "index" in name:
                (self.checkpoint / "model.safetensors").unlink()
            with open(self.checkpoint / name, "ab") as file:
                file.truncate(files.JSON_LIMIT + 1)
            self.refuse(f"{name}: larger than")
            (self.checkpoint / name).unlink()
        self.write()
        with open(self.checkpoint / "model.safetensors", "r+b") as file:
            file.write(((1 << 30) - 8).to_bytes(8, "little"))
            file.truncate(1 << 30)
        self.refuse("header says")

    def test_numbers_beyond_the_engine(self):
        for key, value in (
            ("vocab_size", (1 << 24) + 1),
            ("hidden_size", (1 << 17) + 1),
            ("num_attention_heads", 4097),
            ("num_key_value_heads", 4097),
            ("head_dim", 1026),
            ("intermediate_size", (1 << 20) + 1),
            ("max_position_embeddings", (1 << 30) + 1),
            ("num_hidden_layers", 4097),
            ("rms_norm_eps", 1.5),
            ("rope_theta", 0.5),
            ("rope_scaling.factor", 0.5),
            ("rope_scaling.low_freq_factor", 1e-7),
            ("rope_scaling.high_freq_factor", 1e7),
        ):
            self.write()
            self.rewrite("config.json", {key: value})
            self.refuse(key.split(".")[-1])

    def test_weight_map(self):
        self.write()
        (self.checkpoint / "model.safetensors").rename(self.checkpoint / "weights.safetensors")
        index = self.checkpoint / "model.safetensors.index.json"
        for file, word in (
            ("/etc/passwd", "outside"),
            ("../model.safetensors", "outside"),
            ("a/b", "outside"),
            ("..", "such file"),
            (".", "outside"),
            ("", "such file"),
            (7, "int"),
            (None, "NoneType"),
            ("\0", "such file"),
        ):
            index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
            with self.subTest(file=file):
                self.refuse(word)
        for text, word in (
            ('{"weight_map": []}', "list"),
            ('{"weight_map": 1}', "int"),
            ("{}", "weight_map"),
            ('{"weight_map": {}}', "no .safetensors file"),
        ):
            index.write_text(text)
            self.refuse(word, 2 if "{}}" in text else 1)

    def test_tokens_the_engine_would_refuse(self):
        for changes, word in (
            ({"model.vocab.Ã©": 268, "model.vocab.é": 274}, None),  # the letter é stands for the byte E9
            ({"model.vocab.あ": 268, "model.vocab.ãģĤ": 274}, None),  # the first is no token that a text becomes
            ({"added_tokens.0.content": "<" * 1025}, "1024"),
            ({"model.merges.3": "a "}, "merge 3"),
            ({"added_tokens.0.content": "the", "added_tokens.0.id": 257}, "holds an added token"),
            ({"model.vocab.th": "\ud800"}, "vocab"),
            ({"added_tokens.0.content": "\ud800"}, "surrogates"),
            ({"pre_tokenizer.pretokenizers.0.pattern.Regex": "a" * 4097}, "4096"),
            ({"pre_tokenizer.pretokenizers": 17 * [{"type": "Digits"}] + [{"type": "ByteLevel"}]}, "16"),
        ):
            self.write()
            data = change(random_models.tokenizer_json(), {k: v for k, v in changes.items() if "model.vocab" not in k})
            data["model"]["vocab"].update({k.split(".")[-1]: v for k, v in changes.items() if "model.vocab" in k})
            if 268 in changes.values():
                data["model"]["merges"].pop()
                del data["model"]["vocab"]["Ġand"]
            (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
            with self.subTest(changes=str(changes)[:100]):
                if word:
                    self.refuse(word)
                else:
                    self.accept()
                    self.out.unlink()

    def test_many_added_tokens_take_little_time(self):
        self.write()
        data = random_models.tokenizer_json()
        data["added_tokens"] += [{"id": 274 + i, "content": f"<{i}>", "normalized": False} for i in range(100000)]
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        self.assertIn("99999 added tokens have no row", self.accept()[1])
        self.out.unlink()
        for token in data["added_tokens"]:
            token["normalized"] = True
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(data))
        self.refuse("normalized")

    def test_messages_are_safe_for_a_terminal(self):
        self.checkpoint = self.folder / "a\x1b[2Jb\udcff"
        self.write()
        self.assertEqual(meta(self.accept()[0], "config")["name"], "a?[2Jb?")
        self.out.unlink()
        tensors = random_models.random_tensors(random_models.base_config(SMALL), 5)
        tensors["\x1b[31m\n" + 5000 * "x" + ".weight"] = np.ones(2, np.float32)
        random_models.write_safetensors(self.checkpoint / "model.safetensors", tensors)
        code, _, err = export(self.checkpoint, self.out)
        self.assertEqual(code, 1)
        self.assertRegex(err, r"\Aexport_weights\.py: .{1000}\.\.\..{1000}\n\Z")
        self.assertTrue(err[:-1].isprintable())

    def test_cut_short_while_it_is_read(self):
        self.write()
        path = self.checkpoint / "model.safetensors"
        chunks = export_weights.weight_chunks

        def cutting(*arguments):
            os.truncate(path, path.stat().st_size // 2)
            return chunks(*arguments)

        with mock.patch.object(export_weights, "weight_chunks", cutting):
            self.refuse("and did not before")


class NoHalfWrittenFile(Case):
    def test_interrupted(self):
        self.write()
        self.out.write_bytes(b"older")
        with mock.patch.object(export_weights, "weight_chunks", side_effect=KeyboardInterrupt):
            self.assertEqual(export(self.checkpoint, self.out, "--force")[0], 130)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["model", "out.safetensors"])
        self.assertEqual(self.out.read_bytes(), b"older")

    def test_interrupted_at_any_line_of_the_writing(self):
        self.write()
        self.accept()
        whole = self.out.read_bytes()

        def interrupt_at(line):
            left = [line]

            def trace(frame, event, _):
                if frame.f_code.co_filename in (export_weights.__file__, files.__file__) and event == "line":
                    left[0] -= 1
                    if left[0] == 0:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                return trace

            return trace, left

        write_file = export_weights.write_file
        for line in (*range(1, 400, 7), *range(400, 100000, 400)):
            self.out.write_bytes(b"older")
            trace, left = interrupt_at(line)

            def traced(*arguments, trace=trace):
                sys.settrace(trace)
                try:
                    return write_file(*arguments)
                finally:
                    sys.settrace(None)

            with mock.patch.object(export_weights, "write_file", traced):
                code, _, err = export(self.checkpoint, self.out, "--force")
            self.assertEqual(sorted(p.name for p in self.folder.iterdir()), ["model", "out.safetensors"])
            if left[0] > 0:  # the writing ended before this line
                self.assertEqual((code, self.out.read_bytes()), (0, whole))
                break
            self.assertEqual((code, err), (130, "export_weights.py: interrupted; nothing was written\n"))
            self.assertIn(self.out.read_bytes(), (b"older", whole))
        else:
            self.fail("the writing never ended")

    def test_signals(self):
        self.write()
        spec = dict(SMALL, intermediate_size=1 << 20)  # 600 MB of zeros in a sparse file
        self.rewrite("config.json", {"intermediate_size": 1 << 20})
        shapes, _ = expected_tensors(check_config(random_models.base_config(spec), {}, ""))
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * int(np.prod(shape))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(self.checkpoint / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            run = subprocess.Popen(
                [sys.executable, ROOT / "export_weights.py", self.checkpoint, self.out],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # A background job ignores the signal unless it is set to default.
                preexec_fn=lambda number=number: signal.signal(number, signal.SIG_DFL),
            )
            while not list(self.folder.glob(".*.part")):
                self.assertIsNone(run.poll())
                time.sleep(0.001)
            run.send_signal(number)
            run.send_signal(number)
            out, err = run.communicate()
            self.assertEqual(
                (run.returncode, out, err), (128 + number, "", "export_weights.py: interrupted; nothing was written\n")
            )
            self.assertEqual([p.name for p in self.folder.iterdir()], ["model"])

    def test_a_second_signal_does_not_stop_the_cleaning_up(self):
        with mock.patch.object(signal, "signal") as set_handler, self.assertRaises(KeyboardInterrupt):
            export_weights.stop(signal.SIGINT, None)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            set_handler.assert_any_call(number, signal.SIG_IGN)

    def test_standard_output(self):
        self.write()
        command = f"{sys.executable} {ROOT / 'export_weights.py'} {self.checkpoint} {self.out} --force"
        done = subprocess.run(command + " >/dev/full", shell=True, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Aexport_weights\.py: standard output: No space left[^\n]+ is written\n\Z")
        done = subprocess.run(command + " | true", shell=True, stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.stderr, "")
        self.assertTrue(self.out.exists())

    def test_disk_full(self):
        self.write()

        def limit():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

        done = subprocess.run(
            [sys.executable, ROOT / "export_weights.py", self.checkpoint, self.out],
            capture_output=True,
            preexec_fn=limit,
            text=True,
        )
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, r"\Aexport_weights\.py: [^\n]+out\.safetensors: File too large; [^\n]+\n\Z")
        self.assertEqual([p.name for p in self.folder.iterdir()], ["model"])

    def test_file_reads_back_wrong(self):
        self.write()
        with mock.patch.object(export_weights.zlib, "crc32", side_effect=range(10**6)):
            self.refuse("does not read back")


class ChatTemplates(Case):
    CHATML = chat_templates.CHATML_DEFAULT

    def recognised(self, template, bos="<|begin_of_text|>", special=chat_templates.SPECIAL):
        names = {"bos_token": bos, "eos_token": "</s>"} if bos else {}
        plain = dict(enumerate(chat_templates.PLAIN, 1000))
        return recognise_chat(Tokenizer({}, [], dict(enumerate(special)), plain, [], False, template, names))

    def refused(self, template, **more):
        return (self.recognised(template, **more) or {}).get("refused", "not refused")

    def test_forms_of_published_models(self):
        accepted = [name for name, (_, why) in chat_templates.TEMPLATES.items() if why is None]
        self.assertGreaterEqual(len(accepted), 30)
        for name, (template, why) in chat_templates.TEMPLATES.items():
            with self.subTest(name=name):
                chat = self.recognised(template)
                if why is None:
                    self.assertEqual(
                        list(chat), "template trim open system system_empty generation past date_default".split()
                    )
                else:
                    self.assertIn(why, chat.get("refused", "not refused"))

    def test_marks(self):
        sides = "system", "after_system", "user", "assistant"
        both = dict.fromkeys(sides, "both")

        def header(role):
            return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

        dated = "Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n"
        begin, eot, user, answer = "<|begin_of_text|>", "<|eot_id|>", header("user"), header("assistant")
        expected = {
            "template": "<|start_header_id|>assistant<|end_header_id|>",
            "trim": both,
            "open": begin + header("system") + dated + eot + user,
            "system": [begin + header("system") + dated, eot + user],
            "system_empty": None,
            "generation": [eot, answer],
            "past": [eot + answer, eot + user],
            "date_default": "26 Jul 2024",
        }
        forms = {name: self.recognised(template) for name, (template, _) in chat_templates.TEMPLATES.items()}
        self.assertEqual(forms["llama-3.1"], expected)
        self.assertEqual(forms["llama-3.2"], expected)
        self.assertEqual(forms["llama-3.1, another date"], {**expected, "date_default": "26 July 2024"})
        self.assertEqual(forms["llama-3.1, untrimmed"], {**expected, "trim": dict.fromkeys(sides, "none")})
        fixed = forms["llama-3.1, no date of the user's"]
        self.assertEqual((fixed["open"], fixed["date_default"]), (expected["open"].format(date="26 Jul 2024"), None))
        self.assertEqual(forms["llama-3, left-trimmed users"]["trim"], dict.fromkeys(both, "left"))
        self.assertEqual(forms["llama-3, right-trimmed"]["trim"], dict.fromkeys(both, "right"))
        self.assertEqual(forms["chatml behind a BoS"]["open"], begin + forms["chatml"]["open"])
        self.assertEqual(forms["chatml, trimmed"]["trim"], both)
        self.assertEqual(forms["chatml, generation tag"], forms["chatml"])
        self.assertIn("You are a helpful assistant.", forms["chatml, default system"]["open"])
        self.assertEqual(forms["chatml, today's date"]["date_default"], "2024-07-26")
        self.assertEqual(forms["chatml, an empty system text is none"]["system_empty"], forms["chatml"]["open"])
        self.assertEqual(forms["chatml, thinking answers"]["generation"][1], "<|im_start|>assistant\n<think>\n")
        self.assertEqual(forms["distilled reasoning"]["generation"], ["", "<｜Assistant｜><think>\n"])
        self.assertEqual(forms["distilled reasoning"]["past"][0], "<｜Assistant｜>")
        self.assertEqual(forms["tulu"]["past"], ["\n<|assistant|>\n", "</s>\n<|user|>\n"])
        self.assertEqual(forms["angle brackets and </s>"]["generation"], ["</s>\n", "<|assistant|>\n"])
        self.assertEqual(forms["an end where nobody answers"]["generation"], ["<|end|>\n", "<|assistant|>\n"])
        self.assertEqual(forms["square brackets"]["generation"], [" [/INST]", ""])
        self.assertEqual(forms["square brackets"]["system"][0], "<|begin_of_text|>[INST] <<SYS>>\n")
        self.assertIsNone(forms["start of turn"]["system"])

    def test_without_a_bos_token(self):
        with_bos = "{{ bos_token }}" + self.CHATML  # Hugging Face then renders it as ""
        self.assertEqual(self.recognised(with_bos, bos=None), self.recognised(self.CHATML))

    def test_marks_of_ordinary_text(self):
        self.assertEqual(self.recognised(self.CHATML, special=[]), self.recognised(self.CHATML))

    def test_added_tokens_across_marks_and_contents(self):
        chat = self.recognised(self.CHATML)
        texts = chat_templates.SPECIAL
        for odd in ("r\nHi", "user\nHi.<|im_end|>", ".<|im_end|>"):
            self.assertIn("overlap", self.refused(self.CHATML, special=[*texts, odd]))
        self.assertEqual(self.recognised(self.CHATML, special=[*texts, "<|im", "im_end"]), chat)

    def test_no_template(self):
        for template in (None, ""):
            self.assertIsNone(self.recognised(template))
        for template, why in (
            ("{% broken", "is no template"),
            ("{{ messages }}", "it "),
            ("{{ raise_exception('no') }}", "fails on a plain question"),
            ("{{ 1 / 0 }}", "fails on a plain question"),
            ("{{ ''.__class__.__mro__ }}", "fails"),
            ("{% for i in range(10**9) %}{% endfor %}", "fails"),
            ("{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}{{ messages[0].content }}", "second question"),
            (self.CHATML + "{date}", "{date}"),
        ):
            with self.subTest(template=template):
                self.assertIn(why, self.refused(template))

    def test_a_token_that_the_model_does_not_have(self):
        self.write()
        tokenizer = json.loads((self.checkpoint / "tokenizer.json").read_text())
        tokenizer["added_tokens"][4]["id"] = 300  # <|eot_id|>
        (self.checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
        file, out = self.accept()
        self.assertIn("1 added tokens have no row in the embedding, and are left out: <|eot_id|>", out)
        self.assertIn("needs <|eot_id|>", meta(file, "chat")["refused"])
        self.assertIn("--chat will not work", out)

    def test_hostile(self):
        """A template that runs for ever, takes all memory or renders too much is refused."""
        loop = "{% for i in range(99999) %}"
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        with mock.patch.multiple("checkpoint.chat", TEMPLATE_SECONDS=1, TEMPLATE_MEMORY=128 << 20):
            for template in (
                8 * loop + 8 * "{% endfor %}",
                "{{ 9 ** 9 ** 9 }}",
                "{{ 'a' * 10 ** 12 }}",
                "{% set ns = namespace(s='a') %}" + loop + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
                loop + 999 * "x" + "{% endfor %}",
                "{{ " + 10000 * "(" + "1" + 10000 * ")" + " }}",
                1000 * "{% if 1 %}" + 1000 * "{% endif %}",
                "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
                "x" * (TEMPLATE_LIMIT + 1),
                self.CHATML.replace("You", 16385 * "x"),
            ):
                with self.subTest(template=template[:50]):
                    self.assertNotEqual(self.refused(template), "not refused")
            self.assertIn("open", self.recognised(self.CHATML.replace("You", 16000 * "x")))
        took = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.assertLess(took.ru_utime + took.ru_stime - began.ru_utime - began.ru_stime, 15)
        here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.assertLessEqual(took.ru_maxrss, max(began.ru_maxrss, here + (256 << 10)))  # KiB

    def test_where_the_template_is_read_from(self):
        self.write()
        settings = json.loads((self.checkpoint / "tokenizer_config.json").read_text())

        def opening():
            file, out = self.accept()
            read = next(line for line in out.splitlines() if line.startswith("read: "))
            return (meta(file, "chat") or {"open": None})["open"], read.split(", ")

        for template, begin in (
            ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ messages[0] }}"}], None),
            ([{"name": "tool_use", "template": "x"}], None),
            (None, None),
            (self.CHATML, "<|im_start|>system\n"),
        ):
            (self.checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
            if begin:
                self.assertTrue(opening()[0].startswith(begin))
            elif template is None or len(template) == 1:
                self.assertIsNone(opening()[0])
            else:
                self.assertIn("refused", meta(self.accept()[0], "chat"))
        for name, template, begin in (
            ("chat_template.jinja", random_models.LLAMA3_TEMPLATE, "<|begin_of_text|><|start_header_id|>"),
            ("additional_chat_templates/default.jinja", chat_templates.TULU, "<|user|>\n"),
        ):
            (self.checkpoint / name).parent.mkdir(exist_ok=True)
            (self.checkpoint / name).write_text(template)
            text, read = opening()
            self.assertTrue(text.startswith(begin), text)
            self.assertIn(name, read)
        self.out.unlink()
        (self.checkpoint / "additional_chat_templates/default.jinja").unlink()
        (self.checkpoint / "chat_template.jinja").unlink()
        (self.checkpoint / "tokenizer_config.json").write_text('{"chat_template": 7}')
        self.refuse("chat_template")


@unittest.skipUnless(gguf, "the gguf package is not installed")
class Gguf(Case):
    NAMES: ClassVar = {ours: theirs for theirs, ours in {**gguf_file.GGUF_LAYER, **gguf_file.GGUF_OTHER}.items()}

    def write_gguf(self, metadata=None, tensors=None, kind=None, pre="llama-bpe", seed=5, extra=None, kinds=None):
        """The GGUF file that llama.cpp's converter would make from the checkpoint of `write`."""
        self.checkpoint = self.folder / "model.gguf"
        config = random_models.base_config(dict(SMALL, rope_scaling=None))
        tensors = tensors or random_models.random_tensors(config, seed)
        words = random_models.tokenizer_json()
        writer = gguf.GGUFWriter(self.checkpoint, "llama")
        values = {
            "llama.block_count": 2,
            "llama.context_length": 512,
            "llama.embedding_length": 24,
            "llama.feed_forward_length": 19,
            "llama.attention.head_count": 6,
            "llama.attention.head_count_kv": 2,
            "llama.attention.key_length": 4,
            "llama.attention.value_length": 4,
            "llama.rope.dimension_count": 4,
            "llama.rope.freq_base": 500000.0,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.vocab_size": 275,
            "tokenizer.ggml.bos_token_id": 269,
            "tokenizer.ggml.eos_token_id": 270,
            "tokenizer.ggml.eot_token_id": 273,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.chat_template": random_models.LLAMA3_TEMPLATE,
            **(metadata or {}),
        }
        for key, value in values.items():
            if value is DROP:
                continue
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
        tokens = [*words["model"]["vocab"], *random_models.SPECIAL, "[PAD274]"]
        writer.add_token_list(tokens)
        writer.add_token_types(kinds or [1] * 269 + [3] * 5 + [5])
        writer.add_token_merges(random_models.MERGES)
        for name, x in {**tensors, **(extra or {})}.items():
            parts = name.split(".")
            if name not in (extra or {}):
                name = (
                    f"blk.{parts[2]}.{self.NAMES['.'.join(parts[3:-1])]}.weight"
                    if parts[1] == "layers"
                    else self.NAMES[".".join(parts[:-1])] + ".weight"
                )
            for projection, heads in (("q_proj", 6), ("k_proj", 2)):
                if projection in parts:  # llama.cpp's LlamaModel.permute
                    x = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
            if kind and x.ndim == 2 and x.shape[1] % 32 == 0:
                writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, np.ascontiguousarray(x))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def test_same_as_the_folder(self):
        self.write(dict(SMALL, rope_scaling=None))
        folder, _ = self.accept()
        folder = {n: folder.array(n).copy() for n in folder.tensors}, dict(folder.metadata)
        self.write_gguf()
        file, _ = self.accept()
        self.assertEqual(set(file.tensors), set(folder[0]))
        for name, x in folder[0].items():
            np.testing.assert_array_equal(file.array(name), x, name)
        for key in ("format", "tokenizer", "chat"):
            self.assertEqual(json.loads(f"[{json.dumps(file.metadata[key])}]"), [folder[1][key]])
        ours, theirs = meta(file, "config"), json.loads(folder[1]["config"])
        self.assertAlmostEqual(ours.pop("rms_norm_eps"), theirs.pop("rms_norm_eps"), places=9)
        self.assertEqual(ours, theirs)

    def test_frequency_divisors(self):
        self.write_gguf(extra={"rope_freqs.weight": np.array([1, 8], np.float32)})
        file, _ = self.accept()
        self.assertEqual(file.tensors["rope.freq_divisors"][:2], ("F32", (2,)))
        self.assertEqual(file.array("rope.freq_divisors").tolist(), [1, 8])
        self.out.unlink()
        for bad in ([1, 0], [1, np.nan], [1, 2, 3]):
            self.write_gguf(extra={"rope_freqs.weight": np.array(bad, np.float32)})
            self.refuse("rope_freqs.weight")

    def test_quantised_blocks(self):
        spec = dict(SMALL, rope_scaling=None, hidden_size=36, intermediate_size=64)
        tensors = random_models.random_tensors(random_models.base_config(spec), 5)
        kind = gguf.GGMLQuantizationType.Q8_0
        self.write_gguf({"llama.embedding_length": 36, "llama.feed_forward_length": 64}, tensors, kind)
        name = "model.layers.0.mlp.down_proj.weight"
        got = (self.accept()[0].array(name).astype(np.uint32) << 16).view(np.float32)
        step = np.abs(tensors[name]).reshape(36, 2, 32).max(-1) / 127
        error = np.abs(got - tensors[name]).reshape(36, 2, 32)
        self.assertTrue(np.all(error <= 0.51 * step[..., None] + 2**-8 * np.abs(got).max()))
        self.assertFalse(np.array_equal(got, tensors[name]))

    def test_tied(self):
        tensors = random_models.random_tensors(random_models.base_config(dict(SMALL, tie_word_embeddings=True)), 5)
        self.write_gguf(tensors=tensors)
        self.assertTrue(meta(self.accept()[0], "config")["tie_word_embeddings"])

    def test_split_patterns(self):
        for pre, (split, ignore_merges) in gguf_file.GGUF_SPLIT.items():
            self.write_gguf(pre=pre)
            self.assertEqual(
                {"split": split, "ignore_merges": ignore_merges},
                {k: v for k, v in meta(self.accept()[0], "tokenizer").items() if k in ("split", "ignore_merges")},
            )

    def test_pre_tokenizers_by_another_name(self):
        for pre, ignore_merges in (("smaug-bpe", False), ("dbrx", False), (DROP, True), ("default", True)):
            self.write_gguf({"tokenizer.ggml.pre": pre})
            rules = meta(self.accept()[0], "tokenizer")
            self.assertEqual((rules["split"], rules["ignore_merges"]), ([LLAMA3_SPLIT], ignore_merges))
        self.out.unlink()
        with mock.patch.object(gguf_file, "LLAMA3_TOKENS", {"<|another|>"}):
            self.refuse("pre-tokenizer 'default'")

    def test_user_defined_tokens_are_added_and_control_tokens_special(self):
        self.write_gguf(kinds=[1] * 269 + [3] * 4 + [4, 5])
        rules = meta(self.accept()[0], "tokenizer")
        self.assertEqual(rules["added"], [[273, "<|eot_id|>"]])
        self.assertEqual([i for i, _ in rules["special"]], [269, 270, 271, 272])

    def test_no_scaling(self):
        self.write_gguf()
        self.accept()
        whole = self.out.read_bytes()
        for more in (
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
            {"llama.rope.scale_linear": 1.0},
        ):
            self.write_gguf(more)
            self.accept()
            self.assertEqual(self.out.read_bytes(), whole)

    def test_parts_are_joined(self):
        self.write_gguf()
        self.accept()
        whole = self.out.read_bytes()
        tensors = random_models.random_tensors(random_models.base_config(dict(SMALL, rope_scaling=None)), 5)
        names = list(tensors)

        def write_parts(cuts, **changes):
            self.checkpoint = self.folder / "model.gguf"
            for old in self.folder.glob("model-*.gguf"):
                old.unlink()
            for i, (a, b) in enumerate(cuts):
                split = {"split.no": i, "split.count": len(cuts), "split.tensors.count": len(names), **changes}
                self.write_gguf(split, {n: tensors[n] for n in names[a:b]})
                self.checkpoint.rename(self.folder / f"model-{i + 1:05}-of-{len(cuts):05}.gguf")

        write_parts([(0, 5), (5, 6), (6, None)])
        for i in (1, 3):
            self.checkpoint = self.folder / f"model-{i:05}-of-00003.gguf"
            file, out = self.accept()
            self.assertIn("read: model-00001-of-00003.gguf, model-00002-of-00003.gguf, model-00003-of-00003.gguf", out)
            for name, x in tensors.items():
                np.testing.assert_array_equal(file.array(name), (x.view(np.uint32) >> 16).astype(np.uint16), name)
            self.assertEqual(self.out.read_bytes(), whole)
        self.out.unlink()
        first = self.folder / "model-00001-of-00003.gguf"
        (self.folder / "model-00002-of-00003.gguf").rename(self.folder / "away")
        self.refuse("model-00002-of-00003.gguf: no such file", 1, (first, self.out))
        for cuts, changes, word in (
            ([(0, 5), (5, None)], {"split.count": 3}, "part 0 of 3"),
            ([(0, 5), (5, None)], {"split.no": 1}, "part 1 of 2"),
            ([(0, 5), (4, None)], {}, "in two parts"),
            ([(0, 5), (6, None)], {}, "the parts hold"),
        ):
            write_parts(cuts, **changes)
            self.refuse(word, 1, (self.folder / "model-00001-of-00002.gguf", self.out))

    def test_refused_by_name(self):
        for metadata, word in (
            ({"tokenizer.ggml.pre": "qwen2"}, "'qwen2'"),
            ({"tokenizer.ggml.model": "llama"}, "'llama'"),
            ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix"),
            ({"llama.expert_count": 8}, "llama.expert_count"),
            ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type"),
            ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count"),
            ({"llama.attention.value_length": 8}, "value_length"),
            ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window"),
            ({"llama.block_count": DROP}, "llama.block_count"),
            ({"llama.block_count": "2"}, "llama.block_count"),
            ({"llama.block_count": 3}, "missing"),
            ({"llama.attention.head_count": 0}, "num_attention_heads"),
            ({"split.count": 2}, "part 0 of 2"),
            ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.type"),
            ({"llama.vocab_size": 274}, "[274, 24] by the config, got [275, 24]"),
        ):
            self.write_gguf(metadata)
            with self.subTest(metadata=str(metadata)):
                self.refuse(word)
        self.write_gguf(extra={"blk.0.attn_q.bias": np.ones(24, np.float32)})
        self.refuse("blk.0.attn_q.bias")

    def fields(self):
        """(offset, struct's letters) of the numbers in the header of the file. Of the lengths of tokens and merges,
        only one in ten."""
        found = []

        class Recorder(gguf_file.Gguf):
            def take(self, format):
                found.append((self.at, format))
                return super().take(format)

        Recorder(self.checkpoint, gguf)
        at = found[0][0] + 4
        found[0:1] = [(0, "I"), (at, "I"), (at + 4, "Q"), (at + 12, "Q")]
        return [f for i, f in enumerate(found) if not 80 < i < len(found) - 90 or i % 10 == 0]

    def test_truncated_at_every_field(self):
        self.write_gguf()
        whole = self.checkpoint.read_bytes()
        cuts = {at + shift for at, _ in self.fields() for shift in (0, 1, 4)}
        for size in sorted(cuts | {len(whole) - 1, len(whole) - 40, len(whole) - 40000}):
            self.checkpoint.write_bytes(whole[:size])
            self.refuse("model.gguf")

    def test_every_number_replaced(self):
        self.write_gguf()
        whole = self.checkpoint.read_bytes()
        refused = 0
        for at, letters in self.fields():
            for wrong in (b"\0", b"\xff", b"\x7f"):
                size = struct.calcsize("<" + letters)
                new = wrong * size
                if letters == "f" and wrong == b"\x7f":
                    new = struct.pack("<f", np.nan)
                elif wrong == b"\x7f":  # large, but not absurdly large
                    new = b"\xff\xff\xff\x0f\0\0\0\0"[:size].ljust(size, b"\0")
                self.checkpoint.write_bytes(whole[:at] + new + whole[at + size :])
                with self.subTest(at=at, letters=letters, new=new):
                    refused += self.survive() != ""
        self.assertGreater(refused, 500)

    def test_tensors(self):
        self.write_gguf()
        whole = self.checkpoint.read_bytes()
        fields = self.fields()[-4 * 21 :]  # 21 tensors; each has its name's length, rank, shape, type and offset
        for (at, _), new, word in (
            (fields[1], (0,), "0 dimensions"),
            (fields[1], (5,), "5 dimensions"),
            (fields[2], (0, 275), "shape [275, 0]"),
            (fields[2], (1 << 63, 1 << 63), "ends at byte"),
            (fields[2], (24, 276), "in another tensor"),
            (fields[2], (24, 274), "by the config"),
            (fields[3], (99, 0), "tensor type 99"),
            (fields[3], (8, 0), "blocks have 32"),
            (fields[3], (26, 0), "I32"),
            (fields[-1], (0, 0), "in another tensor"),
            (fields[-1], (0, 1 << 40), "ends at byte"),
            (fields[-1], (0, 1), "unaligned"),
        ):
            letters = {1: "I", 2: "QQ"}[len(new)] if at != fields[3][0] and at != fields[-1][0] else "IQ"
            size = struct.calcsize("<" + letters)
            self.checkpoint.write_bytes(whole[:at] + struct.pack("<" + letters, *new) + whole[at + size :])
            with self.subTest(new=new):
                self.refuse(word)

    def test_header(self):
        def text(s):
            return struct.pack("<Q", len(s)) + s

        def file(*values, version=3, tensors=0, count=None):
            head = struct.pack("<4sIQQ", b"GGUF", version, tensors, len(values) if count is None else count)
            self.checkpoint = self.folder / "model.gguf"
            self.checkpoint.write_bytes(head + b"".join(values))

        def value(kind, data, key=b"a"):
            return text(key) + struct.pack("<I", kind) + data

        nested = value(9, b"".join(struct.pack("<IQ", 9, 1) for _ in range(100000)))
        for arguments, options, word in (
            ((), dict(version=1), "version 1"),
            ((), dict(version=3 << 24), "big-endian"),
            ((), dict(count=1 << 60), "ends within"),
            ((), dict(tensors=1 << 60), "ends within"),
            ((value(13, b""),), {}, "type 13"),
            ((nested,), {}, "list of type 9"),
            ((value(9, struct.pack("<IQ", 4, 1 << 62)),), {}, "ends within"),
            ((value(9, struct.pack("<IQ", 8, 1 << 62)),), {}, "ends within"),
            ((value(9, struct.pack("<IQ", 0, 1 << 62)),), {}, "ends within"),
            ((value(8, struct.pack("<Q", (1 << 64) - 1)),), {}, "ends within"),
            ((value(8, text(b"\xff")),), {}, "not UTF-8"),
            (2 * (value(7, b"x"),), {}, "a is there twice"),
            ((value(4, b"\0\0\0\0", b"general.alignment"),), {}, "general.alignment is 0"),
            ((value(8, text(b"llama"), b"general.architecture"),), {}, "llama."),
            ((), {}, "architecture None"),
        ):
            file(*arguments, **options)
            with self.subTest(word=word, options=options):
                self.refuse(word)
        self.checkpoint.write_bytes(b"GGUF" + 100 * b"\0")
        self.refuse("version 0")
        with open(self.checkpoint, "wb") as sparse:  # a text of 1 TB of zeros
            sparse.write(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1 << 39))
            sparse.truncate(1 << 40)
        self.refuse("longer than 64 MB")

    def test_damaged_blocks(self):
        spec = dict(SMALL, rope_scaling=None, hidden_size=36, intermediate_size=64)
        tensors = random_models.random_tensors(random_models.base_config(spec), 5)
        self.write_gguf(
            {"llama.embedding_length": 36, "llama.feed_forward_length": 64}, tensors, gguf.GGMLQuantizationType.Q8_0
        )
        whole = self.checkpoint.read_bytes()
        begin = gguf_file.Gguf(self.checkpoint, gguf).tensors["blk.1.ffn_down.weight"].begin
        self.checkpoint.write_bytes(whole[:begin] + b"\xff\xff" + whole[begin + 2 :])  # its first scale
        self.refuse("model.layers.1.mlp.down_proj.weight: holds NaN")

    def test_without_the_package(self):
        self.write_gguf()
        with mock.patch.dict(sys.modules, gguf=None):
            self.refuse("pip install gguf")


if __name__ == "__main__":
    unittest.main()
