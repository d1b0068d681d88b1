"""Convolution of active patches in plain torch: cost and memory follow the active patches.

Chunks of patches are copied out with a halo of what their neighbours hold, and torch's dense
convolution without padding runs on them; nothing of what it computes is thrown away. Small patches
are too small for it: there all that a site reads is laid side by side, for one product of matrices.
The workspace is bounded, and chunks are taken in order.

With a stride the output's patches have 1 / stride of the sites along each axis. In the gradient of
the input, sites of one remainder by the stride read through the same taps: a convolution without
stride for each remainder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv3d

from sparseattn.structures.site_lookup import Three, Window

WORKSPACE = 16 * 2**20  # bytes of gathered features at once
LARGEST_GATHERED = 2  # voxels; in larger patches the halo costs less than a copy for each tap

Sides = list[tuple[int, int, int]]


class Problem(NamedTuple):
    """One convolution. x [P, px, py, pz, C], neighbours [P, (2 rx + 1)(2 ry + 1)(2 rz + 1)].

    reach: rx, ry and rz. window: its first tap may lie inside the patch, with a negative `low`.
    """

    x: Tensor
    neighbours: Tensor
    reach: tuple[int, ...]
    window: Window
    groups: int

    @property
    def patch(self) -> tuple[int, ...]:
        """Voxels of a patch along each axis."""
        return tuple(self.x.shape[1:4])

    @property
    def pooled(self) -> tuple[int, ...]:
        """Sites of a patch of the output along each axis."""
        return tuple(p // s for p, s in zip(self.patch, self.window.stride, strict=True))

    @property
    def sides(self) -> Sides:
        """Voxels before, of and after a patch that its output reads, along each axis."""
        window = self.window
        axes = zip(window.low, self.patch, window.spans, window.stride, strict=True)
        return [(low, size, span + 1 - step - low) for low, size, span, step in axes]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of products and sums."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def is_gathered(self) -> bool:
        """Whether all that a site reads is laid side by side."""
        window = self.window
        apart = all(k <= step for k, step in zip(window.kernel, window.stride, strict=True))
        return self.groups == 1 and (apart or max(self.patch) <= LARGEST_GATHERED)


def forward(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [P, qx, qy, qz, C_out] in the dtype of x; q = patch / stride."""
    bias = None if bias is None else bias.to(problem.wide)
    if not problem.is_gathered:
        return _convolve(problem, _channels_last(weight, problem), bias)
    by_site = _channels_last(weight, problem).permute(0, 2, 3, 4, 1).flatten(1)  # a view
    return _multiply(problem, by_site.mT, bias)


