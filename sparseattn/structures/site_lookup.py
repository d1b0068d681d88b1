"""Which active site lies where: three ways to look coordinates up, of which sizes choose one.

A site's key is its place in raster order in a box that holds every coordinate that is asked for,
also those outside the volume, which nobody has.

    table    the row of every cell of the box
    hash     the key and row of every site at a place made of its key; by a kernel alone
    search   the sorted keys, and a binary search in them
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparseattn.constants import PAD_INDEX

CELLS_PER_SITE = 64  # a table may have so many cells for each site
SMALL_TABLES = {"cuda": 2**24}  # or so many in all, where filling it costs little
SMALLEST_TABLE = 2**12
OUTSIDE = "VoxelTensor: a coordinate lies outside its volume"
TWICE = "VoxelTensor: a coordinate is there twice; expected once"
SLOT_BITS = 63  # of a hash table, for a key and a row

Three = tuple[int, int, int]


class Window(NamedTuple):
    """Which sites x of a fine volume a site y of a coarse one reads: x = y * stride - low + o_t.

    kernel: taps along each axis. low: voxels before the first one. o_t = dilation * t.
    """

    kernel: Three
    stride: Three
    low: Three
    dilation: Three

    @property
    def taps(self) -> int:
        """How many taps there are."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def spans(self) -> Three:
        """How many voxels the taps cover beside the first, along each axis."""
        x, y, z = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        return x, y, z

    @property
    def symmetric(self) -> bool:
        """Say whether y reads x through tap t just when x reads y through the last tap less t."""
        halves = all(2 * low == span for low, span in zip(self.low, self.spans, strict=True))
        return halves and self.stride == (1, 1, 1)

    @classmethod
    def unpack(cls, numbers: list[int]) -> Window:
        """Return the window of twelve numbers."""
        parts = [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in (0, 3, 6, 9)]
        return cls(*parts)

    def pack(self) -> list[int]:
        """Return the window as twelve numbers, as operators of torch take it."""
        return [*self.kernel, *self.stride, *self.low, *self.dilation]


class Box(NamedTuple):
    """The cells that a window reaches: `size` of them along x, y and z, `low` before the volume."""

    batch: int
    low: Three
    size: Three

    @classmethod
    def around(cls, batch: int, shape: Sequence[int], coarse: Sequence[int], window: Window) -> Box:
        """Return the box of a fine volume and all that sites of the coarse one read."""
        size = tuple(
            low + max(fine, (cells - 1) * stride - low + span + 1)
            for fine, cells, stride, low, span in zip(
                shape, coarse, window.stride, window.low, window.spans, strict=True
            )
        )
        return cls(batch, window.low, (size[0], size[1], size[2]))

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return self.batch * self.size[0] * self.size[1] * self.size[2]

    @property
    def corner(self) -> int:
        """The key of the volume's first cell."""
        return (self.low[0] * self.size[1] + self.low[1]) * self.size[2] + self.low[2]

    def keys(self, coordinates: Tensor, stride: Three = (1, 1, 1)) -> Tensor:
        """Return the keys of coordinates [n, 4] times the stride, less the corner."""
        key = coordinates[:, 0].to(torch.int32 if self.cells < 2**31 else torch.int64)
        for axis in range(3):
            key = key * self.size[axis]
            key.add_(coordinates[:, axis + 1], alpha=stride[axis])
        return key

    def steps(self, window: Window) -> list[int]:
        """Return for each tap what to add to the key of y * stride for the key of x.

        Keys less the corner count from the first cell of the volume, the first tap from `low`
        before it, so the two cancel.
        """
        taps = itertools.product(*(range(k) for k in window.kernel))
        (_, sy, sz), (dx, dy, dz) = self.size, window.dilation
        return [(x * dx * sy + y * dy) * sz + z * dz for x, y, z in taps]


def neighbour_rows(
    fine: Tensor, coarse: Tensor, sizes: list[int], coarse_sizes: list[int], window: Window,
    method: str, same: bool,
) -> Tensor:  # fmt: skip
    """Return int32 [taps, n]: the row of `fine` [N, 4] that each of `coarse` [n, 4] reads.

    PAD_INDEX where nobody is active. sizes: the batch and the volume of fine, as coarse_sizes of
    coarse. method: "table", "hash", "search", or "auto". same: the two sets are one.

    Raises ValueError naming the first coordinate that is outside its volume or there twice; on a
    GPU it is a device-side assertion.
    """
    box = Box.around(sizes[0], sizes[1:], coarse_sizes[1:], window)
    if method == "auto":
        method = choose(box, len(fine), fine.device.type)
    if method == "hash" or (fine.is_cuda and method == "table" and kernels_installed()):
        return by_kernel(fine, coarse, sizes, coarse_sizes, box, window, method == "hash", same)
    check_inside(fine, sizes)
    if not same:
        check_inside(coarse, coarse_sizes)
    if method == "table":
        return _by_table(fine, coarse, box, window, same)
    if same and window.symmetric and not fine.is_cuda:  # counting hits would wait for a GPU
        return _by_symmetric_search(fine, box, window)
    if max(window.stride) > 1 and not fine.is_cuda:
        return _by_readers(fine, coarse, coarse_sizes, box, window)
    return _by_search(fine, coarse, box, window)


