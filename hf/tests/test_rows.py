"""What is really computed: prompt rows must be absent above K, not hidden."""

import pytest
import torch
from conftest import fields, policies, random_tokens
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from speed_llama import PolicyCache, SpeedLlamaForCausalLM, apply_policy

PROMPT, TAIL = 55, 5


class Counted:
    """Rows that enter a module's products during the next calls, for each layer: q, k, mlp."""

    def __init__(self, model):
        self.q, self.k, self.mlp, self.handles = {}, {}, {}, []
        for i, layer in enumerate(model.model.layers):
            for store, p, module in ((self.q, "q", layer.self_attn), (self.k, "k", layer.self_attn),
                                     (self.mlp, "mlp", layer)):  # fmt: skip
                store[i] = 0
                names = ("mlp",) if p == "mlp" else (f"{p}_proj", f"{p}_proj_swiftkv")
                for found in (getattr(module, name, None) for name in names):
                    if found is not None:
                        self.handles.append(found.register_forward_pre_hook(self.counter(store, i)))

    @staticmethod
    def counter(store, i):
        def count(module, args):
            store[i] += args[0].shape[1]

        return count

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def lists(self):
        return [list(x.values()) for x in (self.q, self.k, self.mlp)]


@pytest.mark.parametrize(
    "policy, queries, keys",
    [
        ({"policy": "full"}, "6 6 6 6 6 t", "6 6 6 6 6 6"),
        ({"policy": "speed", "k": 3, "bos": False}, "6 6 t t t t", "6 6 6 t t t"),
        ({"policy": "speed", "k": 3}, "6 6 a a a a", "6 6 6 a a a"),
        ({"policy": "pop", "k": 3}, "6 6 6 t t t", "6 6 6 6 6 6"),
        ({"policy": "share", "keep": [0, 2, 3]}, "6 6 6 t t t", "6 0 6 6 0 0"),
    ],
)
def test_rows_of_each_layer(wide, policy, queries, keys):
    """6: all 60 rows; t: the tail's; a: the tail's and the anchor's; 0: none. The MLP gets what makes queries."""
    rows = {"6": PROMPT + TAIL, "t": TAIL, "a": TAIL + 1, "0": 0}
    model = wide.under(**policy)
    with Counted(model) as counted, torch.no_grad():
        model(torch.tensor([random_tokens(1, PROMPT + TAIL)]), decode_start=PROMPT)
    q, k, mlp = counted.lists()
    assert q == mlp == [rows[x] for x in queries.split()]
    assert k == [rows[x] for x in keys.split()]


def test_rows_under_swiftkv(random_model):
    """K = 2 of 8 layers, groups of four: two leaders make keys of all rows."""
    model = random_model("swiftkv4").under(policy="swiftkv", k=2)
    with Counted(model) as counted, torch.no_grad():
        model(torch.tensor([random_tokens(1, 60)]), decode_start=55)
    assert counted.lists() == [[60, 60] + [5] * 6, [60, 60, 60, 0, 0, 0, 60, 0], [60, 60] + [5] * 6]


