"""One process of test_parallel.py's torchrun: the model of a folder split over the group."""

import json
import sys

import torch
import torch.distributed as dist
from transformers import DistributedConfig

from speed_llama import SpeedLlamaForCausalLM


def main() -> None:
    folder, cases, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = SpeedLlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    )
    results = []
    for case in json.loads(cases):
        model.set_policy(**case["fields"])
        ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, decode_start=case["starts"]).logits
        text = model.generate(ids, attention_mask=mask, decode_start=case["starts"], max_new_tokens=8, do_sample=False,
                              pad_token_id=3, prefill_chunk_size=11)  # fmt: skip
        results.append((logits, text))
    local = model.model.layers[0].self_attn.q_proj.weight
    local = local.to_local() if hasattr(local, "to_local") else local
    if dist.get_rank() == 0:
        torch.save({"results": results, "rows": local.shape[0]}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
