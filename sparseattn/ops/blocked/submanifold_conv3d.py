"""Submanifold convolution in plain torch: cost and memory follow the active patches.

Chunks of patches are copied out with a halo of what their neighbours hold, and torch's dense
convolution without padding runs on them; nothing of what it computes is thrown away. Small patches
are too small for it: there all that a site reads is laid side by side, for one product of matrices.
The workspace is bounded, and chunks are taken in order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv3d

WORKSPACE = 16 * 2**20  # bytes of gathered features at once
LARGEST_GATHERED = 2  # voxels; in larger patches the halo costs less than a copy for each tap


class Problem(NamedTuple):
    """One convolution. x [P, px, py, pz, C], neighbours [P, (2 rx + 1)(2 ry + 1)(2 rz + 1)].

    before, after: voxels of the window before and after its centre.
    """

    x: Tensor
    neighbours: Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def patch(self) -> tuple[int, ...]:
        """Voxels of a patch along each axis."""
        return tuple(self.x.shape[1:4])

    @property
    def wide(self) -> torch.dtype:
        """The dtype of products and sums."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


def reach_of(before: int, after: int, patch: int) -> int:
    """Return how many patches away a window reaches along one axis, 1 or more."""
    return max(1, -(-max(before, after) // patch))


def forward(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [P, px, py, pz, C_out] in the dtype of x."""
    bias = None if bias is None else bias.to(problem.wide)
    if not _is_gathered(problem):
        return _convolve(problem, _channels_last(weight, problem), bias)
    by_site = _channels_last(weight, problem).permute(0, 2, 3, 4, 1).flatten(1)  # a view
    return _multiply(problem, by_site.mT, weight.shape[2:], bias)


def input_gradient(problem: Problem, weight: Tensor) -> Tensor:
    """Return dx for a problem whose x is dy, and whose window is mirrored."""
    if not _is_gathered(problem):
        grouped = weight.unflatten(0, (problem.groups, -1)).transpose(1, 2).flatten(0, 1)
        return _convolve(problem, _channels_last(grouped.flip(2, 3, 4), problem), None)
    taps = weight.to(problem.wide).flatten(2).flatten(0, 1).mT.contiguous()  # [taps, C_out * C_in]
    return _multiply(problem, taps.view(-1, weight.shape[1]), weight.shape[2:], None, mirrored=True)


def weight_gradient(problem: Problem, dy: Tensor, shape: torch.Size) -> Tensor:
    """Return dW of a shape, in the wide dtype."""
    x = problem.x
    dw = torch.zeros(shape, dtype=problem.wide, device=x.device)
    dw = dw.contiguous(memory_format=torch.channels_last_3d)
    by_tap = dw.permute(0, 2, 3, 4, 1).flatten(1)  # [C_out, taps * C_in], a view
    taps = shape[2:]
    for rows in _chunks(problem, taps):
        sent = dy[rows].to(problem.wide)
        if _is_gathered(problem):
            by_tap.addmm_(sent.reshape(-1, shape[0]).mT, _gathered(problem, rows, taps))
            continue
        dw += torch.ops.aten.convolution_backward(
            sent.contiguous().permute(0, 4, 1, 2, 3), _halo(problem, rows), dw, None,
            [1, 1, 1], [0, 0, 0], list(problem.dilation), False, [0, 0, 0], problem.groups,
            [False, True, False],
        )[1]  # fmt: skip
    return dw


def _convolve(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y by torch's convolution of patches with their halo."""
    y = problem.x.new_empty((*problem.x.shape[:4], weight.shape[0]))
    for rows in _chunks(problem, weight.shape[2:]):
        blocks = _halo(problem, rows)
        out = conv3d(blocks, weight, bias, dilation=problem.dilation, groups=problem.groups)
        y[rows] = out.permute(0, 2, 3, 4, 1)
    return y


def _multiply(
    problem: Problem, weight: Tensor, kernel: torch.Size, bias: Tensor | None,
    mirrored: bool = False,
) -> Tensor:  # fmt: skip
    """Return y as a product of all that a site reads with [taps * C_in, C_out]."""
    y = problem.x.new_empty((*problem.x.shape[:4], weight.shape[1]))
    for rows in _chunks(problem, kernel):
        read = _gathered(problem, rows, kernel, mirrored)
        out = read @ weight if bias is None else torch.addmm(bias, read, weight)
        y[rows] = out.view(y[rows].shape)
    return y


def _channels_last(weight: Tensor, problem: Problem) -> Tensor:
    return weight.to(problem.wide).contiguous(memory_format=torch.channels_last_3d)


def _is_gathered(problem: Problem) -> bool:
    return problem.groups == 1 and (
        max(problem.patch) <= LARGEST_GATHERED or not any(problem.before + problem.after)
    )


def _chunks(problem: Problem, kernel: torch.Size) -> list[slice]:
    """Cut the patches into chunks whose reads fit the workspace."""
    if _is_gathered(problem):
        places = math.prod(problem.patch) * math.prod(kernel)
    else:
        places = math.prod(sum(side) for side in _sides(problem))
    count, channels = problem.x.shape[0], problem.x.shape[4]
    step = max(1, WORKSPACE // (4 * places * channels))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _sides(problem: Problem) -> list[tuple[int, int, int]]:
    """Return voxels before, of and after a patch along each axis."""
    return list(zip(problem.before, problem.patch, problem.after, strict=True))


def _gathered(
    problem: Problem, rows: slice, kernel: torch.Size, mirrored: bool = False
) -> Tensor:  # fmt: skip
    """Return what the sites of patches read, [sites, taps * C], 0 where nothing is active.

    mirrored: the last tap first.
    """
    if not any(problem.before + problem.after):
        return problem.x[rows].flatten(0, 3).to(problem.wide)
    index = _sources(problem, rows)
    for axis, (size, taps) in enumerate(zip(problem.patch, kernel, strict=True)):
        steps = [tap * problem.dilation[axis] for tap in range(taps)][:: -1 if mirrored else 1]
        index = torch.stack([index.narrow(axis + 1, step, size) for step in steps], -1)
    return _read(problem, index.flatten()).view(-1, math.prod(kernel) * problem.x.shape[4])


def _halo(problem: Problem, rows: slice) -> Tensor:
    """Return patches with their halo, [n, C, px + halo, ...], 0 where nothing is active."""
    index = _sources(problem, rows)
    return _read(problem, index.flatten()).view(*index.shape, -1).permute(0, 4, 1, 2, 3)


def _read(problem: Problem, index: Tensor) -> Tensor:
    missing = (index < 0).nonzero()[:, 0]
    read = problem.x.flatten(0, 3).index_select(0, index.clamp_min(0)).to(problem.wide)
    return read.index_fill_(0, missing, 0)  # not a product with 0: what lies there may be NaN


def _sources(problem: Problem, rows: slice) -> Tensor:
    sides = _sides(problem)
    reach = tuple(reach_of(before, after, size) for before, size, after in sides)
    index, shape = halo_index(problem.neighbours[rows], reach, sides)
    return index.view(-1, *shape)


def halo_index(
    neighbours: Tensor, reach: tuple[int, ...], sides: list[tuple[int, int, int]]
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
