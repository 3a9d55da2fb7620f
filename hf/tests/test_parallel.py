"""Two processes, and layers on several devices: as alone."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOLERANCE, difference, fields, random_tokens
from test_generate import CASES, STARTS, batch, greedy_alone

from speed_llama import SpeedLlamaForCausalLM, apply_policy


def torchrun(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "hf" / "src"), "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["wide", pytest.param("swiftkv1", marks=pytest.mark.slow)])
def test_tensor_parallel(random_model, tmp_path, name):
    """transformers' plan splits heads and MLP over two processes. `wide` has 4 query heads on 2 KV heads, swiftkv1 6
    on 2."""
    model = random_model(name)
    ids, mask, sequences = batch("left")
    chosen = CASES if name == "wide" else [{"policy": "swiftkv", "k": 2}]
    cases = [{"fields": fields(**policy), "ids": ids.tolist(), "mask": mask.tolist(), "starts": list(STARTS)}
             for policy in chosen]  # fmt: skip
    out = tmp_path / "out.pt"
    torchrun(ROOT / "hf" / "tests" / "tensor_parallel_worker.py", model.folder, json.dumps(cases), out)
    saved = torch.load(out)
    heads = model.config["num_attention_heads"]
    assert saved["rows"] == heads * model.config["head_dim"] // 2  # each process had half of them
    for policy, (logits, text) in zip(chosen, saved["results"], strict=True):
        ours = model.under(**policy)
        with torch.no_grad():
            expected = ours(ids, attention_mask=mask, decode_start=list(STARTS)).logits
        rows = mask.bool() & (mask.cumsum(1) - 1 >= torch.tensor(STARTS)[:, None])
        assert difference(logits[rows], expected[rows]) <= TOLERANCE, policy
        assert (
            difference(logits[rows].roll(1, -1), expected[rows]) > 50 * TOLERANCE
        )  # as if halves came in another order
        assert torch.equal(text, ours.generate(ids, attention_mask=mask, decode_start=list(STARTS), max_new_tokens=8,
                                               do_sample=False, pad_token_id=3))  # fmt: skip


@pytest.mark.parametrize("k", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_prefill_and_decode_in_two_processes(wide, k):
    """The example: the decode node's text is the text of one process."""
    tokens = random_tokens(3, 30)
    out = torchrun(ROOT / "hf" / "examples" / "disaggregate.py", "--model", wide.folder, "--k", k, "-n", 8,
                   "--tokens", ",".join(map(str, tokens)))  # fmt: skip
    model = wide.under(policy="speed", k=k)
    alone = model.generate(torch.tensor([tokens]), decode_start=[29], max_new_tokens=8, do_sample=False)[
        0, 30:
    ].tolist()
    assert f"decode node: {alone}" in out
    other = wide.under(policy="speed", k=k, bos=False)
    out_other = other.generate(torch.tensor([tokens]), decode_start=[29], max_new_tokens=8, do_sample=False)[0, 30:]
    assert out_other.tolist() != alone  # the text would show an anchor that is missing
    megabytes = 2 * k * wide.config["num_key_value_heads"] * wide.config["head_dim"] * 29 * 4 / 1e6
    assert f"29 tokens, {k} layers, sent {megabytes:.2f} MB" in out


def test_layers_on_disk(wide, tmp_path):
    """accelerate's device map: two layers and the head on disk, brought in when their turn comes."""
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
             **{f"model.layers.{i}": "disk" if i in (3, 5) else "cpu" for i in range(6)}}  # fmt: skip
    spread = SpeedLlamaForCausalLM.from_pretrained(wide.folder, dtype=torch.float32, device_map=where,
                                                   offload_folder=tmp_path)  # fmt: skip
    sequence = random_tokens(0, 40)
    for policy in CASES:
        spread.set_policy(**fields(**policy))
        with torch.no_grad():
            got = spread(torch.tensor([sequence]), decode_start=[33]).logits
            expected = wide.under(**policy)(torch.tensor([sequence]), decode_start=[33]).logits
        assert difference(got[0, 33:], expected[0, 33:]) <= TOLERANCE
        text = spread.generate(torch.tensor([sequence]), decode_start=[33], max_new_tokens=6, min_new_tokens=6)
        assert text[0, 40:].tolist() == greedy_alone(wide.model, sequence, 33, 6)
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(wide.folder, device_map=where, offload_folder=tmp_path)
    with pytest.raises(TypeError, match="device map"):
        apply_policy(stock, policy="speed", num_key_value_layers=3)