def by_kernel(
    fine: Tensor, coarse: Tensor, sizes: list[int], coarse_sizes: list[int], box: Box,
    window: Window, hashed: bool, same: bool,
) -> Tensor:  # fmt: skip
    """Look sites up in kernels: one launch for each table, one for all taps."""
    from sparseattn.kernels.sparse_conv3d import map_rows

    if not fine.is_cuda and not map_rows.interpreting():
        raise NotImplementedError(f"KernelMap: method 'hash' cannot run on {fine.device}")
    geometry = map_rows.Geometry(
        sizes[0], (sizes[1], sizes[2], sizes[3]),
        (coarse_sizes[1], coarse_sizes[2], coarse_sizes[3]), box.size, box.corner,
        window.kernel, window.stride, window.dilation,
    )  # fmt: skip
    symmetric = same and window.symmetric
    rows, faults = map_rows.neighbour_rows(
        fine, coarse, geometry, hashed=hashed, same=same, symmetric=symmetric
    )
    if fine.is_cuda:
        torch._assert_async(faults[0] == 0, OUTSIDE)
        torch._assert_async(faults[1] == 0, TWICE)
    elif bool(faults.any()):
        raise ValueError(f"VoxelTensor: {fault(fine, sizes) or fault(coarse, coarse_sizes)}")
    return rows


def choose(box: Box, sites: int, device: str) -> str:
    """Return which way of looking so many sites up sizes ask for."""
    if box.cells <= max(CELLS_PER_SITE * sites, SMALL_TABLES.get(device, SMALLEST_TABLE)):
        return "table"
    fits = (box.cells - 1).bit_length() + max(1, sites - 1).bit_length() <= SLOT_BITS
    return "hash" if device == "cuda" and fits and kernels_installed() else "search"


@cache
def kernels_installed() -> bool:
    """Say whether there is a Triton to run kernels."""
    return importlib.util.find_spec("triton") is not None


def fault(coordinates: Tensor, sizes: list[int]) -> str:
    """Say which coordinate is outside or there twice, and is the first; "" if none is."""
    return outside(coordinates, sizes) or duplicate(coordinates)


def check_inside(coordinates: Tensor, sizes: list[int]) -> None:
    """Raise ValueError naming the first coordinate that leaves 0 <= c < sizes, along four axes."""
    for axis, size in enumerate(sizes):
        column = coordinates[:, axis]
        if coordinates.is_cuda:
            holds = ((column >= 0) & (column < size)).all()
            torch._assert_async(holds, OUTSIDE)
        elif len(column) and not (int(column.min()) >= 0 and int(column.max()) < size):
            raise ValueError(f"VoxelTensor: {outside(coordinates, sizes)}")


def outside(coordinates: Tensor, sizes: list[int]) -> str:
    """Say which is the first row of `coordinates` that leaves 0 <= c < sizes; "" if none does."""
    most = torch.tensor(sizes, device=coordinates.device)
    rows = ((coordinates < 0) | (coordinates >= most)).any(1).nonzero()
    if len(rows) == 0:
        return ""
    row = int(rows[0, 0])
    return (
        f"coordinates[{row}] is {coordinates[row].tolist()}; expected 0 <= coordinate < {sizes} "
        "(from batch_size and spatial_shape)"
    )


def check_unique(holds: Tensor, coordinates: Tensor) -> None:
    """Raise ValueError naming the first coordinate met before; on a GPU, an assertion there."""
    if coordinates.is_cuda:
        torch._assert_async(holds.all(), TWICE)
    elif not bool(holds.all()):
        raise ValueError(f"VoxelTensor: {duplicate(coordinates)}")


def duplicate(coordinates: Tensor) -> str:
    """Say which is the first row of `coordinates` that is there before; "" if none is."""
    _, group = torch.unique(coordinates, dim=0, return_inverse=True)
    sorted_group, order = group.sort(stable=True)
    again = order[1:][sorted_group[1:] == sorted_group[:-1]]
    if len(again) == 0:
        return ""
    row = int(again.min())
    first = int((group == group[row]).nonzero()[0, 0])
    place = coordinates[row].tolist()
    return f"coordinates[{row}] is {place}, as coordinates[{first}] is; expected each site once"


def _by_table(fine: Tensor, coarse: Tensor, box: Box, window: Window, same: bool) -> Tensor:
    keys, first = box.keys(fine) + box.corner, box.keys(coarse, window.stride)
    if not same:
        _ascending(first, coarse)
    numbers = torch.arange(len(keys), dtype=torch.int32, device=keys.device)
    table = torch.full((box.cells,), PAD_INDEX, dtype=torch.int32, device=keys.device)
    table.index_copy_(0, keys.long(), numbers)
    check_unique(table.index_select(0, keys) == numbers, fine)
    rows = numbers.new_empty((window.taps, len(first)))
    for row, step in zip(rows, box.steps(window), strict=True):
        torch.index_select(table, 0, first + step, out=row)
    return rows


