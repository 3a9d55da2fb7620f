"""The KV cache of a model under a policy: layers of two lengths, and what is needed to keep them apart."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache


class PolicyCache(DynamicCache):
    """One for a conversation, or for a batch of them: pass it to `generate` again for the next turn.

    decode_start [B]: tokens before this position are prompt; None until a call sets it. A cache of B sequences serves a
    batch of a multiple of B, as beam search makes it.
    short_positions [B, S]: under speed, the position of each slot in the caches of upper layers, -1 for padding."""

    def __init__(self) -> None:
        super().__init__()
        self.decode_start: Tensor | None = None
        self.short_positions: Tensor | None = None
        self.short_from: int | None = None
        self.made_under: str | None = None

    @classmethod
    def from_layers(cls, layers: Iterable[Sequence[Tensor]], decode_start: Tensor) -> "PolicyCache":
        """A cache whose lowest layers are given, as another process computed them: (keys, values), each
        [B, KV heads, tokens, head size], for every layer below K. decode_start [B]."""
        cache = cls()
        for i, (keys, values, *_) in enumerate(layers):
            cache.update(keys, values, i)
        cache.decode_start = decode_start
        return cache

    def check_policy(self, made_under: str, short_from: int) -> None:
        """ValueError if the cache was filled under another policy, K or kept set."""
        if self.made_under not in (None, made_under):
            raise ValueError(f"the cache was filled under {self.made_under}, the model has {made_under}: start anew")
        self.made_under, self.short_from = made_under, short_from

    def check_batch(self, batch: int) -> None:
        """ValueError if the cache was filled by a batch of another size."""
        held = self.layers[0].keys.shape[0] if self.get_seq_length() else batch
        if held != batch:
            raise ValueError(f"the cache holds {held} sequences, the batch has {batch}: use the same for each turn")

    def begin_turn(self, decode_start: Tensor, keep_answers: bool = False) -> None:
        """From here on, tokens before decode_start [B] are prompt: answers of earlier turns too, which lose their slots
        in the upper layers unless keep_answers. ValueError if a cached token would have to become decode-phase."""
        before, positions = self.decode_start, self.short_positions
        if before is not None and torch.equal(before.to(decode_start), decode_start):
            return
        if positions is not None and bool((positions >= decode_start.to(positions)[:, None]).any()):
            raise ValueError("decode_start lies before tokens that the cache already holds; crop it or start anew")
        self.decode_start = decode_start
        if positions is None or keep_answers:
            return
        anchor = positions == 0  # one slot a sequence, or none at all
        count = int(anchor.any())
        slot = anchor.to(torch.uint8).argmax(1)[:, None][:, :count]
        self.short_positions = positions.gather(1, slot)
        for layer in self.layers[self.short_from :]:
            _, heads, _, size = layer.keys.shape
            index = slot.to(layer.keys.device)[:, None, :, None].expand(-1, heads, -1, size)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)

    def split_of(self, batch: int) -> Tensor | None:
        """decode_start for a batch of `batch` sequences."""
        if self.decode_start is None or len(self.decode_start) == batch:
            return self.decode_start
        return self.decode_start.repeat_interleave(batch // len(self.decode_start))

    def add_short(self, positions: Tensor) -> Tensor:
        """Notes the new slots' positions [B, R] in upper layers; returns those of all slots, [B, S]."""
        if self.short_positions is not None:
            positions = torch.cat([self.short_positions, positions], 1)
        self.short_positions = positions
        return positions

    def _each(self, change) -> None:
        for name in ("decode_start", "short_positions"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, change(x))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.decode_start is not None:
            self.decode_start = self.split_of(len(beam_idx))
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])
        super().batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens. Under speed they must be decode-phase tokens of an unpadded
        sequence, which have one slot in every layer; those that assisted generation takes back are."""
        if tokens_to_remove < 0 and self.short_positions is not None:
            removed = self.short_positions[:, tokens_to_remove:]
            if removed.shape[1] < -tokens_to_remove or bool((removed < self.split_of(len(removed))[:, None]).any()):
                raise ValueError("only decode-phase tokens without padding can be cropped off a cache under speed")
            self.short_positions = self.short_positions[:, :tokens_to_remove]
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.decode_start = self.short_positions = self.made_under = None
        super().reset()
