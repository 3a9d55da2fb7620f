"""Which rows of a batch go on where prompt rows stop, and who sees whom.

B: sequences, T: columns of this call, padding included, R: most rows of a sequence that go on, S: slots of a cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """The rows of one call.

    positions [B, T]: the place of each token in its own sequence, padding not counted. real [B, T]: not padding.
    columns [B, R]: the columns of the rows that go on, in order, -1 where a sequence has fewer; None: all go on.
    row_of [B, T]: the row whose result a column shows: its own; for padding on the right that of the last real token
    before it; -1 for a row that stopped. None: each column its own.
    """

    positions: Tensor
    real: Tensor
    columns: Tensor | None
    row_of: Tensor | None

    @classmethod
    def choose(cls, positions: Tensor, real: Tensor, all_real: bool, goes_on: Tensor | None) -> "Rows":
        """goes_on [B, T]: the rows that go on; None: all do. Reads one number off the device, R."""
        if goes_on is None or (all_real and bool(goes_on.all())):
            last = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).cummax(1).values
            return cls(positions, real, None, None if all_real else last)
        goes_on = goes_on & real
        count = goes_on.sum(1)
        order = (~goes_on).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]
        columns = torch.where(torch.arange(order.shape[1], device=order.device) < count[:, None], order, -1)
        own = torch.where(goes_on, goes_on.cumsum(1) - 1, -1)
        return cls(positions, real, columns, torch.where(real, own, own.cummax(1).values))

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, R, ...], the rows that go on. Where a sequence has fewer, column 0 stands in."""
        if self.columns is None:
            return x
        index = self.columns.clamp(min=0).to(x.device)
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))

    def merge(self, wide: Tensor, x: Tensor) -> Tensor:
        """[B, T, d]: the rows x [B, R, d] where they went on, those of wide [B, T, d] where they stopped."""
        if self.columns is None:
            return x
        own = ((self.row_of >= 0) & self.real)[..., None].to(x.device)
        return torch.where(own, take_rows(x, self.row_of), wide.to(x.device))


def take_rows(x: Tensor, row_of: Tensor) -> Tensor:
    """[B, R, d], [B, C] -> [B, C, d]: the named rows, zeros where row_of is -1."""
    if x.shape[1] == 0:
        return x.new_zeros(*row_of.shape, x.shape[2])
    row_of = row_of.to(x.device)
    taken = x.gather(1, row_of.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return taken * (row_of >= 0)[..., None]


def make_mask(
    slot: Tensor,
    valid: Tensor | None,
    slots: int,
    dtype: torch.dtype,
    boolean: bool,
    seen: Tensor | None = None,
    last: bool = False,
) -> Tensor | None:
    """[B, 1, R, S], what each query sees: every valid slot up to its own. True or 0 where it sees, False or the dtype's
    lowest number where not. None, if the only query is the last slot's (last), or in the causal order that sdpa knows.

    slot [B, R]: the slot of each query's own token. valid [B, S]: slots that hold a token; None: all of them.
    seen [B, R, S]: a further restriction. A query always sees its own slot, so that padding is never without any.
    """
    rows = slot.shape[1]
    if valid is None and seen is None and ((rows == 1 and last) or (rows == slots and boolean)):
        return None
    every = torch.arange(slots, device=slot.device)
    visible = every <= slot[..., None]
    if valid is not None:
        visible = visible & valid[:, None]
    if seen is not None:
        visible = visible & seen
    visible = (visible | (every == slot[..., None]))[:, None]
    if boolean:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def segments_seen(sees: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[B, R, S] for a sequence that is a tree of segments. sees [B, G, G]: sees[b, i, j], segment i sees segment j.
    query [B, R], key [B, S]: the segment of each."""
    rows = sees[torch.arange(len(query), device=query.device)[:, None], query]
    return rows.gather(2, key[:, None].expand(-1, query.shape[1], -1))
