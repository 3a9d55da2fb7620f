"""Prefill in one process, decode in another, under SPEED (arXiv 2605.06105).

    torchrun --nproc-per-node 2 disaggregate.py --model FOLDER --k 24 --prompt "Who wrote Hamlet?"

Rank 0 is the prefill node. It holds the embedding and the lowest K layers, and is an unmodified transformers
LlamaModel: a prompt token does nothing above layer K-1, so such a node needs no code of this package. It sends the K
layers' keys and values. Rank 1, the decode node, holds all layers, makes the anchor's slot in the upper ones itself
(it depends on the BoS alone), runs the tail of the prompt and answers. FOLDER is a Hugging Face folder of a Llama
with a chat template, or with --tokens instead of --prompt any.
"""

import argparse

import torch
import torch.distributed as dist
from transformers import AutoTokenizer, LlamaModel

from speed_llama import PolicyCache, SpeedLlamaForCausalLM


def prefill(folder: str, k: int, prompt: torch.Tensor, decode_rank: int) -> int:
    """Sends keys and values of prompt [1, n] layer by layer, lowest first; returns the bytes sent."""
    model = LlamaModel.from_pretrained(folder, num_hidden_layers=k, dtype=torch.float32)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    sent = 0
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            dist.send(x.contiguous(), decode_rank)
            sent += x.numel() * x.element_size()
    return sent


def decode(model: SpeedLlamaForCausalLM, ids: torch.Tensor, split: int, prefill_rank: int, count: int) -> torch.Tensor:
    """Answers ids [1, N], of which the prefill node has tokens [0, split): `count` greedy tokens."""
    config = model.config
    shape = (1, config.num_key_value_heads, split, config.head_dim)

    def receive() -> torch.Tensor:
        x = torch.empty(shape, dtype=model.dtype)
        dist.recv(x, prefill_rank)
        return x

    layers = [(receive(), receive()) for _ in range(config.num_key_value_layers)]
    cache = PolicyCache.from_layers(layers, torch.tensor([split]))
    out = model.generate(ids, past_key_values=cache, decode_start=[split], max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--tokens", help="ids, as 1,2,3, instead of a prompt; the last is decode-phase")
    parser.add_argument("-n", type=int, default=32)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    tokenizer = None
    if options.tokens:
        ids = torch.tensor([[int(i) for i in options.tokens.split(",")]])
        split = ids.shape[1] - 1
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        chat = [{"role": "user", "content": options.prompt}]
        ids, without = (
            tokenizer.apply_chat_template(chat, add_generation_prompt=header, return_tensors="pt", return_dict=True)
            for header in (True, False)
        )
        ids, split = ids["input_ids"], without["input_ids"].shape[1]  # the assistant header is decode-phase
    if dist.get_rank() == 0:
        sent = prefill(options.model, options.k, ids[:, :split], decode_rank=1)
        print(f"prefill node: {split} tokens, {options.k} layers, sent {sent / 1e6:.2f} MB", flush=True)
    else:
        model = SpeedLlamaForCausalLM.from_pretrained(
            options.model, policy="speed", num_key_value_layers=options.k, dtype=torch.float32
        )
        answer = decode(model, ids, split, 0, options.n)
        print("decode node:", tokenizer.decode(answer) if tokenizer else answer.tolist(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
