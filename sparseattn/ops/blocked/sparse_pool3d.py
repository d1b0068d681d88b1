"""Pooling of active patches in plain torch: chunk by chunk, tap by tap, nothing scattered.

Windows inside a patch read it in place; others read a copy of it with the halo they need.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.ops.blocked.patch_conv3d import WORKSPACE, Sides, halo_index
from sparseattn.ops.blocked.plan import accumulate_dtype


class Pool(NamedTuple):
    """One pooling. Sizes along x, y and z of a patch and of the window.

    neighbours [P, prod(2 * reach + 1)]: rows, -1 where a patch is not active, -2 outside.
    shares: by what to multiply each sum, [P, qx, qy, qz]; None: `share` for all.
    """

    neighbours: Tensor
    shares: Tensor | None
    share: float
    patch: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    is_max: bool

    @property
    def pooled(self) -> tuple[int, ...]:
        """Sites of a patch of the output along each axis."""
        return tuple(p // s for p, s in zip(self.patch, self.stride, strict=True))

    @property
    def reach(self) -> tuple[int, ...]:
        """How many patches away a window reaches."""
        return tuple(-(-pad // p) for pad, p in zip(self.padding, self.patch, strict=True))


def forward(x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Return y [P, qx, qy, qz, C] and, of a maximum, which tap it is in int16."""
    y = x.new_empty((x.shape[0], *pool.pooled, x.shape[4]))
    taps = x.new_empty(y.shape if pool.is_max else (0,), dtype=torch.int16)
    rest = zip(pool.kernel, pool.stride, pool.padding, strict=True)
    after = [max(0, k - s - pad) for k, s, pad in rest]
    sides = list(zip(pool.padding, pool.patch, after, strict=True))
    for rows in _chunks(x, sides):
        blocks = _blocks(x, pool, rows, sides, -torch.inf if pool.is_max else 0.0)
        (sx, sy, sz), (qx, qy, qz) = pool.stride, pool.pooled
        parts = [
            blocks[:, a::sx, b::sy, c::sz][:, :qx, :qy, :qz]
            for a, b, c in itertools.product(*map(range, pool.kernel))
        ]
        if pool.is_max:
            _maximum(parts, y[rows], taps[rows])
        else:
            total = torch.zeros(y[rows].shape, dtype=accumulate_dtype(x.dtype), device=x.device)
            for part in parts:
                total += part
            y[rows] = total * _shares(pool, rows, total.dtype)
    return y, taps


def backward(dy: Tensor, taps: Tensor, pool: Pool) -> Tensor:
    """Return dx [P, px, py, pz, C]: each site collects from the windows that read it."""
    dx = dy.new_empty((dy.shape[0], *pool.patch, dy.shape[4]))
    steps = [
        [_step(tap, stride, pad) for tap in range(kernel)]
        for kernel, stride, pad in zip(pool.kernel, pool.stride, pool.padding, strict=True)
    ]
    sides = [
        (max(0, *(-move for _, move in axis)), size, max(0, *(move for _, move in axis)))
        for axis, size in zip(steps, pool.pooled, strict=True)
    ]
    sums = accumulate_dtype(dy.dtype)
    sent = dy if pool.is_max else dy.to(sums) * _shares(pool, slice(None), sums)
    for rows in _chunks(dy, sides):
        total = torch.zeros(dx[rows].shape, dtype=sums, device=dy.device)
        blocks = _blocks(sent, pool, rows, sides, 0.0)
        chosen = _blocks(taps, pool, rows, sides, -1) if pool.is_max else None
        for tap, axes in enumerate(itertools.product(*steps)):
            into, read = total, blocks
            found = chosen
            for axis, (first, move) in enumerate(axes):
                into = into[(slice(None),) * (axis + 1) + (slice(first, None, pool.stride[axis]),)]
                read = read.narrow(axis + 1, sides[axis][0] + move, pool.pooled[axis])
                if found is not None:
                    found = found.narrow(axis + 1, sides[axis][0] + move, pool.pooled[axis])
            into += read if found is None else torch.where(found == tap, read, 0)
        dx[rows] = total.to(dx.dtype)
    return dx


def _step(tap: int, stride: int, padding: int) -> tuple[int, int]:
    """Return which sites a tap reads, `first + stride * j`, and that window j + move reads them."""
    first = (tap - padding) % stride
    return first, (first + padding - tap) // stride


def _maximum(parts: list[Tensor], y: Tensor, taps: Tensor) -> None:
    """Write the maximum over parts and its first place, as torch does: NaN is above all."""
    y.copy_(parts[0])
    for part in parts[1:]:
        torch.maximum(y, part, out=y)
    for tap in reversed(range(len(parts))):
        taps.masked_fill_(parts[tap] == y, tap)
    if bool(y.isnan().any()):  # which equals nothing; torch takes the last
        for tap, part in enumerate(parts):
            taps.masked_fill_(part.isnan(), tap)


def _shares(pool: Pool, rows: slice, dtype: torch.dtype) -> Tensor | float:
    return pool.share if pool.shares is None else pool.shares[rows, ..., None].to(dtype)


def _chunks(x: Tensor, sides: Sides) -> list[slice]:
    """Cut the patches into chunks that fit the workspace with their halo."""
    site = 1
    for side in sides:
        site *= sum(side)
    step = max(1, WORKSPACE // max(1, 4 * site * x.shape[4]))
    return [slice(first, first + step) for first in range(0, x.shape[0], step)]


def _blocks(x: Tensor, pool: Pool, rows: slice, sides: Sides, outside: float) -> Tensor:
    """Return patches with their halo, 0 where nothing is active; views of them without one."""
    if not any(pool.padding):
        return x[rows]
    index, shape = halo_index(pool.neighbours[rows], pool.reach, sides)
    sites = x.shape[1] * x.shape[2] * x.shape[3]
    blocks = x.flatten(0, 3).index_select(0, index.clamp_min(0))
    blocks.index_fill_(0, (index < 0).nonzero()[:, 0], 0)
    blocks.index_fill_(0, (index < -sites).nonzero()[:, 0], outside)
    return blocks.view(-1, *shape, x.shape[4])