def input_gradient(problem: Problem, weight: Tensor) -> Tensor:
    """Return dx [P, px, py, pz, C_in] for a problem whose x is dy."""
    dy, window, groups = problem.x, problem.window, problem.groups
    if window.stride == (1, 1, 1):
        low = [span - low for span, low in zip(window.spans, window.low, strict=True)]
        return _mirrored(problem._replace(window=window._replace(low=three(low))), weight)
    patch = [q * s for q, s in zip(problem.patch, window.stride, strict=True)]
    dx = dy.new_zeros((len(dy), *patch, weight.shape[1] * groups))
    for kinds in itertools.product(*(range(step) for step in window.stride)):
        axes = [_taps_of(kind, window, axis) for axis, kind in enumerate(kinds)]
        if not all(axes):
            continue  # no window reads such sites
        first = [taps[0] for taps in axes]
        moves = zip(kinds, window.low, window.dilation, first, window.stride, strict=True)
        after = [(kind + low - d * tap) // s for kind, low, d, tap, s in moves]
        spread = [d // math.gcd(d, s) for d, s in zip(window.dilation, window.stride, strict=True)]
        part = Window(three([len(taps) for taps in axes]), (1, 1, 1), (0, 0, 0), three(spread))
        low = [span - a for span, a in zip(part.spans, after, strict=True)]
        found = weight
        for axis, taps in enumerate(axes):
            index = torch.tensor(taps, device=weight.device)
            found = found.index_select(2 + axis, index)
        x, y, z = (slice(kind, None, s) for kind, s in zip(kinds, window.stride, strict=True))
        dx[:, x, y, z] = _mirrored(problem._replace(window=part._replace(low=three(low))), found)
    return dx


def weight_gradient(problem: Problem, dy: Tensor, shape: torch.Size) -> Tensor:
    """Return dW of a shape, in the wide dtype."""
    x, window = problem.x, problem.window
    dw = torch.zeros(shape, dtype=problem.wide, device=x.device)
    dw = dw.contiguous(memory_format=torch.channels_last_3d)
    by_tap = dw.permute(0, 2, 3, 4, 1).flatten(1)  # [C_out, taps * C_in], a view
    for rows in _chunks(problem):
        sent = dy[rows].to(problem.wide)
        if problem.is_gathered:
            by_tap.addmm_(sent.reshape(-1, shape[0]).mT, _gathered(problem, rows))
            continue
        dw += torch.ops.aten.convolution_backward(
            sent.contiguous().permute(0, 4, 1, 2, 3), _halo(problem, rows), dw, None,
            list(window.stride), [0, 0, 0], list(window.dilation), False, [0, 0, 0],
            problem.groups, [False, True, False],
        )[1]  # fmt: skip
    return dw


def three(sizes: Sequence[int]) -> Three:
    """Return three sizes as what they are."""
    x, y, z = sizes
    return x, y, z


def _taps_of(kind: int, window: Window, axis: int) -> list[int]:
    """Return the taps that read sites of a remainder by the stride, along an axis."""
    at, step = kind + window.low[axis], window.dilation[axis]
    return [t for t in range(window.kernel[axis]) if (at - step * t) % window.stride[axis] == 0]


def _mirrored(problem: Problem, weight: Tensor) -> Tensor:
    """Return the sum over taps in reverse order, from outputs to inputs; the stride is 1."""
    if not problem.is_gathered:
        grouped = weight.unflatten(0, (problem.groups, -1)).transpose(1, 2).flatten(0, 1)
        return _convolve(problem, _channels_last(grouped.flip(2, 3, 4), problem), None)
    taps = weight.to(problem.wide).flatten(2).flatten(0, 1).mT.contiguous()  # [taps, C_out * C_in]
    return _multiply(problem, taps.view(-1, weight.shape[1]), None, mirrored=True)


def _convolve(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y by torch's convolution of patches with their halo."""
    y = problem.x.new_empty((len(problem.x), *problem.pooled, weight.shape[0]))
    window = problem.window
    for rows in _chunks(problem):
        out = conv3d(
            _halo(problem, rows), weight, bias, window.stride, 0, window.dilation, problem.groups
        )
        y[rows] = out.permute(0, 2, 3, 4, 1)
    return y


def _multiply(
    problem: Problem, weight: Tensor, bias: Tensor | None, mirrored: bool = False
) -> Tensor:
    """Return y as a product of all that a site reads with [taps * C_in, C_out]."""
    y = problem.x.new_empty((len(problem.x), *problem.pooled, weight.shape[1]))
    for rows in _chunks(problem):
        read = _gathered(problem, rows, mirrored)
        out = read @ weight if bias is None else torch.addmm(bias, read, weight)
        y[rows] = out.view(y[rows].shape)
    return y


def _channels_last(weight: Tensor, problem: Problem) -> Tensor:
    return weight.to(problem.wide).contiguous(memory_format=torch.channels_last_3d)


def _chunks(problem: Problem) -> list[slice]:
    """Cut the patches into chunks whose reads fit the workspace."""
    if problem.is_gathered:
        places = math.prod(problem.pooled) * problem.window.taps
    else:
        places = math.prod(sum(side) for side in problem.sides)
    count, channels = problem.x.shape[0], problem.x.shape[4]
    step = max(1, WORKSPACE // (4 * places * channels))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _gathered(problem: Problem, rows: slice, mirrored: bool = False) -> Tensor:
    """Return what the sites of patches read, [sites, taps * C], 0 where nothing is active.

    mirrored: the last tap first.
    """
    window = problem.window
    if window.taps == 1 and window.stride == (1, 1, 1) and not any(window.low):
        return problem.x[rows].flatten(0, 3).to(problem.wide)
    index = _sources(problem, rows)
    for axis, (size, step) in enumerate(zip(problem.pooled, window.stride, strict=True)):
        steps = [tap * window.dilation[axis] for tap in range(window.kernel[axis])]
        lead, length = (slice(None),) * (axis + 1), (size - 1) * step + 1
        parts = [index[(*lead, slice(first, first + length, step))] for first in steps]
        index = torch.stack(parts[::-1] if mirrored else parts, -1)
    return _read(problem, index.flatten()).view(-1, window.taps * problem.x.shape[4])


def _halo(problem: Problem, rows: slice) -> Tensor:
    """Return patches with their halo, [n, C, px + halo, ...], 0 where nothing is active."""
    index = _sources(problem, rows)
    return _read(problem, index.flatten()).view(*index.shape, -1).permute(0, 4, 1, 2, 3)


def _read(problem: Problem, index: Tensor) -> Tensor:
    missing = (index < 0).nonzero()[:, 0]
    read = problem.x.flatten(0, 3).index_select(0, index.clamp_min(0)).to(problem.wide)
    return read.index_fill_(0, missing, 0)  # not a product with 0: what lies there may be NaN


def _sources(problem: Problem, rows: slice) -> Tensor:
    index, shape = halo_index(problem.neighbours[rows], problem.reach, problem.sides)
    return index.view(-1, *shape)


def halo_index(
    neighbours: Tensor, reach: tuple[int, ...], sides: Sides
) -> tuple[Tensor, list[int]]:
    """Return which site lies at each place of patches with their halo, and the block's shape.

    neighbours [n, prod(2 * reach + 1)]: rows; a negative one gives a negative site, row -2 lower
    ones than row -1. sides: voxels before, of and after a patch along each axis.
    """
    device, sites = neighbours.device, 1
    cell = torch.zeros((), dtype=torch.long, device=device)
    place = torch.zeros((), dtype=torch.long, device=device)
    shape = []
    for far, (before, size, after) in zip(reach, sides, strict=True):
        moved = torch.arange(-before, size + after, device=device) + far * size
        cell = cell[..., None] * (2 * far + 1) + moved // size
        place = place[..., None] * size + moved % size
        shape.append(len(moved))
        sites *= size
    source = neighbours.long()[:, cell.flatten()]  # [n, places]
    return (source * sites + place.flatten()).flatten(), shape
