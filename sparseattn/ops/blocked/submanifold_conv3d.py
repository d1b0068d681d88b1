"""Submanifold convolution in plain torch: cost and memory follow the active patches.

Chunks of patches are copied out with a halo of what their neighbours hold, and torch's dense
convolution without padding runs on them; nothing of what it computes is thrown away. Small patches
are too small for it: there each tap is a product of matrices. The workspace is bounded, and chunks
are taken in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv3d

WORKSPACE = 16 * 2**20  # bytes of gathered features at once
LARGEST_PER_TAP = 2  # voxels; in larger patches the halo costs less than the taps


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
    weight = _channels_last(weight, problem)
    if not _goes_by_tap(problem):
        return _convolve(problem, weight, bias)
    taps = weight.permute(2, 3, 4, 1, 0).flatten(0, 2)  # [taps, C_in, C_out], a view
    return _multiply(problem, list(taps), weight.shape[2:], bias)


def input_gradient(problem: Problem, weight: Tensor) -> Tensor:
    """Return dx for a problem whose x is dy, and whose window is mirrored."""
    if not _goes_by_tap(problem):
        grouped = weight.unflatten(0, (problem.groups, -1)).transpose(1, 2).flatten(0, 1)
        return _convolve(problem, _channels_last(grouped.flip(2, 3, 4), problem), None)
    taps = _channels_last(weight, problem).permute(2, 3, 4, 0, 1).flatten(0, 2)
    return _multiply(problem, list(taps)[::-1], weight.shape[2:], None)


def weight_gradient(problem: Problem, dy: Tensor, shape: torch.Size) -> Tensor:
    """Return dW of a shape, in the wide dtype."""
    x = problem.x
    dw = torch.zeros(shape, dtype=problem.wide, device=x.device)
    dw = dw.contiguous(memory_format=torch.channels_last_3d)
    sums = list(dw.permute(2, 3, 4, 0, 1).flatten(0, 2))  # [C_out, C_in] of each tap, views
    for rows in _chunks(problem):
        blocks, sent = _halo(problem, rows), dy[rows].to(problem.wide)
        if _goes_by_tap(problem):
            sent = sent.reshape(-1, shape[0]).mT
            for total, gathered in zip(sums, _taps(problem, blocks, shape[2:]), strict=True):
                total.addmm_(sent, gathered)
            continue
        dw += torch.ops.aten.convolution_backward(
            sent.contiguous().permute(0, 4, 1, 2, 3), blocks.permute(0, 4, 1, 2, 3), dw, None,
            [1, 1, 1], [0, 0, 0], list(problem.dilation), False, [0, 0, 0], problem.groups,
            [False, True, False],
        )[1]  # fmt: skip
    return dw


def _convolve(problem: Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y by torch's convolution of patches with their halo."""
    y = problem.x.new_empty((*problem.x.shape[:4], weight.shape[0]))
    for rows in _chunks(problem):
        blocks = _halo(problem, rows).permute(0, 4, 1, 2, 3)
        out = conv3d(blocks, weight, bias, dilation=problem.dilation, groups=problem.groups)
        y[rows] = out.permute(0, 2, 3, 4, 1)
    return y


def _multiply(
    problem: Problem, taps: list[Tensor], kernel: torch.Size, bias: Tensor | None
) -> Tensor:
    """Return y as a sum of products with one [C_in, C_out] for each tap."""
    channels = taps[0].shape[1]
    y = problem.x.new_empty((*problem.x.shape[:4], channels))
    for rows in _chunks(problem):
        out = torch.zeros((y[rows].numel() // channels, channels)).to(taps[0])
        if bias is not None:
            out += bias
        gathered = _taps(problem, _halo(problem, rows), kernel)
        for weight, read in zip(taps, gathered, strict=True):
            out.addmm_(read, weight)
        y[rows] = out.view(y[rows].shape)
    return y


def _channels_last(weight: Tensor, problem: Problem) -> Tensor:
    return weight.to(problem.wide).contiguous(memory_format=torch.channels_last_3d)


def _goes_by_tap(problem: Problem) -> bool:
    return problem.groups == 1 and max(problem.patch) <= LARGEST_PER_TAP


def _chunks(problem: Problem) -> list[slice]:
    """Cut the patches into chunks that fit the workspace with their halo."""
    axes = zip(problem.before, problem.patch, problem.after, strict=True)
    x, y, z = (sum(axis) for axis in axes)
    count, channels = problem.x.shape[0], problem.x.shape[4]
    step = max(1, WORKSPACE // (4 * x * y * z * channels))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _taps(problem: Problem, blocks: Tensor, kernel: torch.Size) -> Iterator[Tensor]:
    """Yield for each tap what the sites read through it, [sites, C]."""
    for corner in itertools.product(*(range(size) for size in kernel)):
        part = blocks
        for axis, size in enumerate(problem.patch):
            part = part.narrow(axis + 1, corner[axis] * problem.dilation[axis], size)
        yield part.reshape(-1, blocks.shape[4])


def _halo(problem: Problem, rows: slice) -> Tensor:
    """Return patches with their halo, [n, px + halo, ..., C], 0 where nothing is active."""
    sides = list(zip(problem.before, problem.patch, problem.after, strict=True))
    reach = tuple(reach_of(before, after, size) for before, size, after in sides)
    index, shape = halo_index(problem.neighbours[rows], reach, sides)
    missing = (index < 0).nonzero()[:, 0]
    blocks = problem.x.flatten(0, 3).index_select(0, index.clamp_min_(0)).to(problem.wide)
    blocks.index_fill_(0, missing, 0)  # not a product with 0: what lies there may be NaN
    return blocks.view(-1, *shape, problem.x.shape[4])


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
