"""SiteSet: active sites of a batch of volumes, with whatever is worked out from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.structures.site_lookup import SMALLEST_TABLE, Three, Window, read_along

MARKS_PER_SITE = 16  # with more cells to mark and look through, it is faster to sort
GROWTH = 4  # times that a list may grow before it is sorted for what is there twice


class Made(NamedTuple):
    """Something that was worked out from a set of sites, and from what else."""

    what: tuple
    window: Window
    other: Tensor | None
    value: Any


class SiteSet(NamedTuple):
    """Active sites: coordinates int32 [N, 4] (sample, x, y, z) in volumes of one shape.

    made: what was worked out from them, for all who share the list.
    """

    coordinates: Tensor
    spatial_shape: Three
    batch_size: int
    made: list[Made]

    def find(
        self, what: tuple, window: Window, other: Tensor | None, make: Callable[[], Any]
    ) -> Any:
        """Return what was made of these sites, of a window and of others' coordinates, or make it.

        Others are known by the tensor itself, not by its values.
        """
        for made in self.made:
            if made.what == what and made.window == window and made.other is other:
                return made.value
        value = make()
        self.made.append(Made(what, window, other, value))
        return value


def touched(sites: SiteSet, window: Window, shape: Three) -> SiteSet:
    """Return the coarse sites, in a volume of `shape`, whose window holds a fine one of `sites`."""
    return _derived("touched", sites, window, shape)


def grown(sites: SiteSet, window: Window, shape: Three) -> SiteSet:
    """Return the fine sites, in a volume of `shape`, that lie in the window of one of `sites`."""
    return _derived("grown", sites, window, shape)


def _derived(what: str, sites: SiteSet, window: Window, shape: Three) -> SiteSet:
    def make() -> SiteSet:
        coordinates = torch.ops.sparseattn.derived_sites.default(
            sites.coordinates, list(sites.spatial_shape), list(shape), sites.batch_size,
            window.pack(), what == "grown",
        )  # fmt: skip
        return SiteSet(coordinates, shape, sites.batch_size, [])

    found: SiteSet = sites.find((what, shape), window, None, make)
    return found


def _derive(
    coordinates: Tensor, shape: list[int], out_shape: list[int], batch: int, window: list[int],
    grow: bool,
) -> Tensor:  # fmt: skip
    """Return coordinates int32 [n, 4] in raster order, one axis after the other.

    What is there twice is dropped at the end, and before that only where it is cheap or the list
    grows long.
    """
    taps = Window.unpack(window)
    sizes = [batch, *shape]
    places = [column.contiguous() for column in coordinates.unbind(1)]
    longest = GROWTH * len(coordinates)
    for axis in range(3):
        size = sizes[axis + 1] = out_shape[axis]
        site, reached = (_grown if grow else _touched)(places[axis + 1], taps, axis, size)
        places = [
            reached if other == axis + 1 else column.index_select(0, site)
            for other, column in enumerate(places)
        ]
        if axis == 2 or len(site) > longest or _is_small(sizes, len(site)):
            places = _distinct(places, sizes)
            longest = GROWTH * len(places[0])
    return torch.stack(places, 1)


def _touched(column: Tensor, window: Window, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Return along an axis which fine sites are read, and where by whom."""
    site, _, reached = read_along(column, window, axis, size)
    return site, reached


def _grown(column: Tensor, window: Window, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Return along an axis which coarse sites read, and where."""
    taps = torch.arange(window.kernel[axis], device=column.device)
    offsets = taps * window.dilation[axis] - window.low[axis]
    reached = column.long()[:, None] * window.stride[axis] + offsets
    site, tap = ((reached >= 0) & (reached < size)).nonzero(as_tuple=True)
    return site, reached[site, tap].int()


def _is_small(sizes: list[int], sites: int) -> bool:
    """Say whether a mark for each cell costs less than a sort."""
    return math.prod(sizes) <= max(MARKS_PER_SITE * sites, SMALLEST_TABLE)


def _distinct(places: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """Return each of the places, four columns, once, in raster order."""
    key = places[0].to(torch.int32 if math.prod(sizes) < 2**31 else torch.int64)
    for axis in (1, 2, 3):
        key = key.mul(sizes[axis]).add_(places[axis])
    if _is_small(sizes, len(key)):
        there = torch.zeros((math.prod(sizes),), dtype=torch.bool, device=key.device)
        key = there.index_fill_(0, key.long(), True).nonzero()[:, 0]
        key = key.int() if len(there) < 2**31 else key
    else:
        key = key.sort().values
        first = torch.ones_like(key, dtype=torch.bool)
        torch.ne(key[1:], key[:-1], out=first[1:])
        key = key[first]
    found = []
    for size in sizes[:0:-1]:
        above = key.div(size, rounding_mode="floor")
        found.append((key - above * size).int())
        key = above
    return [key.int(), *found[::-1]]


def _derive_fake(coordinates: Tensor, *rest: Any) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return coordinates.new_empty((count, 4))


_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "derived_sites(Tensor coordinates, int[] shape, int[] out_shape, int batch, int[] window, "
    "bool grow) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("derived_sites", _derive, _device)
torch.library.register_fake("sparseattn::derived_sites", _derive_fake, lib=_library)