def _by_search(fine: Tensor, coarse: Tensor, box: Box, window: Window) -> Tensor:
    keys, numbers = _ascending(box.keys(fine) + box.corner, fine)
    first, readers = _ascending(box.keys(coarse, window.stride), coarse)
    rows = torch.full((window.taps, len(first)), PAD_INDEX, dtype=torch.int32, device=keys.device)
    missing = numbers.new_full((1,), PAD_INDEX)
    numbers = torch.cat((numbers, missing)).int()  # the last is read where the search ends
    for tap, at, hits in _search(keys, first, box.steps(window), window):
        read = torch.where(hits, numbers.index_select(0, at), PAD_INDEX)
        rows[tap].index_copy_(0, readers, read)
    return rows


def _by_symmetric_search(fine: Tensor, box: Box, window: Window) -> Tensor:
    """Search half of the taps: through the other half, everybody is read by whom they read."""
    keys, numbers = _ascending(box.keys(fine) + box.corner, fine)
    rows = torch.full((window.taps, len(keys)), PAD_INDEX, dtype=torch.int32, device=keys.device)
    middle = window.taps // 2
    for tap, at, hits in _search(keys, keys - box.corner, box.steps(window)[:middle], window):
        found = hits.nonzero()[:, 0]
        read, reader = numbers[at[found]], numbers[found]
        rows[tap, reader] = read.int()
        rows[-1 - tap, read] = reader.int()
    torch.arange(len(keys), dtype=torch.int32, out=rows[middle])
    return rows


def _by_readers(fine: Tensor, coarse: Tensor, sizes: list[int], box: Box, window: Window) -> Tensor:
    """Search who reads each fine site: with a stride these are fewer than all that may be read."""
    volume = Box(sizes[0], (0, 0, 0), (sizes[1], sizes[2], sizes[3]))
    keys, readers = _ascending(volume.keys(coarse), coarse)
    which = _ascending(box.keys(fine), fine)[1]  # in this order they ask for neighbouring keys
    wanted, tap = fine[:, 0].index_select(0, which).to(keys.dtype), torch.zeros_like(which)
    for axis in range(3):
        column = fine[:, axis + 1].index_select(0, which)
        site, step, place = read_along(column, window, axis, sizes[axis + 1])
        which = which.index_select(0, site)
        tap = tap.index_select(0, site).mul_(window.kernel[axis]).add_(step)
        wanted = wanted.index_select(0, site).mul_(sizes[axis + 1]).add_(place)
    ended = torch.cat((keys, keys.new_full((1,), torch.iinfo(keys.dtype).max)))
    at = torch.searchsorted(keys, wanted, out_int32=True)
    hits = (ended.index_select(0, at) == wanted).nonzero()[:, 0]
    reader = readers.index_select(0, at.index_select(0, hits))
    spot = tap.index_select(0, hits).mul_(len(coarse)).add_(reader)
    rows = fine.new_full((window.taps, len(coarse)), PAD_INDEX)
    rows.view(-1).index_copy_(0, spot, which.index_select(0, hits).int())
    return rows


def read_along(
    column: Tensor, window: Window, axis: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which fine sites are read along an axis, through which tap, and where by whom.

    column: where the sites lie along it. size: of the coarse volume. In the order of `column`, and
    for each site by taps.
    """
    step, span, dilation = window.stride[axis], window.spans[axis], window.dilation[axis]
    ahead, readers = column + window.low[axis], span // step + 1  # how many may read one site
    back = torch.arange(readers, dtype=column.dtype, device=column.device)
    place = ahead.div(step, rounding_mode="floor")[:, None] - back
    rest = ahead[:, None] - place * step
    fits = (place >= 0) & (place < size) & (rest <= span)
    if dilation > 1:
        fits &= rest % dilation == 0
    found = fits.flatten().nonzero()[:, 0]
    site = found if readers == 1 else found.div(readers, rounding_mode="floor")
    tap = rest.flatten().index_select(0, found)
    tap = tap if dilation == 1 else tap.div(dilation, rounding_mode="floor")
    return site, tap, place.flatten().index_select(0, found)


def _search(
    keys: Tensor, first: Tensor, steps: list[int], window: Window
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each tap where in `keys` each of `first` would find its site, and which do.

    Both are ascending. Taps along z follow each other in the keys: only the first is searched.
    """
    ended = torch.cat((keys, keys.new_full((1,), torch.iinfo(keys.dtype).max)))
    at = hits = keys
    for tap, step in enumerate(steps):
        wanted = first + step
        if tap % window.kernel[2] and window.dilation[2] == 1:
            at = at + hits  # the key of the last tap plus one: here, or one further
        else:
            at = torch.searchsorted(keys, wanted, out_int32=True)
        hits = ended.index_select(0, at) == wanted
        yield tap, at, hits


def _ascending(keys: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the keys of coordinates in ascending order, each once, and where each was before."""
    if not keys.is_cuda and bool((keys[1:] > keys[:-1]).all()):
        return keys, torch.arange(len(keys), device=keys.device)
    keys, before = torch.sort(keys)
    check_unique(keys[1:] != keys[:-1], coordinates)
    return keys, before
