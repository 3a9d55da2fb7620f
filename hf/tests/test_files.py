"""Folders and files in and out."""

import json

import export_weights
import pytest
import random_models
import reference
import torch
from conftest import ROOT, TOLERANCE, difference, policies, random_tokens, run_engine
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from speed_llama import SpeedLlamaConfig, SpeedLlamaForCausalLM, apply_policy, read_tokenizer

SPEED3 = {"policy": "speed", "num_key_value_layers": 3, "anchor": False, "decode_marker": [5, 6]}


def ids():
    return torch.tensor([random_tokens(1, 30)])


@pytest.mark.parametrize("name", random_models.SPECS)
def test_round_trip(random_model, tmp_path, name):
    """Folder -> this package -> folder -> exporter gives the exporter's file of the first folder, bit for bit; so
    does the exported file on the same way, tokenizer and all."""
    model = random_model(name)
    published = tmp_path / "published" / name
    published.parent.mkdir()
    published.symlink_to(model.folder)
    for source, tokenizer in ((model.folder, AutoTokenizer.from_pretrained(model.folder)),
                              (model.file, read_tokenizer(model.file))):  # fmt: skip
        saved = tmp_path / source.suffix[1:] / name  # the model's name is the folder's
        loaded = SpeedLlamaForCausalLM.from_pretrained(source)
        assert loaded.dtype == (torch.bfloat16 if source == model.file else torch.float32)
        loaded.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        out = export_weights.export(saved, saved.parent / "out.safetensors", False)
        assert any("wrote" in line for line in out)
        assert (saved.parent / "out.safetensors").read_bytes() == model.file.read_bytes()
        again = SpeedLlamaForCausalLM.from_pretrained(saved)
        for (a, x), (b, y) in zip(loaded.state_dict().items(), again.state_dict().items(), strict=True):
            assert a == b and torch.equal(x, y)


def same_but_marks(a, b):
    """Two exported files: equal, but for turn marks, which files exported before have in an older form."""
    with safe_open(a, "np") as x, safe_open(b, "np") as y:
        assert all(json.loads(x.metadata()[key]) == json.loads(y.metadata()[key]) for key in ("config", "tokenizer"))
    x, y = load_file(a), load_file(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_round_trip_of_the_small_adapted_model(tmp_path):
    """models/small.safetensors says which policies its weights were adapted to; that survives."""
    file = ROOT / "models" / "small.safetensors"
    with safe_open(file, "np") as opened:
        saved = tmp_path / json.loads(opened.metadata()["config"])["name"]
    model = SpeedLlamaForCausalLM.from_pretrained(file, policy="speed", num_key_value_layers=4)
    model.save_pretrained(saved)
    read_tokenizer(file).save_pretrained(saved)
    export_weights.export(saved, tmp_path / "out.safetensors", False)
    same_but_marks(tmp_path / "out.safetensors", file)


@pytest.mark.slow
def test_round_trip_of_smollm2(smollm2, tmp_path):
    """The real model too, with its split patterns and its ChatML template, out of the exported file alone."""
    with safe_open(smollm2, "np") as file:
        saved = tmp_path / json.loads(file.metadata()["config"])["name"]
    SpeedLlamaForCausalLM.from_pretrained(smollm2).save_pretrained(saved)
    read_tokenizer(smollm2).save_pretrained(saved)
    export_weights.export(saved, tmp_path / "out.safetensors", False)
    same_but_marks(tmp_path / "out.safetensors", smollm2)


def test_a_saved_policy_comes_back(wide, tmp_path):
    model = SpeedLlamaForCausalLM.from_pretrained(wide.folder, **SPEED3)
    model.save_pretrained(tmp_path)
    again = SpeedLlamaForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in SPEED3} == SPEED3
    assert again.config.kept_layers is None
    other = SpeedLlamaForCausalLM.from_pretrained(tmp_path, num_key_value_layers=4, anchor=True)
    assert (other.config.num_key_value_layers, other.config.anchor, other.config.policy) == (4, True, "speed")
    full = SpeedLlamaForCausalLM.from_pretrained(tmp_path, policy="full")
    assert full.config.num_key_value_layers is None
    by_auto = AutoModelForCausalLM.from_pretrained(tmp_path, config=SpeedLlamaConfig.from_pretrained(tmp_path))
    assert isinstance(by_auto, SpeedLlamaForCausalLM) and by_auto.config.policy == "speed"
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "llama" and "num_key_value_layers" not in values
    with torch.no_grad():
        assert torch.equal(stock(ids()).logits, full(ids()).logits)
        assert torch.equal(again(ids(), decode_start=9).logits, model(ids(), decode_start=9).logits)


