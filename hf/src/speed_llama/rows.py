"""Which rows of a batch go on where prompt rows stop, and who sees whom.

B: sequences, T: columns of this call (padding included), R: most rows that go on in one sequence, S: slots of a cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """The rows of one call.

    positions [B, T]: index of each token in its own sequence, padding not counted. real [B, T]: not padding.
    columns [B, R]: the columns of the rows that go on, in order, -1 where a sequence has fewer than R; None: all go on.
    row_of [B, T]: the row among those R whose result a column shows: its own; for padding on the right that of the last
    real token before it; -1 for a row that stopped. None: each column shows its own."""

    positions: Tensor
    real: Tensor
    columns: Tensor | None
    row_of: Tensor | None

    @classmethod
    def choose(cls, positions: Tensor, real: Tensor, all_real: bool, goes_on: Tensor | None) -> "Rows":
        """goes_on [B, T]: the rows that go on; None: all do. Reads one number off the device (R)."""
        if goes_on is None or (all_real and bool(goes_on.all())):
            row_of = None
            if not all_real:
                row_of = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
            return cls(positions, real, None, row_of)
        goes_on = goes_on & real
        count = goes_on.sum(1)
        order = (~goes_on).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]
        columns = torch.where(torch.arange(order.shape[1], device=order.device) < count[:, None], order, -1)
        row_of = torch.where(goes_on, goes_on.cumsum(1) - 1, -1)
        row_of = torch.where(real, row_of, row_of.cummax(1).values)
        return cls(positions, real, columns, row_of)

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, R, ...], the rows that go on. Where a sequence has fewer, column 0 stands in."""
        if self.columns is None:
            return x
        index = self.columns.clamp(min=0).to(x.device)
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))

    def merge(self, wide: Tensor, x: Tensor) -> Tensor:
        """[B, T, d]: x [B, R, d] for the rows that went on, wide [B, T, d] for those that stopped."""
        if self.columns is None or x.shape[1] == 0:
            return x if self.columns is None else wide
        own = (self.row_of >= 0) & self.real
        return torch.where(own[..., None].to(x.device), take_rows(x, self.row_of), wide.to(x.device))


def take_rows(x: Tensor, row_of: Tensor) -> Tensor:
    """[B, R, d], [B, C] -> [B, C, d]: the named rows, zeros where row_of is -1."""
    if x.shape[1] == 0:
        return x.new_zeros(*row_of.shape, x.shape[2])
    row_of = row_of.to(x.device)
    taken = x.gather(1, row_of.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return taken * (row_of >= 0)[..., None]


@dataclass
class Segments:
    """A sequence as a tree: ids [B, T], the segment of each column; sees [B, G, G], sees[b, i, j]: segment i sees j."""

    ids: Tensor
    sees: Tensor

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """query [B, R], key [B, S]: segments -> [B, R, S]"""
        sees = self.sees[torch.arange(len(query), device=query.device)[:, None], query]  # [B, R, G]
        return sees.gather(2, key[:, None].expand(-1, query.shape[1], -1))


def make_mask(query_slot: Tensor, valid: Tensor | None, slots: int, dtype: torch.dtype, boolean: bool,
              tree: Tensor | None = None) -> Tensor | None:  # fmt: skip
    """[B, 1, R, S], what each query sees: every valid slot up to its own. True or 0 where it sees, False or the dtype's
    lowest number where not; None if one query sees all slots, or that is the causal order which sdpa knows itself.

    query_slot [B, R]: the slot of each query's own token. valid [B, S]: slots that hold a token; None: all of them.
    tree [B, R, S]: a further restriction. A query always sees its own slot, so padding gives no row without any."""
    rows = query_slot.shape[1]
    if valid is None and tree is None and (rows == 1 or (rows == slots and boolean)):
        return None
    slot = torch.arange(slots, device=query_slot.device)
    visible = slot <= query_slot[..., None]
    if valid is not None:
        visible = visible & valid[:, None]
    if tree is not None:
        visible = visible & tree
    visible = (visible | (slot == query_slot[..., None]))[:, None]
    if boolean:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
