"""Which blocks of a row have the highest scores: counts, shares and weights, ties to the lowest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SHARE_UNIT = 2**30  # shares of a row are whole numbers of this: any order of adding is exact


def select_blocks(
    scores: Tensor,
    count: int,
    budgets: Tensor | None = None,
    weights: Tensor | None = None,
    always: Tensor | None = None,
    impl: str = "torch",
) -> Tensor:
    """Return which blocks every row keeps, bool like `scores` [B, H, R, C].

    A row keeps its `count` highest scores; equal ones go to the lowest index, -inf and NaN are
    never kept. With budgets (int32 [B or 1, H or 1, R]) a row keeps as many as its budget says;
    with weights too (int32 like scores), the fewest that weigh as much. always (bool, up to four
    dimensions that broadcast) is kept besides. impl: "triton" for kernels, "torch" for any device.
    """
    if always is not None:
        always = always[(None,) * (4 - always.dim())]
    if impl == "triton":
        return torch.ops.sparseattn.select_blocks.default(scores, count, budgets, weights, always)
    if budgets is None:
        kept = top_blocks(scores, count)
    else:
        kept = _ranked_blocks(scores, budgets, weights)
    return kept if always is None else kept | always


def top_blocks(scores: Tensor, count: int) -> Tensor:
    """Return bool like `scores`: the `count` highest of every row, ties to the lowest index."""
    if count == 0 or scores.shape[-1] == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    bar = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > bar, scores == bar
    room = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    kept = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    return kept & (scores > -math.inf)


def threshold_budgets(scores: Tensor, least: float) -> Tensor:
    """Return how many blocks of each row have a share of at least `least`; 1 if none has.

    A share is a block's part of the softmax over its row.
    """
    budgets = (scores.softmax(-1) >= least).sum(-1, dtype=torch.int32)
    return budgets.clamp(min=1)


def share_budgets(scores: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Return budgets and weights with which a row keeps the fewest blocks of `most` of its shares.

    Shares below 2**-31 count as nothing.
    """
    shares = scores.softmax(-1).nan_to_num(nan=0.0)  # a row that may keep nothing
    weights = (shares * _SHARE_UNIT).round().to(torch.int32)
    total = weights.sum(-1, dtype=torch.int64)
    budgets = (total.double() * most).ceil().clamp(min=1)
    return budgets.to(torch.int32), weights


def _ranked_blocks(scores: Tensor, budgets: Tensor, weights: Tensor | None) -> Tensor:
    """Return bool like `scores`: the shortest head of each ranked row that weighs its budget."""
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    may = scores > -math.inf
    weights = may.to(torch.int32) if weights is None else torch.where(may, weights, 0)
    ranks = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = weights.gather(-1, ranks)
    before = ranked.cumsum(-1, dtype=torch.int64) - ranked
    fits = before < budgets[..., None]
    return torch.zeros_like(may).scatter(-1, ranks, fits) & may


_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "select_blocks(Tensor scores, SymInt count, Tensor? budgets, Tensor? weights, Tensor? always) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _select(
    scores: Tensor,
    count: int,
    budgets: Tensor | None,
    weights: Tensor | None,
    always: Tensor | None,
) -> Tensor:
    try:
        import sparseattn.kernels.block_select.select as kernels
    except ImportError:  # no Triton beside this torch
        return select_blocks(scores, count, budgets, weights, always).contiguous()
    return kernels.select(scores.float(), count, budgets, weights, always)


def _select_fake(
    scores: Tensor,
    count: int,
    budgets: Tensor | None,
    weights: Tensor | None,
    always: Tensor | None,
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


for _device in ("CPU", "CUDA"):
    _library.impl("select_blocks", _select, _device)
torch.library.register_fake("sparseattn::select_blocks", _select_fake, lib=_library)
