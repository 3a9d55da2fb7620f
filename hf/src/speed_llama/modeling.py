"""A Llama model whose prompt tokens stop where the policy says: their rows are really left out of the layers above.

The forward pass is transformers' own with one change: a layer takes its queries from some rows and its keys and values
from others. Modules and weights keep transformers' names, so its tensor-parallel plan, device maps, adapters and
checkpoints apply.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    eager_attention_forward,
    rotate_half,
)

from .cache import PolicyCache
from .configuration import FIELDS, SpeedLlamaConfig, complete
from .exported import lacks_ordinary, read_exported
from .rows import Rows, make_mask, segments_seen, take_rows

Rope = tuple[Tensor, Tensor]  # cosines and sines, each [B, rows, head size]


@dataclass
class PolicyModelOutput(BaseModelOutputWithPast):
    """decode_columns [B, R]: the columns of the rows that went through all layers, -1 where a sequence has fewer;
    None: all. row_of_column [B, T]: the row whose result each column shows, -1 for rows that stopped; None: its own."""

    decode_columns: Tensor | None = None
    row_of_column: Tensor | None = None


@dataclass
class PolicyCausalLMOutput(CausalLMOutputWithPast):
    """decode_columns: as in PolicyModelOutput. With packed=True logits[:, j] belong to column decode_columns[:, j]."""

    decode_columns: Tensor | None = None


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """RoPE of x [B, heads, rows, head size], as transformers' apply_rotary_pos_emb has it for queries and for keys."""
    cos, sin = (angle.unsqueeze(1) for angle in rope)
    return (x * cos) + (rotate_half(x) * sin)