@pytest.mark.parametrize("bos", [True, False])
def test_upper_caches_hold_no_prompt(wide, bos):
    model, cache = wide.under(policy="speed", k=2, bos=bos), PolicyCache()
    with torch.no_grad():
        model(torch.tensor([random_tokens(1, 60)]), decode_start=55, past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [61, 61] + [6 + bos] * 4


def test_lower_caches_are_those_of_full_depth(wide):
    """Below K the caches are the same bits whatever is done above."""
    tokens = torch.tensor([random_tokens(5, 60)])
    caches = {}
    for name, policy in (("full", {"policy": "full"}), ("speed", {"policy": "speed", "k": 3}),
                         ("pop", {"policy": "pop", "k": 3})):  # fmt: skip
        caches[name] = PolicyCache()
        with torch.no_grad():
            wide.under(**policy)(tokens, decode_start=55, past_key_values=caches[name])
    for name in ("speed", "pop"):
        for ours, full in zip(caches[name].layers[:3], caches["full"].layers[:3], strict=True):
            assert torch.equal(ours.keys, full.keys) and torch.equal(ours.values, full.values)


def test_policies_that_do_not_fit_are_refused(random_model, wide):
    model = wide.under()
    for wrong, words in (({"policy": "speed", "k": 7}, "expected 1 to 6"), ({"policy": "speed", "k": 0}, "1 to 6"),
                         ({"policy": "swiftkv", "k": 3}, "has none"), ({"policy": "share", "keep": [1, 2]}, "layer 0"),
                         ({"policy": "share", "keep": [0, 9]}, "below 6"), ({"policy": "skip"}, "expected one of"),
                         ({"policy": "share", "k": 3, "keep": [0]}, "takes no")):  # fmt: skip
        before = model.config.to_dict()
        with pytest.raises(ValueError, match=words):
            model.set_policy(**fields(**wrong))
        assert model.config.to_dict() == before
    with pytest.raises(ValueError, match="no field"):
        model.set_policy(layers=3)
    bare = random_model("swiftkv2-bare")
    with pytest.raises(ValueError, match="SwiftKV's projections only"):
        bare.model.set_policy(policy="full")
    with pytest.raises(ValueError, match="for K = 1"):
        random_model("swiftkv2").model.set_policy(policy="swiftkv", num_key_value_layers=3)
    assert policies(bare.config) == [{"policy": "swiftkv", "k": 1}]


@pytest.mark.parametrize("policy", ["speed", "pop"])
def test_a_policy_without_its_k_is_refused(wide, policy):
    """K = None once ran all layers under the name of the policy."""
    model = wide.under()
    with pytest.raises(ValueError, match="give num_key_value_layers"):
        model.set_policy(policy=policy)
    assert model.config.policy == "full"
    with pytest.raises(ValueError, match="give num_key_value_layers"):
        SpeedLlamaForCausalLM.from_pretrained(wide.file, policy=policy)
    with pytest.raises(ValueError, match="give num_key_value_layers"):
        apply_policy(LlamaForCausalLM.from_pretrained(wide.folder), policy=policy)


def test_swiftkv_takes_the_k_of_its_weights(random_model, wide):
    swiftkv = random_model("swiftkv2")
    for k in ({}, {"num_key_value_layers": None}):
        loaded = SpeedLlamaForCausalLM.from_pretrained(swiftkv.file, policy="swiftkv", **k)
        assert loaded.config.schedule().narrow_from == loaded.config.num_key_value_layers == 1
        for before in ({"policy": "full"}, {"policy": "speed", "k": 3}):
            model = swiftkv.under(**before)
            model.set_policy(policy="swiftkv", **k)
            assert model.config.schedule().narrow_from == model.config.num_key_value_layers == 1
    for k in ({}, {"num_key_value_layers": 3}, {"num_key_value_layers": 6}):
        with pytest.raises(ValueError, match="has none"):
            wide.under().set_policy(policy="swiftkv", **k)
        with pytest.raises(ValueError, match="has none"):
            SpeedLlamaForCausalLM.from_pretrained(wide.folder, policy="swiftkv", **k)


@pytest.mark.parametrize("policy", [{"policy": "full"}, {"policy": "share", "kept_layers": [0, 2]}], ids=str)
def test_k_where_there_is_none_is_refused(wide, policy):
    for load in (lambda **f: SpeedLlamaForCausalLM.from_pretrained(wide.folder, **f),
                 lambda **f: apply_policy(LlamaForCausalLM.from_pretrained(wide.folder), **f)):  # fmt: skip
        with pytest.raises(ValueError, match="takes no num_key_value_layers"):
            load(**policy, num_key_value_layers=3)
        assert load(**policy).config.num_key_value_layers is None


def test_apply_policy_refuses_what_it_cannot_do(wide):
    stock = LlamaForCausalLM.from_pretrained(wide.folder)
    for wrong in ({"k": 3}, {"use_anchor": False}):
        with pytest.raises(ValueError, match="no field"):
            apply_policy(stock, policy="speed", num_key_value_layers=3, **wrong)
    stock.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="'flex_attention'"):
        apply_policy(stock, policy="speed", num_key_value_layers=3)
    assert type(stock) is LlamaForCausalLM and type(stock.model.layers[0]) is LlamaDecoderLayer
