"""SiteSet: active sites of a batch of volumes, with whatever is worked out from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseattn.structures.site_lookup import CELLS_PER_SITE, SMALLEST_TABLE, Three, Window


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
    """Return coordinates int32 [n, 4] in raster order. One axis after the other: n stays small."""
    kernel, stride, low, dilation = Window.unpack(window)
    sizes = [batch, *shape]
    places = coordinates.to(torch.int64)
    for axis in range(3):
        size = sizes[axis + 1] = out_shape[axis]
        offsets = torch.arange(kernel[axis], device=places.device) * dilation[axis] - low[axis]
        if grow:
            reached = places[:, axis + 1, None] * stride[axis] + offsets
            fits = (reached >= 0) & (reached < size)
        else:
            before = places[:, axis + 1, None] - offsets
            reached = before.div(stride[axis], rounding_mode="floor")
            fits = (reached >= 0) & (reached < size) & (reached * stride[axis] == before)
        site, tap = fits.nonzero(as_tuple=True)
        places = places[site]
        places[:, axis + 1] = reached[site, tap]
        places = _distinct(places, sizes)
    return places.to(torch.int32)


def _distinct(places: Tensor, sizes: list[int]) -> Tensor:
    """Return each of the places [n, 4] once, in raster order."""
    key, cells = places[:, 0], sizes[0]
    for axis in (1, 2, 3):
        key, cells = key * sizes[axis] + places[:, axis], cells * sizes[axis]
    if cells <= max(CELLS_PER_SITE * len(key), SMALLEST_TABLE):
        there = torch.zeros((cells,), dtype=torch.bool, device=key.device)
        key = there.index_fill_(0, key, True).nonzero()[:, 0]
    else:
        key = torch.unique(key)
    found = []
    for size in sizes[:0:-1]:
        found.append(key % size)
        key = key // size
    return torch.stack((key, *found[::-1]), 1)


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
