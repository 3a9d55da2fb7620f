"""What this package leans on in transformers beyond its documented interface, by name. If a newer version fails
here, this file says what to look at; the version range stands in pyproject.toml."""

import hashlib
import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, GenerationMixin, LlamaConfig, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from speed_llama.modeling import rotate

# modeling.py restates these three forward passes with rows split; their text is what it was when that was written.
RESTATED = {
    "LlamaAttention": "dc6807936ef6103d",
    "LlamaDecoderLayer": "75d1d62e173e8c57",
    "LlamaModel": "47acaf9653882962",
}


def test_version():
    assert Version("5.23") <= Version(transformers.__version__) < Version("5.24")


@pytest.mark.parametrize("name", RESTATED)
def test_restated_forward_passes(name):
    source = inspect.getsource(getattr(modeling_llama, name).forward)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == RESTATED[name], f"read {name}.forward anew"


def test_rope_expression():
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    rope = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, *rope)
    assert torch.equal(rotate(q, rope), expected[0]) and torch.equal(rotate(k, rope), expected[1])


def test_attention_functions():
    """(module, query, key, value, mask, dropout=, scaling=) -> ([B, rows, heads, size], ...); sdpa without a mask is
    causal for several queries and sees all for one; a boolean mask is True where it sees, eager's is added."""
    module = modeling_llama.LlamaAttention(LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), 0)
    module.eval()
    assert module.is_causal and module.num_key_value_groups == 2 and module.scaling == 8**-0.5
    eager = modeling_llama.eager_attention_forward
    sdpa = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager)
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager) is eager
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)
    results = [f(module, q, k, v, mask, dropout=0.0, scaling=module.scaling)[0]
               for f, mask in ((sdpa, None), (sdpa, visible), (eager, added))]  # fmt: skip
    assert results[0].shape == (1, 5, 4, 8)
    assert all(torch.allclose(x, results[0], atol=1e-5) for x in results)
    one = [f(module, q[:, :, :1], k, v, None, dropout=0.0, scaling=module.scaling)[0] for f in (sdpa, eager)]
    assert torch.allclose(*one, atol=1e-5)


def test_gradient_checkpointing_drops_the_cache_by_name_and_keeps_positions():
    seen = []

    class Layer(GradientCheckpointingLayer):
        def forward(self, x, other, past_key_values=None, swiftkv=False):
            seen.append((other, past_key_values, swiftkv))
            return x, other

    layer = Layer().train()
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = lambda f, *args: f(*args)
    layer(torch.zeros(1), "kept", past_key_values=DynamicCache(), swiftkv=True)
    assert seen == [("kept", None, True)]


def test_cache_layers():
    """layers[i].keys and .values, [B, heads, slots, size]; crop takes a negative count; get_seq_length() is layer
    0's."""
    cache = DynamicCache()
    x = torch.arange(24.0).view(1, 2, 3, 4)
    for i, slots in ((0, 3), (2, 2)):
        keys, values = cache.update(x[:, :, :slots], x[:, :, :slots], i)
        assert keys is cache.layers[i].keys and values is cache.layers[i].values
    assert cache.get_seq_length() == 3 and cache.get_seq_length(1) == 0
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert [layer.keys.shape if layer.is_initialized else None for layer in cache.layers] == \
        [(2, 2, 2, 4), None, (2, 2, 1, 4)]  # fmt: skip


def test_generation_hooks():
    """Arguments of generate that PolicyCache's handling reads, and the hook that it overrides."""
    generate = inspect.signature(GenerationMixin.generate).parameters
    assert list(generate)[1:3] == ["inputs", "generation_config"] and "assistant_model" in generate
    prepare = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert "is_first_iteration" in prepare and "kwargs" in prepare
    assert "inputs_embeds" in prepare  # generate looks for it among the names of what overrides this
    config = transformers.GenerationConfig()
    for name in ("cache_implementation", "use_cache", "pad_token_id", "prefill_chunk_size", "is_assistant"):
        assert hasattr(config, name), name


def test_config_and_loss_hooks():
    assert "config_dict" in inspect.signature(PreTrainedConfig.from_dict).parameters
    assert "shift_labels" in inspect.signature(transformers.loss.loss_utils.ForCausalLMLoss).parameters
    plan = LlamaConfig.base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] == "colwise" and plan["layers.*.self_attn.o_proj"] == "rowwise"
