"""Convolution through a kernel map in plain torch: a gather and a product for each tap.

Outputs are made in chunks whose features, gathered through one tap, fit a bounded workspace. Only
pairs that exist are read and multiplied; taps and chunks are taken in order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseattn.ops.blocked.plan import accumulate_dtype

WORKSPACE = 4 * 2**20  # bytes of features of one chunk: what was read, and sums


def forward(
    x: Tensor, rows: Tensor, order: Tensor | None, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Return y [N_out, C_out] in the dtype of x [N_in, C_in]; rows and order are KernelMap's."""
    taps = by_taps(weight, groups).transpose(2, 3)  # [taps, G, IN, OUT]
    return _multiply(x, rows, order, taps, bias)


def input_gradient(
    dy: Tensor, rows: Tensor, order: Tensor | None, weight: Tensor, groups: int, flipped: bool
) -> Tensor:
    """Return dx [N_in, C_in], read through the map of the transposed convolution.

    flipped: the rows are those of a symmetric map, so its taps come in reverse order.
    """
    taps = by_taps(weight, groups)  # [taps, G, OUT, IN]
    return _multiply(dy, rows, order, taps.flip(0) if flipped else taps, None)


def weight_gradient(
    x: Tensor, dy: Tensor, rows: Tensor, order: Tensor | None, shape: torch.Size, groups: int
) -> Tensor:
    """Return dW of a shape [C_out, C_in / groups, kx, ky, kz], in the wide dtype."""
    wide, outer = accumulate_dtype(x.dtype), shape[0] // groups
    dw = torch.zeros((len(rows), groups, outer, shape[1]), dtype=wide, device=x.device)
    for columns in _chunks(rows, x.shape[1] + 2 * dy.shape[1], wide):
        place = columns if order is None else order[columns]
        sent = dy[place].to(wide)
        for total, (found, source) in zip(dw, _pairs(rows[:, columns]), strict=True):
            read = x.index_select(0, source).to(wide)
            b = sent if found is None else sent.index_select(0, found)
            if groups == 1:
                total[0].addmm_(b.mT, read)
            elif outer == shape[1] == 1:
                total.view(-1).add_((read * b).sum(0))
            else:
                total.baddbmm_(_grouped(b, groups).mT, _grouped(read, groups))
    return dw.permute(1, 2, 3, 0).reshape(shape)


def by_taps(weight: Tensor, groups: int) -> Tensor:
    """Return a weight [C_out, C_in / groups, kx, ky, kz] as [taps, G, C_out / G, C_in / G]."""
    return weight.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 1, 2)


def _multiply(
    x: Tensor, rows: Tensor, order: Tensor | None, taps: Tensor, bias: Tensor | None
) -> Tensor:
    """Return y_i = bias + sum_t x[rows[t, i]] taps[t], with taps [taps, G, IN, OUT]."""
    groups, inner, outer = taps.shape[1:]
    channels, wide = groups * outer, accumulate_dtype(x.dtype)
    taps = taps.to(wide).contiguous()
    y = x.new_empty((rows.shape[1], channels))
    for columns in _chunks(rows, x.shape[1] + 2 * channels, wide):
        sums = torch.zeros((columns.stop - columns.start, channels), dtype=wide, device=x.device)
        if bias is not None:
            sums += bias
        for tap, (found, source) in zip(taps, _pairs(rows[:, columns]), strict=True):
            read = x.index_select(0, source).to(wide)
            kept = sums if found is None else sums.index_select(0, found)
            if groups == 1:
                kept.addmm_(read, tap[0])
            elif inner == outer == 1:
                kept.addcmul_(read, tap.view(-1))
            else:
                _grouped(kept, groups).add_(_grouped(read, groups) @ tap)
            if found is not None:
                sums.index_copy_(0, found, kept)
        y[columns if order is None else order[columns]] = sums.to(x.dtype)
    return y


def _chunks(rows: Tensor, numbers: int, wide: torch.dtype) -> list[slice]:
    """Cut the columns of rows into chunks; each column keeps so many numbers in the workspace."""
    count = rows.shape[1]
    step = max(1, WORKSPACE // (numbers * wide.itemsize))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _pairs(rows: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """Yield for each tap the columns that find an input, None for all, and the rows they read."""
    for source in rows:
        found = (source >= 0).nonzero()[:, 0]
        whole = len(found) == len(source)
        yield (None, source) if whole else (found, source.index_select(0, found))


def _grouped(features: Tensor, groups: int) -> Tensor:
    """Return features [n, C] as a view [G, n, C / G]."""
    return features.view(len(features), groups, features.shape[1] // groups).transpose(0, 1)