def test_published_swiftkv_names(random_model, tmp_path):
    """A SwiftKV folder as published opens under its own policy."""
    for name in ("swiftkv2", "swiftkv2-bare"):
        model = random_model(name)
        config = json.loads((model.folder / "config.json").read_text()) | {"model_type": "llama_swiftkv"}
        config["architectures"] = ["LlamaSwiftKVForCausalLM"]
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes((model.folder / "model.safetensors").read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        loaded = SpeedLlamaForCausalLM.from_pretrained(folder)
        assert loaded.config.swiftkv_only == name.endswith("bare")
        assert (loaded.config.policy, loaded.config.num_key_value_layers, loaded.config.swiftkv_layers) == (
            "swiftkv",
            1,
            1,
        )
        with torch.no_grad():
            got = loaded(ids(), decode_start=20).logits[0, 20:]
        assert difference(got, model.logits(ids()[0].tolist(), 20, policy="swiftkv", k=1)) <= TOLERANCE


def test_apply_policy(wide):
    stock = LlamaForCausalLM.from_pretrained(wide.folder, attn_implementation="eager")
    weights = stock.model.layers[5].mlp.up_proj.weight
    model = apply_policy(stock, **SPEED3)
    assert model is stock and model.model.layers[5].mlp.up_proj.weight is weights
    with torch.no_grad():
        got = model(ids(), decode_start=9).logits[0, 9:]
    assert difference(got, wide.logits(ids()[0].tolist(), 9, policy="speed", k=3, bos=False)) <= TOLERANCE
    assert model.generate(ids(), decode_start=9, max_new_tokens=3).shape[1] <= 33
    with pytest.raises(TypeError, match="takes a LlamaForCausalLM"):
        apply_policy(model)
    with pytest.raises(ValueError, match="expected 1 to 6"):
        apply_policy(LlamaForCausalLM.from_pretrained(wide.folder), policy="speed", num_key_value_layers=9)


def test_other_models_and_files_are_refused(wide, tmp_path):
    config = json.loads((wide.folder / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'mistral'"):
        SpeedLlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a file of the engine's exporter"):
        SpeedLlamaForCausalLM.from_pretrained(wide.folder / "model.safetensors")


def test_adapters(wide, tmp_path):
    """PEFT's LoRA trains, saves, and merges into weights that give the same logits."""
    from peft import LoraConfig, get_peft_model

    model = SpeedLlamaForCausalLM.from_pretrained(wide.folder, **SPEED3)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    labels = ids().clone()
    labels[:, :21] = -100
    adapted(ids(), labels=labels, decode_start=20).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained and all("lora" in name for name in trained)
    assert any("layers.0." in name for name in trained) and any("layers.5." in name for name in trained)
    with torch.no_grad():
        before = adapted(ids(), decode_start=20).logits[0, 20:]
        merged = adapted.merge_and_unload()
        assert difference(merged(ids(), decode_start=20).logits[0, 20:], before) <= TOLERANCE
    merged.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).config.model_type == "llama"


def test_rope_divisors(wide, tmp_path):
    """A file from GGUF may carry divisors of the RoPE frequencies: applied, and not silently lost when saved."""
    with safe_open(wide.file, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["rope.freq_divisors"] = torch.linspace(1, 8, 16)
    changed = tmp_path / "divided.safetensors"
    save_file(tensors, changed, metadata)
    model = SpeedLlamaForCausalLM.from_pretrained(changed, dtype=torch.float32)
    tokens = ids()[0].tolist()
    expected = reference.logits(reference.load(changed), tokens, 20)
    with torch.no_grad():
        assert difference(model(ids()).logits[0, 20:], expected) <= TOLERANCE
    assert difference(wide.logits(tokens, 20), expected) > 50 * TOLERANCE
    with pytest.raises(ValueError, match="divisors"):
        model.save_pretrained(tmp_path / "saved")


def test_tokenizer(smollm2, tmp_path):
    """SmolLM2's ids and chats are the engine's, which are Hugging Face's on every code point
    (tests/hf/test_tokenizer.py)."""
    tokenizer = read_tokenizer(smollm2)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    texts = ["Hello  world\n\n\t1234 12.5", "Größe 東京 नमस्ते \U0001f469\u200d\U0001f52c e\u0301", 
             " I'll've don't\r\n", "def f(x):\n\treturn x  # x\r\n"]  # fmt: skip
    for text in texts:
        got = tokenizer(text)["input_ids"]
        (tmp_path / "text").write_text(text, newline="")
        assert got == [int(i) for i in run_engine("tokenize", "-m", smollm2, "-f", tmp_path / "text").split()]
        assert tokenizer.decode(got) == text
    chat = [{"role": "user", "content": "Hi."}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system\n") and rendered.endswith(
        "user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    )
    config = SpeedLlamaConfig()
    config.use_chat_template_of(tokenizer)
    assert config.decode_marker == tokenizer("<|im_start|>assistant\n")["input_ids"]


def test_every_policy_of_the_config_has_a_schedule(random_model):
    for name in ("wide", "swiftkv4"):
        for policy in policies(random_model(name).config):
            schedule = random_model(name).under(**policy).config.schedule()
            layers = random_model(name).config["num_hidden_layers"]
            assert len(schedule.source) == len(schedule.reads) == layers
            assert all(j <= i and schedule.source[j] != "none" for i, j in enumerate(schedule.reads))
