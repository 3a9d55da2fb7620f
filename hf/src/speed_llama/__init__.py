"""Hugging Face Llama models under policies that skip prompt work: SPEED, POP, SwiftKV and shared caches."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import PolicyCache
from .configuration import SpeedLlamaConfig
from .exported import read_tokenizer
from .modeling import SpeedLlamaForCausalLM, SpeedLlamaModel, apply_policy

AutoConfig.register(SpeedLlamaConfig.model_type, SpeedLlamaConfig)
AutoModelForCausalLM.register(SpeedLlamaConfig, SpeedLlamaForCausalLM)

__all__ = [
    "PolicyCache",
    "SpeedLlamaConfig",
    "SpeedLlamaForCausalLM",
    "SpeedLlamaModel",
    "apply_policy",
    "read_tokenizer",
]
