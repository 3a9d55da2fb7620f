"""Logits against the engine and against an unchanged Hugging Face model in which the policy is done by masks."""

import numpy as np
import pytest
import random_models
import reference
import torch
from conftest import (
    TOLERANCE,
    difference,
    engine_logits,
    policies,
    random_tokens,
)

from speed_llama import SpeedLlamaForCausalLM, read_tokenizer

# Where a policy wrecks a model that was not adapted to it, rounding errors grow, in any program. Then float64 says
# who is right: ours may be so many times as far from it as Hugging Face's own fp32 with masks comes, the worst of a
# few runs whose rounding was disturbed.
UNSTABLE, RUNS = 5, 4


def check(name, got, expected, loaded, tokens, split, **policy):
    error = difference(got, expected)
    if not TOLERANCE < error < float("inf"):
        assert error <= TOLERANCE, f"{name}: {error:.1e}"
        return
    with reference.double_precision(loaded) as exact:
        exact = reference.logits(exact, tokens, split, **policy)
    theirs = difference(reference.logits(loaded, tokens, split, **policy), exact)
    for seed in range(RUNS):
        with reference.rounded_otherwise(loaded, seed):
            theirs = max(theirs, difference(reference.logits(loaded, tokens, split, **policy), exact))
    ours = difference(got, exact)
    assert ours <= UNSTABLE * theirs, f"{name}: {ours:.1e} from float64, Hugging Face's fp32 with masks {theirs:.1e}"


def compare(model, tokens, split, folder, implementation, **policy):
    got = model.logits(tokens, split, implementation, **policy)
    name = f"{model.file.stem} {split} {implementation} {policy}"
    for who, expected in (("engine", engine_logits(model.file, tokens, split, folder, **policy)),
                          ("masks", reference.logits(model.reference, tokens, split, **policy))):  # fmt: skip
        check(f"{name} against the {who}", got, expected, model.reference, tokens, split, **policy)


@pytest.mark.parametrize("name", random_models.SPECS)
def test_every_policy_and_k(random_model, tmp_path, name):
    """One split each in turn; test_every_split takes them all."""
    model = random_model(name)
    for i, policy in enumerate(policies(model.config)):
        compare(model, random_tokens(i, 90), (1, 45, 89)[i % 3], tmp_path, ("sdpa", "eager")[i % 2], **policy)
    compare(model, random_tokens(0, 2), 1, tmp_path, "sdpa", **policies(model.config)[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", random_models.SPECS)
def test_every_split(random_model, tmp_path, name):
    model = random_model(name)
    for i, policy in enumerate(policies(model.config)):
        for split in (1, 45, 89):
            for implementation in ("sdpa", "eager"):
                compare(model, random_tokens(i + 100, 90), split, tmp_path, implementation, **policy)


@pytest.mark.parametrize("name", ["scaled", "tied", "wide", "single"])
def test_all_layers_are_stock_bit_for_bit(random_model, name):
    """K = L without a split is transformers' own Llama, to the bit: every row, both kinds of attention."""
    model = random_model(name)
    layers = model.config["num_hidden_layers"]
    ids = torch.tensor([random_tokens(1, 70), random_tokens(2, 70)])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for implementation in ("sdpa", "eager"):
        stock = model.reference[0]
        stock.set_attn_implementation(implementation)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            for m in (None, mask):
                place = {} if m is None else {"position_ids": positions}
                expected = stock(ids, attention_mask=m, **place).logits
                for policy in ({"policy": "full"}, {"policy": "speed", "k": layers},
                               {"policy": "share", "keep": list(range(layers))}):  # fmt: skip
                    got = model.under(implementation, **policy)(ids, attention_mask=m).logits
                    real = slice(None) if m is None else mask.bool()
                    assert torch.equal(got[real], expected[real]), (implementation, policy)
        stock.set_attn_implementation("eager")


def test_prompt_rows_are_zeros(wide):
    """A row that stopped has no logits; they are zeros, and never NaN."""
    out = wide.under(policy="speed", k=3)(torch.tensor([random_tokens(3, 20)]), decode_start=[15])
    assert not out.logits[0, 1:15].any() and out.logits[0, 15:].abs().min() > 0
    packed = wide.model(torch.tensor([random_tokens(3, 20)]), decode_start=[15], packed=True)
    assert packed.decode_columns.tolist() == [[0, 15, 16, 17, 18, 19]]
    assert torch.equal(packed.logits[0, 1:], out.logits[0, 15:])


FAULTS = ["k", "split", "anchor", "position", "rope-sign", "head", "scale", "kept", "nan"]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(wide, tmp_path, fault):
    """The comparison with the engine fails when this package computes something slightly else."""
    tokens, split = random_tokens(7, 60), 40
    right = {"policy": "share", "keep": [0, 3]} if fault == "kept" else {"policy": "speed", "k": 3}
    wrong = {"k": {"policy": "speed", "k": 4}, "anchor": {"policy": "speed", "k": 3, "bos": False},
             "kept": {"policy": "share", "keep": [0, 2]}}.get(fault, right)  # fmt: skip
    expected = engine_logits(wide.file, tokens, split, tmp_path, **right)
    model = wide.under(**wrong)
    with torch.no_grad():
        if fault in ("rope-sign", "head", "scale"):
            with reference.fault((model, None, wide.config), fault):
                got = model(torch.tensor([tokens]), decode_start=[split]).logits[0, split:]
        elif fault == "position":
            places = torch.arange(60)[None] + (torch.arange(60) >= split)  # the answer one further to the right
            one = {"segment_ids": torch.zeros(1, 60, dtype=torch.long), "segment_sees": torch.ones(1, 1, 1)}
            got = model(torch.tensor([tokens]), position_ids=places, decode_start=[split + 1], **one).logits[0, split:]
        elif fault == "split":
            got = model(torch.tensor([tokens]), decode_start=[split + 1]).logits[0, split + 1 :]
            expected = expected[1:]
        else:
            got = model(torch.tensor([tokens]), decode_start=[split]).logits[0, split:]
            if fault == "nan":
                got = got.clone()
                got[3, 5] = float("nan")
    error = difference(got, expected)
    assert error > 50 * TOLERANCE, f"{fault}: moved a row by {error:.1e} only"


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """SmolLM2 in fp32: every policy at several K, 200 tokens of prose."""
    tokenizer = read_tokenizer(smollm2)
    loaded = reference.load(smollm2)
    model = SpeedLlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    prose = "The sea was calm, and nobody on the island had seen a ship for eleven days. " * 12
    tokens = [loaded[2]["bos_token_id"], *tokenizer(prose)["input_ids"][:199]]
    chosen = [p for p in policies(loaded[2]) if p.get("k", 24) in (1, 8, 15, 24, 29, 30)]
    for i, policy in enumerate(chosen):
        split = (199, 150, 1, 100)[i % 4]
        model.set_policy(policy=policy["policy"], num_key_value_layers=policy.get("k"), anchor=policy.get("bos", True),
                         kept_layers=policy.get("keep"))  # fmt: skip
        with torch.no_grad():
            got = model(torch.tensor([tokens]), decode_start=split).logits[0, split:].numpy()
        expected = engine_logits(smollm2, tokens, split, tmp_path, **policy)
        assert np.isfinite(got).all()
        check(f"SmolLM2 {split} {policy}", got, expected, loaded, tokens, split, **policy)
