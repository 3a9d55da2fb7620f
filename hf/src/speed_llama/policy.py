"""The five policies as one schedule: for every layer, which tokens enter it and where its keys and values come from.

A *prompt token* leaves nothing but keys and values for later tokens. So it stops at the last layer in which it makes
some; a *decode-phase token* (the assistant header, the answer) visits all layers.

full (K = L): every layer has the keys and values of every token.
speed, SPEED (arXiv 2605.06105): a layer l >= K has those of the anchor, position 0, and of decode-phase tokens; other
    prompt tokens have no slot there.
pop, POP (arXiv 2602.03295): in a layer l >= K those of a prompt token are made by the layer's own norm and projections
    from h_K, the residual stream that enters layer K.
swiftkv, SwiftKV (arXiv 2410.03960): in the first layer of each group above K those of every token are made by SwiftKV's
    own projections from RMSNorm(h_K); the group's other layers read them.
share, R-CLA (arXiv 2604.22782): there is no K; a dropped layer reads the cache of the nearest kept layer below.
"""

from dataclasses import dataclass
from typing import Literal

POLICIES = ("full", "speed", "pop", "swiftkv", "share")

# Where a layer's new keys and values come from: the rows that enter the layer; the residual stream of every row, frozen
# for those that stopped; SwiftKV's normed h_K of every row; or nowhere, the layer reads another layer's.
Source = Literal["rows", "stream", "swiftkv", "none"]


@dataclass(frozen=True)
class Schedule:
    """What each of L layers does.

    narrow_from: prompt rows make no query in this layer and above; all rows enter the layers below.
    source: L entries. reads: L entries, the layer whose cache each layer reads (itself, or one below).
    short_from: caches of this layer and above hold only the anchor and decode-phase tokens; L if there is none.
    """

    narrow_from: int
    source: tuple[Source, ...]
    reads: tuple[int, ...]
    short_from: int


def make_schedule(
    policy: str,
    layers: int,
    k: int | None = None,
    kept: list[int] | None = None,
    swiftkv_k: int | None = None,
    group: int = 1,
    has_ordinary: bool = True,
) -> Schedule:
    """The schedule of a policy on a model of `layers` layers.

    k: a prompt token visits layers 0..k-1; None under full and share. kept: share's layers with a cache of their own.
    swiftkv_k, group: the layer from which the model has SwiftKV projections (None: it has none), and their group size.
    has_ordinary: the model has the ordinary projections in those layers too. ValueError says what does not fit."""
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if policy == "swiftkv" and swiftkv_k is None:
        raise ValueError("policy swiftkv needs projections trained for it; this model has none")
    if policy in ("full", "share"):
        if k not in (None, layers):
            raise ValueError(f"policy {policy} takes no num_key_value_layers, got {k}")
        k = layers
    elif k is None:
        raise ValueError(f"policy {policy} needs a K: give num_key_value_layers")
    if not 1 <= k <= layers:
        raise ValueError(f"num_key_value_layers is {k}, expected 1 to {layers}")
    if not has_ordinary and (policy != "swiftkv" or k == layers):
        raise ValueError("this model has SwiftKV's projections only: use policy swiftkv with its own K")
    itself, last = tuple(range(layers)), layers - 1
    if policy == "share":
        if not kept or sorted(set(kept)) != list(kept) or kept[0] != 0 or kept[-1] >= layers:
            raise ValueError(f"kept_layers is {kept}, expected ascending layers below {layers}, with layer 0")
        reads = tuple(max(j for j in kept if j <= i) for i in itself)
        source = tuple("none" if i != j else "rows" if i < kept[-1] else "stream" for i, j in enumerate(reads))
        return Schedule(kept[-1], source, reads, layers)
    if k == layers:
        return Schedule(last, ("rows",) * last + ("stream",), itself, layers)
    if policy == "speed":
        return Schedule(k - 1, ("rows",) * (k - 1) + ("stream",) + ("rows",) * (layers - k), itself, k)
    if policy == "pop":
        return Schedule(k, ("rows",) * k + ("stream",) * (layers - k), itself, layers)
    if swiftkv_k != k:
        raise ValueError(f"policy swiftkv with K = {k} needs projections trained for it; this model has them for "
                         f"K = {swiftkv_k}")  # fmt: skip
    reads = tuple(i if i < k else i - (i - k) % group for i in itself)
    source = tuple("rows" if i < k else "swiftkv" if i == reads[i] else "none" for i in itself)
    return Schedule(k, source, reads, layers)
