"""lm-evaluation-harness under a policy: model `speed`.

    python -m speed_llama.evaluation run --model speed --model_args pretrained=FOLDER,policy=speed,k=24 --tasks ...

As the harness's own command line, with one model more. Arguments: those of its `hf` model that make sense for a loaded
model, and policy, k, anchor, kept_layers (as 0+4+8).
"""

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from .exported import read_tokenizer
from .modeling import SpeedLlamaForCausalLM, find_decode_start


@register_model("speed")
class SpeedLM(HFLM):
    """Generation: prompts split at the chat template's assistant header (--apply_chat_template), else before their last
    token. Likelihood: the context is the prompt, split likewise; what is scored is decode-phase."""

    def __init__(
        self,
        pretrained: str,
        policy: str = "full",
        k: int | None = None,
        anchor: bool = True,
        kept_layers: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        add_bos_token: bool = False,
        **kwargs,
    ) -> None:
        """pretrained: a Hugging Face folder, or the exporter's .safetensors file. add_bos_token: puts a BoS in front of
        texts that have none, which speed's anchor needs; chats have their template's."""
        kept = [int(i) for i in str(kept_layers).split("+")] if kept_layers is not None else None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = SpeedLlamaForCausalLM.from_pretrained(
            pretrained, policy=policy, num_key_value_layers=k, anchor=anchor, kept_layers=kept, dtype=dtype
        ).to(device)
        exported = str(pretrained).endswith(".safetensors")
        words = (
            read_tokenizer(pretrained)
            if exported and not tokenizer
            else AutoTokenizer.from_pretrained(tokenizer or pretrained)
        )
        bos = words.bos_token
        if add_bos_token and words("a")["input_ids"][0] != words.bos_token_id:
            words.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, words.bos_token_id)]
            )
        if words.chat_template:
            model.config.use_chat_template_of(words)
        super().__init__(pretrained=model, tokenizer=words, add_bos_token=add_bos_token or None, **kwargs)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """requests: (texts, context ids, continuation ids). Returns (log-likelihood, whether greedy), each."""
        if not self.model.config.split_matters():
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return self.score(requests)

    @torch.no_grad()
    def score(self, requests) -> list[tuple[float, bool]]:
        """The same with each context as prompt, whatever the policy; batches of like length, padded on the right."""
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        size = int(self.batch_size)
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            targets = [torch.tensor(requests[i][2]) for i in batch]
            inputs = [torch.tensor([*requests[i][1], *requests[i][2]][-self.max_length - 1 : -1]) for i in batch]
            lengths = torch.tensor([len(x) for x in inputs])
            ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
            column = torch.arange(ids.shape[1])
            first = lengths - torch.tensor([len(t) for t in targets])  # the column that predicts the first target
            start = find_decode_start(self.model.config, ids, column.expand_as(ids), column <= first[:, None])
            ids, mask = (x.to(self.device) for x in (ids, (column < lengths[:, None]).long()))
            logits = self.model(ids, attention_mask=mask, decode_start=start, use_cache=False).logits
            for row, i in enumerate(batch):
                scores = logits[row, first[row] : lengths[row]].log_softmax(-1, dtype=self.softmax_dtype).cpu()
                greedy = bool((scores.argmax(-1) == targets[row]).all())
                answers[i] = float(scores.gather(1, targets[row][:, None]).sum()), greedy
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        if self.model.config.split_matters():
            raise NotImplementedError(
                "rolling likelihood has no prompt that a policy could skip: use a task with contexts"
            )
        return super().loglikelihood_rolling(requests, disable_tqdm)


if __name__ == "__main__":
    cli_evaluate()
