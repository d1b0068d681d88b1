"""Convolution of active patches in plain torch: cost and memory follow the active patches.

Chunks of patches are copied out with a halo of what their neighbours hold, and torch's dense
convolution without padding runs on them; nothing of what it computes is thrown away. Small patches
are too small for it: there all that a site reads is laid side by side, for products of matrices,
a part of the channels at a time, so that weights are turned into their layout part by part, too.
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

WORKSPACE = 4 * 2**20  # bytes: features of a chunk with their halo; beside products, half of it
LEAST_CHANNELS = 16  # of one product, even if their weights take more than the workspace
LARGEST_GATHERED = 2  # voxels; in larger patches the halo costs less than a copy for each tap
LARGEST_BY_ELEMENT = 4  # voxels; there the gradient of a depthwise weight is a sum for each tap

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
    if problem.is_gathered:
        return _multiply(problem, weight, bias)
    return _convolve(problem, _channels_last(weight, problem), bias)


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
    x, wide = problem.x, problem.wide
    dw = torch.zeros(shape, dtype=wide, device=x.device)
    if problem.is_gathered:
        for channels in _parts(problem, shape):
            part = problem._replace(x=x[..., channels].contiguous())
            dw[:, channels] = _products(part, dy, shape)
        return dw
    add = _add_convolution
    if shape[0] == x.shape[4] == problem.groups and max(problem.pooled) <= LARGEST_BY_ELEMENT:
        add = _add_by_element
    dw = dw.contiguous(memory_format=torch.channels_last_3d)
    for rows in _chunks(problem, shape[0]):
        add(dw, problem, dy[rows].to(wide).contiguous(), rows)
    return dw


def _products(problem: Problem, dy: Tensor, shape: torch.Size) -> Tensor:
    """Return dW of some channels as products of dy and of all that a site reads."""
    kernel, outer = problem.window.kernel, shape[0]
    dw = dy.new_zeros((outer, problem.window.taps * problem.x.shape[4]), dtype=problem.wide)
    for rows in _chunks(problem, outer):
        sent = dy[rows].to(problem.wide).reshape(-1, outer)
        dw.addmm_(sent.mT, _gathered(problem, rows))
    return dw.unflatten(1, (*kernel, -1)).permute(0, 4, 1, 2, 3)


def _add_convolution(dw: Tensor, problem: Problem, dy: Tensor, rows: slice) -> None:
    """Add to dW what torch's convolution makes of dy [n, qx, qy, qz, C_out]."""
    window, halo = problem.window, _halo(problem, rows)
    dw += torch.ops.aten.convolution_backward(
        dy.permute(0, 4, 1, 2, 3), halo.permute(0, 4, 1, 2, 3), dw, None, list(window.stride),
        [0, 0, 0], list(window.dilation), False, [0, 0, 0], problem.groups, [False, True, False],
    )[1]  # fmt: skip


def _add_by_element(dw: Tensor, problem: Problem, dy: Tensor, rows: slice) -> None:
    """Add to dW [C, 1, kx, ky, kz] what each tap of a depthwise convolution reads, times dy."""
    window, halo, by_tap = problem.window, _halo(problem, rows), dw.view(len(dw), -1)
    axes = list(zip(window.dilation, problem.pooled, window.stride, strict=True))
    for tap, steps in enumerate(itertools.product(*map(range, window.kernel))):
        x, y, z = (
            slice(step * far, step * far + (size - 1) * stride + 1, stride)
            for step, (far, size, stride) in zip(steps, axes, strict=True)
        )
        by_tap[:, tap] += (halo[:, x, y, z] * dy).flatten(0, 3).sum(0)


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
    if problem.is_gathered:
        return _multiply(problem, weight.transpose(0, 1), None, mirrored=True)
    grouped = weight.unflatten(0, (problem.groups, -1)).transpose(1, 2).flatten(0, 1)
    return _convolve(problem, _channels_last(grouped.flip(2, 3, 4), problem), None)


def _convolve(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y by torch's convolution of patches with their halo."""
    y = problem.x.new_empty((len(problem.x), *problem.pooled, weight.shape[0]))
    window = problem.window
    for rows in _chunks(problem, weight.shape[0]):
        y[rows] = conv3d(
            _halo(problem, rows).permute(0, 4, 1, 2, 3), weight, bias, window.stride, 0,
            window.dilation, problem.groups,
        ).permute(0, 2, 3, 4, 1)  # fmt: skip
    return y


def _multiply(
    problem: Problem, weight: Tensor, bias: Tensor | None, mirrored: bool = False
) -> Tensor:
    """Return y as products of all that a site reads with a weight [OUT, IN, kx, ky, kz]."""
    x, outer = problem.x, weight.shape[0]
    parts = _parts(problem, weight.shape)
    kept = x.dtype if len(parts) == 1 else problem.wide  # rounded once
    y = torch.zeros((len(x), *problem.pooled, outer), dtype=kept, device=x.device)
    if bias is not None:
        y += bias
    for channels in parts:
        taps = weight[:, channels].to(problem.wide).flatten(2)
        taps = taps.transpose(1, 2).flatten(1).mT  # [taps * IN, OUT]
        part = problem._replace(x=x[..., channels].contiguous())
        for rows in _chunks(part, outer):
            sums, read = y[rows].view(-1, outer), _gathered(part, rows, mirrored)
            if kept == problem.wide:
                sums.addmm_(read, taps)
            else:
                sums += read @ taps
            del read
    return y.to(x.dtype)


def _parts(problem: Problem, shape: torch.Size) -> list[slice]:
    """Cut the input's channels so that their weights, of all of `shape`, fit the workspace."""
    if problem.window.taps == 1:
        return [slice(0, shape[1])]  # the weights of one tap are a matrix as they are
    each = 4 * max(1, problem.window.taps * shape[0])
    step = max(LEAST_CHANNELS, WORKSPACE // 4 // each // 8 * 8)
    return [slice(first, min(first + step, shape[1])) for first in range(0, shape[1], step)]


def _channels_last(weight: Tensor, problem: Problem) -> Tensor:
    return weight.to(problem.wide).contiguous(memory_format=torch.channels_last_3d)


def _chunks(problem: Problem, outer: int) -> list[slice]:
    """Cut the patches into chunks whose reads, and sums of `outer` channels, fit the workspace."""
    (count, *_, channels), sites = problem.x.shape, math.prod(problem.pooled)
    if problem.is_gathered:
        places, most = sites * problem.window.taps, WORKSPACE // 2
    else:  # where patches are few, less than all their halos
        places = math.prod(sum(side) for side in problem.sides)
        most = min(WORKSPACE, max(WORKSPACE // 4, 16 * problem.x.numel()))
    step = max(1, most // (4 * max(places * channels, sites * outer)))
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
    """Return patches with their halo, [n, px + halo, ..., C], 0 where nothing is active."""
    index = _sources(problem, rows)
    return _read(problem, index.flatten()).view(*index.shape, -1)


def _read(problem: Problem, index: Tensor) -> Tensor:
    missing = (index < 0).nonzero()[:, 0]
    read = problem.x.flatten(0, 3).index_select(0, index.clamp_min_(0)).to(problem.wide)
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