class SpeedLlamaAttention(LlamaAttention):
    def __init__(self, config: SpeedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.swiftkv_layers is not None and layer_idx >= config.swiftkv_layers:
            leads = (layer_idx - config.swiftkv_layers) % config.key_value_group_size == 0
            for p in ("q", "k", "v") if leads else ("q",):
                ordinary = getattr(self, f"{p}_proj")
                setattr(self, f"{p}_proj_swiftkv", nn.Linear(ordinary.in_features, ordinary.out_features, bias=False))
            if config.swiftkv_only:
                del self.q_proj, self.k_proj, self.v_proj

    def forward(self, hidden_states: Tensor, kv_states: Tensor | None, keys: Tensor | None, values: Tensor | None,
                rope: Rope, rope_kv: Rope, attention_mask: Tensor | None, past_key_values: PolicyCache | None = None,
                swiftkv: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Queries from hidden_states [B, R, d]; keys and values from kv_states [B, T, d], or those of another layer,
        [B, KV heads, S, head size], as they are. Both states are normed. Returns [B, R, d], keys, values."""
        suffix = "_swiftkv" if swiftkv else ""

        def project(p: str, x: Tensor) -> Tensor:
            return getattr(self, f"{p}_proj{suffix}")(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        if kv_states is not None:
            keys, values = rotate(project("k", kv_states), rope_kv), project("v", kv_states)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
        if hidden_states.shape[1] == 0:
            return hidden_states, keys, values
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, _ = attend(self, rotate(project("q", hidden_states), rope), keys, values, attention_mask,
                        dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling)  # fmt: skip
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), keys, values


class SpeedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: SpeedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = SpeedLlamaAttention(config, layer_idx)

    def forward(self, hidden_states: Tensor, kv_states: Tensor | None, keys: Tensor | None, values: Tensor | None,
                rope: Rope, rope_kv: Rope, attention_mask: Tensor | None, past_key_values: PolicyCache | None = None,
                swiftkv: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As attention's, of residual streams; only SwiftKV's kv_states come normed. Gradient checkpointing drops
        the cache by its name and keeps what is positional."""
        x = self.input_layernorm(hidden_states)
        if kv_states is hidden_states:
            kv_states = x
        elif kv_states is not None and not swiftkv:
            kv_states = self.input_layernorm(kv_states)
        x, keys, values = self.self_attn(
            x, kv_states, keys, values, rope, rope_kv, attention_mask, past_key_values, swiftkv
        )
        hidden_states = hidden_states + x
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, keys, values


class SpeedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: SpeedLlamaConfig
    config_class = SpeedLlamaConfig
    _no_split_modules = ["SpeedLlamaDecoderLayer"]
    _supports_flash_attn = False  # not tried: upper caches have gaps where batches are padded
    _supports_flex_attn = False
    _can_compile_fullgraph = False  # how many rows go on is read off the data
    _can_record_outputs = {}


class SpeedLlamaModel(SpeedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: SpeedLlamaConfig):
        super().__init__(config)
        config.schedule()  # raises if the policy does not fit the model
        self.layers = nn.ModuleList(SpeedLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        if config.swiftkv_layers is not None:
            self.norm_swiftkv = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PolicyCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        decode_start: Any = None,
        decode_rows: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segment_sees: Tensor | None = None,
        packed: bool = False,
        **kwargs,
    ) -> PolicyModelOutput:
        """The last hidden states [B, T, d], zeros for prompt rows, which have none; packed=True: [B, R, d], only the
        rows that went through all layers (PolicyModelOutput).

        input_ids [B, T] or inputs_embeds [B, T, d]: the new tokens, padded on either side where attention_mask
        [B, cached + T] is 0. position_ids [B, T]: by default counted from the mask; consecutive, one sequence a row.
        decode_start: B positions, or one; tokens before it are prompt. By default: what the cache was told; else, if
        the policy's logits depend on it, where the last config.decode_marker begins, else the last token; else 0.
        Whoever feeds a prompt in pieces must pass it, and a PolicyCache, with the first: it is looked for in the tokens
        at hand.
        decode_rows [B, T]: instead of it, which rows are decode-phase. segment_ids [B, T], segment_sees [B, G, G]: the
        sequence is a tree, several questions on one passage (rows.segments_seen). These for training, without a
        cache. ValueError or TypeError says what does not fit.
        """
        for name in ("output_attentions", "output_hidden_states"):
            asked = kwargs.get(name)
            if getattr(self.config, name, False) if asked is None else asked:
                raise ValueError(f"{name}: layers have different rows here, so there is no such tensor; use hooks")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config, schedule = self.config, self.config.schedule()
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        whole_only = decode_rows is not None or segment_ids is not None
        if use_cache is None:
            use_cache = config.use_cache and not self.training and not whole_only
        if x.numel() == 0:
            raise ValueError(f"the input has the shape {list(x.shape[:2])}: it holds no token")
        cache = PolicyCache() if use_cache and past_key_values is None else past_key_values
        if cache is not None:
            if not isinstance(cache, PolicyCache):
                raise TypeError(f"past_key_values is a {type(cache).__name__}: a policy needs a PolicyCache")
            if whole_only:
                raise ValueError("decode_rows and segment_ids are for whole sequences without a cache")
            cache.check_policy(config.describe(), schedule.short_from)
            cache.check_batch(len(x))
        past = 0 if cache is None else cache.get_seq_length()
        valid = self.check_padding(attention_mask, past, x)
        if position_ids is not None and segment_ids is None:
            check_positions(position_ids.to(x.device), x, valid, past)
        if decode_start is not None:
            count = past + x.shape[1] if valid is None else valid.sum(1)
            decode_start = read_start(decode_start, x.new_zeros(len(x), dtype=torch.long) + count,
                                      in_pieces=past_key_values is not None)  # fmt: skip
        rows = self.choose_rows(x, valid, past, input_ids, position_ids, decode_start, decode_rows, cache)
        seen = None if segment_ids is None else (segment_ids.to(x.device), segment_sees.to(x.device).bool())
        wide_mask, narrow_mask, short_mask = self.make_masks(rows, valid, past, cache, x.dtype, seen)

        rope = rope_wide = self.rotary_emb(x, rows.positions)
        shares = "none" in schedule.source
        made: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values by layer, where others read them
        wide = swiftkv = None
        for i, layer in enumerate(self.layers[: config.num_hidden_layers]):
            if i == schedule.narrow_from:  # prompt rows stop: from here on x is narrow
                wide, x = x, rows.gather(x)
                rope = rows.gather(rope_wide[0]), rows.gather(rope_wide[1])
                swiftkv = self.norm_swiftkv(wide) if "swiftkv" in schedule.source else None
            source, short = schedule.source[i], i >= schedule.short_from
            kv_states = x
            if source == "stream" and wide is not None:
                kv_states = rows.merge(wide, x)
            elif source in ("swiftkv", "none"):
                kv_states = swiftkv if source == "swiftkv" else None
            keys, values = made[schedule.reads[i]] if source == "none" else (None, None)
            mask = wide_mask if wide is None else short_mask if short else narrow_mask
            x, keys, values = layer(x, kv_states, keys, values, rope, rope if short else rope_wide, mask,
                                    past_key_values=cache, swiftkv=swiftkv is not None)  # fmt: skip
            if shares:
                made[i] = keys, values
        x = self.norm(x)
        if not packed and rows.row_of is not None:
            x = take_rows(x, rows.row_of)
        return PolicyModelOutput(
            last_hidden_state=x, past_key_values=cache, decode_columns=rows.columns, row_of_column=rows.row_of
        )

    @staticmethod
    def check_padding(attention_mask: Tensor | None, past: int, x: Tensor) -> Tensor | None:
        """[B, past + T] bool, what is not padding; None: all."""
        if attention_mask is None:
            return None
        expected = [x.shape[0], past + x.shape[1]]
        if list(attention_mask.shape) != expected:
            raise ValueError(f"attention_mask has the shape {list(attention_mask.shape)}, expected {expected}: "
                             "one entry a cached or new token")  # fmt: skip
        valid = attention_mask.to(x.device).bool()
        if bool(valid.all()):
            return None
        if past and bool((valid[:, :past].any(1) & ~valid[:, past:].any(1)).any()):
            raise ValueError("a chunk holds only padding on the right of a sequence: pad on the left to use chunks")
        return valid

    def choose_rows(self, x: Tensor, valid: Tensor | None, past: int, input_ids: Tensor | None,
                    position_ids: Tensor | None, decode_start: Any, decode_rows: Tensor | None,
                    cache: PolicyCache | None) -> Rows:  # fmt: skip
        """Where each token stands and which rows visit all layers; see forward."""
        batch, length = x.shape[:2]
        real = x.new_ones(batch, length, dtype=torch.bool) if valid is None else valid[:, past:]
        if position_ids is not None:
            positions = position_ids.to(x.device).expand(batch, length)
        elif valid is None:
            positions = torch.arange(past, past + length, device=x.device).expand(batch, length)
        else:
            positions = (valid.cumsum(1) - 1).clamp(min=0)[:, past:]
        goes_on = decode_rows
        if decode_rows is None:
            start = self.find_split(input_ids, positions, real, decode_start, cache)
            goes_on = None if start is None else positions >= start[:, None]
        if self.config.split_matters() and self.config.policy == "speed" and self.config.anchor:
            if past and cache.short_positions is None:
                self.add_anchor(cache, batch)
            # The anchor is a row that never stops: nothing but itself is visible to it, so it stays exact.
            goes_on = goes_on.to(x.device).bool() | (positions == 0)
        return Rows.choose(positions, real, valid is None, None if goes_on is None else goes_on.to(x.device).bool())

    def find_split(self, input_ids: Tensor | None, positions: Tensor, real: Tensor, decode_start: Any,
                   cache: PolicyCache | None) -> Tensor | None:  # fmt: skip
        """decode_start [B] of this call; None: all rows go on."""
        batch = len(positions)
        if decode_start is not None:
            start = decode_start
        elif cache is not None and cache.decode_start is not None:
            return cache.split_of(batch).to(positions.device)
        elif self.config.split_matters():
            start = find_decode_start(self.config, input_ids, positions, real)
        else:
            return None
        if cache is not None:
            cache.begin_turn(start, self.config.keep_answers)
        return start

    def make_masks(self, rows: Rows, valid: Tensor | None, past: int, cache: PolicyCache | None, dtype: torch.dtype,
                   tree: tuple[Tensor, Tensor] | None) -> list[Tensor | None]:  # fmt: skip
        """For layers that all rows enter; for rows that go on, in caches of all tokens; and in short ones. The cache is
        told of the new slots in short ones."""
        batch, length = rows.real.shape
        columns = torch.arange(length, device=rows.real.device).expand(batch, length)
        going = rows.gather(columns)

        def mask(slot: Tensor, valid: Tensor | None, slots: int, query: Tensor, key: Tensor,
                 last: bool = True) -> Tensor | None:  # fmt: skip
            seen = None if tree is None else segments_seen(tree[1], tree[0].gather(1, query), tree[0].gather(1, key))
            return make_mask(slot, valid, slots, dtype, self.config._attn_implementation == "sdpa", seen, last)

        wide = mask(columns + past, valid, past + length, columns, columns)
        narrow = mask(
            going + past, valid, past + length, going, columns, last=length == 1
        )  # else it may be the anchor's
        if self.config.schedule().short_from == self.config.num_hidden_layers:
            return [wide, narrow, None]
        kept = rows.real if rows.columns is None else rows.columns >= 0
        positions = torch.where(kept, rows.gather(rows.positions), -1)
        if cache is not None:
            positions = cache.add_short(positions)
        slots, held = positions.shape[1], positions >= 0
        own = torch.arange(slots - going.shape[1], slots, device=going.device).expand_as(going)
        return [wide, narrow, mask(own, None if bool(held.all()) else held, slots, going, going)]

    @torch.no_grad()
    def add_anchor(self, cache: PolicyCache, batch: int) -> None:
        """Gives the upper layers of a cache that came from elsewhere their anchor's slot. Only itself is visible to
        position 0, so its keys and values depend on the BoS id alone."""
        if self.config.bos_token_id is None:
            raise ValueError("config.bos_token_id is None: the anchor of a cache from elsewhere cannot be made")
        alone = PolicyCache()
        bos = torch.full((1, 1), self.config.bos_token_id, device=self.embed_tokens.weight.device)
        self(bos, past_key_values=alone, decode_start=0)
        for i in range(cache.short_from, self.config.num_hidden_layers):
            layer = alone.layers[i]
            cache.update(layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1), i)
        cache.add_short(torch.zeros(batch, 1, dtype=torch.long, device=bos.device))


def read_start(decode_start: Any, count: Tensor, in_pieces: bool = False) -> Tensor:
    """[B]: a caller's decode_start, one number or B. count [B]: the tokens of each row. ValueError if a row has no such
    token; in_pieces: the token may still come."""
    start = torch.as_tensor(decode_start, device=count.device)
    if start.dim() > 1 or start.numel() not in (1, len(count)):
        raise ValueError(f"decode_start has the shape {list(start.shape)}, expected one position for each of "
                         f"{len(count)} rows")  # fmt: skip
    start = start.expand(len(count))
    wrong = start < 0 if in_pieces else (start < 0) | (start >= count)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        allowed = "0 or more" if in_pieces else f"0 to {int(count[row]) - 1}" if count[row] else "a row with tokens"
        raise ValueError(f"decode_start of row {row} is {int(start[row])}, expected {allowed}: it counts the row's own "
                         "tokens, and at least one of them is decode-phase")  # fmt: skip
    return start


def check_positions(position_ids: Tensor, x: Tensor, valid: Tensor | None, past: int) -> None:
    """ValueError if the positions of a row's tokens are not consecutive. Padding may have any."""
    positions = position_ids.expand(x.shape[:2])
    real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid[:, past:]
    offset = positions - real.cumsum(1)
    highest = torch.where(real, offset, offset.min()).amax(1)
    if bool((real & (offset != highest[:, None])).any()):
        raise ValueError("position_ids are not consecutive in a row: several sequences packed into one would see each "
                         "other. Give each a row with an attention_mask, or name them by segment_ids")  # fmt: skip


def find_decode_start(config: SpeedLlamaConfig, input_ids: Tensor | None, positions: Tensor, real: Tensor) -> Tensor:
    """[B]: the position where the last decode_marker among input_ids [B, T] begins; of the last token, where there is
    none, and under pop, whose boundary step that is (arXiv 2602.03295)."""
    start = torch.where(real, positions, -1).amax(1)
    marker = config.decode_marker
    if config.policy == "pop" or not marker or input_ids is None or input_ids.shape[1] < len(marker):
        return start
    found = (input_ids.unfold(1, len(marker), 1) == torch.tensor(marker, device=input_ids.device)).all(-1)
    found = found.to(real.device) & real.unfold(1, len(marker), 1).all(-1)
    at = torch.where(found, positions[:, : found.shape[1]], -1).amax(1)
    return torch.where(at >= 0, at, start)


class SpeedLlamaForCausalLM(SpeedLlamaPreTrainedModel, LlamaForCausalLM):
    """Use it as any causal model of transformers; see SpeedLlamaModel.forward for where a prompt ends."""

    def __init__(self, config: SpeedLlamaConfig):
        super().__init__(config)
        self.model = SpeedLlamaModel(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> "SpeedLlamaForCausalLM":
        """From a Hugging Face folder of any Llama, or from a .safetensors file that the engine's exporter wrote. The
        config's fields are keyword arguments: policy="speed", num_key_value_layers=24."""
        path = Path(str(pretrained_model_name_or_path))
        if path.suffix != ".safetensors" or not path.is_file():
            if path.suffix == ".safetensors" and not path.exists():
                raise FileNotFoundError(f"{path}: no such file")
            if path.is_dir() and "config" not in kwargs:
                values, _ = SpeedLlamaConfig.get_config_dict(path)
                k = SpeedLlamaConfig.from_dict(values).swiftkv_layers
                if k is not None:
                    kwargs.setdefault("swiftkv_only", lacks_ordinary(path, k))
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        values, tensors, divisors = read_exported(path)
        fields = {name: kwargs.pop(name) for name in FIELDS if name in kwargs}
        config = SpeedLlamaConfig.from_dict(values, **fields)
        config.has_rope_divisors = divisors is not None
        model = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        if divisors is not None:
            model.model.rotary_emb.inv_freq /= divisors.to(model.model.rotary_emb.inv_freq.device)
        return model

    def set_policy(self, **fields) -> None:
        """Changes the policy, K, anchor ... from the next call on; fields: the config's. ValueError, and nothing
        changed, if the model cannot run it. Full and share clear K; swiftkv takes the weights' own."""
        fields = complete(fields, self.config.swiftkv_layers)
        trial = copy.copy(self.config)
        for name, value in fields.items():
            setattr(trial, name, value)
        trial.schedule()
        for name, value in fields.items():
            setattr(self.config, name, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PolicyCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        decode_start: Any = None,
        decode_rows: Tensor | None = None,
        segment_ids: Tensor | None = None,
        segment_sees: Tensor | None = None,
        packed: bool = False,
        **kwargs,
    ) -> PolicyCausalLMOutput:
        """Logits [B, T, vocabulary], zeros for prompt rows; packed=True: [B, R, vocabulary], only of the rows that went
        through all layers, which spares memory in training. Arguments: SpeedLlamaModel.forward and transformers' own.

        labels [B, T]: as in transformers, the loss is the mean over those that are not -100, each predicted by the row
        before it. ValueError if that is a prompt row: only decode-phase rows predict.
        """
        return_dict = kwargs.pop("return_dict", None)  # PEFT passes None
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                         decode_start, decode_rows, segment_ids, segment_sees, packed=True, **kwargs)  # fmt: skip
        hidden, row_of = out.last_hidden_state, out.row_of_column
        loss = logits = None
        if packed or labels is not None:
            logits = self.lm_head(hidden)
        if labels is not None:
            targets = packed_targets(labels, out.decode_columns)
            loss = self.loss_function(
                logits=logits, labels=None, vocab_size=self.config.vocab_size, shift_labels=targets, **kwargs
            )
        if not packed:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep

            def columns(x: Tensor) -> Tensor:
                return x[:, keep] if row_of is None else take_rows(x, row_of[:, keep])

            logits = self.lm_head(columns(hidden)) if logits is None else columns(logits)
        result = PolicyCausalLMOutput(
            loss=loss, logits=logits, past_key_values=out.past_key_values, decode_columns=out.decode_columns
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, **kwargs) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if inputs.get("attention_mask") is not None:
            inputs.pop("position_ids", None)  # transformers' would be wrong after padding on the right
        return inputs

    def generate(self, inputs=None, generation_config=None, **kwargs):
        """transformers' generate. decode_start: B positions that override config.decode_marker. past_key_values: a
        PolicyCache, the same for each turn of a conversation. What a policy's cache cannot do is refused by name."""
        settings = generation_config or self.generation_config
        kind = kwargs.get("cache_implementation", settings.cache_implementation)
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation {kind!r}: a policy needs its own, growing cache; leave it out")
        cache = kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, PolicyCache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}: a policy needs a PolicyCache")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            raise ValueError("generate needs input_ids, a prompt of at least the BoS token")
        if kwargs.get("attention_mask") is None:
            pad = kwargs.get("pad_token_id", settings.pad_token_id)
            if ids is not None and len(ids) > 1 and pad is not None and bool((ids[:, [0, -1]] == pad).any()):
                raise ValueError("a padded batch needs its attention_mask: the split is found by it")
            kwargs["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        if cache is not None:
            cache.check_batch(len(tokens))
        count = kwargs["attention_mask"].sum(1)
        if not bool(count.all()):
            raise ValueError(
                f"row {int((count == 0).nonzero()[0])} of the prompt is empty: give it at least the BoS token"
            )
        start = kwargs.pop("decode_start", None)
        if start is not None:
            start = read_start(start, count.to(tokens.device))
        elif self.config.schedule().narrow_from < self.config.num_hidden_layers - 1:
            mask = kwargs["attention_mask"]
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            start = find_decode_start(self.config, ids, positions, mask[:, -tokens.shape[1] :].bool())
        if kwargs.get("use_cache", settings.use_cache) is False:
            if start is not None:
                kwargs["decode_start"] = start
        else:
            cache = kwargs["past_key_values"] = PolicyCache() if cache is None else cache
            # An assistant is called again and again in one turn, which began with its first call.
            goes_on = getattr(settings, "is_assistant", False) and cache.decode_start is not None
            if start is not None and not goes_on:
                cache.begin_turn(start, self.config.keep_answers)
        return super().generate(inputs, generation_config, **kwargs)

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError("continuous batching pages all layers alike, which a policy does not: use generate")


def packed_targets(labels: Tensor, columns: Tensor | None) -> Tensor:
    """[B, R]: what each row that went on is to predict, the label of the next column; -100: nothing. labels [B, T];
    columns [B, R], see PolicyModelOutput. ValueError if a row that stopped has something to predict."""
    targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if columns is None:
        return targets
    columns = columns.to(labels.device)
    taken = torch.where(columns >= 0, targets.gather(1, columns.clamp(min=0)), -100)
    if int((taken != -100).sum()) != int((targets != -100).sum()):
        raise ValueError("labels: a prompt row has one to predict; set decode_start, or -100 there")
    return taken


def apply_policy(model: LlamaForCausalLM, **fields) -> SpeedLlamaForCausalLM:
    """Puts a loaded LlamaForCausalLM under a policy, in place, and returns it: same weights and hooks, another forward
    pass. fields: as for set_policy. TypeError for another model, or for one spread by a device map; ValueError for a
    policy or an attention implementation that cannot be."""
    if type(model) is not LlamaForCausalLM:
        raise TypeError(f"{type(model).__name__}: apply_policy takes a LlamaForCausalLM")
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise TypeError("this model is spread by a device map: load it by SpeedLlamaForCausalLM.from_pretrained")
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation {attention!r}: a policy runs with sdpa and eager only")
    config = SpeedLlamaConfig.from_dict(model.config.to_dict(), **complete(fields, None))
    config._attn_implementation = attention
    config.schedule()
    kinds = {LlamaModel: SpeedLlamaModel, LlamaForCausalLM: SpeedLlamaForCausalLM,
             LlamaDecoderLayer: SpeedLlamaDecoderLayer, LlamaAttention: SpeedLlamaAttention}  # fmt: skip
    for module in model.modules():
        module.__class__ = kinds.get(type(module), type(module))
        if hasattr(module, "config"):
            module.config = config
    return model
