"""KernelMap: which row of the features each tap of a convolution reads, for any active sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseattn.constants import PAD_INDEX, SITES_PER_LIST
from sparseattn.structures import site_lookup
from sparseattn.structures.site_lookup import Window
from sparseattn.structures.site_sets import SiteSet

_WORD = 62  # taps whose presence is packed into an int64 to sort by


class Pairs(NamedTuple):
    """The same map by taps: tap t pairs inputs[offsets[t] : offsets[t + 1]] with outputs.

    inputs, outputs: int32 [taps * N_out], so that no count is needed on the host; what
    lies behind the last offset means nothing. offsets: int64 [taps + 1].
    """

    inputs: Tensor
    outputs: Tensor
    offsets: Tensor


@dataclass(frozen=True, eq=False)
class KernelMap:
    """Which input row each output row of a sparse convolution reads through each tap.

    Fields:
        rows: int32 [taps, N_out], taps in raster order; PAD_INDEX (-1) where nobody is active.
        num_inputs: N_in, how many rows the input has.
        symmetric: whether output i reads j through tap t just when j reads i through the last tap
            less t, as in a submanifold convolution of odd size. Then the gradient of the input
            goes through the same map with the taps reversed.
        order: int32 [N_out], the output that each column of `rows` belongs to; None: its own.
        lists: int32 [ceil(N_out / SITES_PER_LIST), 1 + taps]. For each so many columns of `rows`:
            how many taps find an input in any of them, then these taps, ascending. None without
            an order.

    ``VoxelTensor.kernel_map`` builds and keeps it.
    """

    rows: Tensor
    num_inputs: int
    symmetric: bool = False
    order: Tensor | None = None
    lists: Tensor | None = None

    @classmethod
    def between(
        cls, fine: SiteSet, coarse: SiteSet, window: Window, method: str = "auto"
    ) -> KernelMap:
        """Build the map of a convolution from a fine set to a coarse one.

        Coordinates of `fine` are checked: ValueError names the first that leaves the volume or is
        there twice; on a GPU it is a device-side assertion. Nothing waits for a GPU.

        Args:
            fine: the sites that are read.
            coarse: the sites that read, y; they read y * stride - low + dilation * t.
            window: the taps.
            method: how sites are looked up: "table" (memory of the whole volume), "hash" (16 to 32
                bytes a site, by a kernel on CUDA), "search" (sorted keys), or "auto" (by the
                device, the number of cells and that of sites).
        """
        same = fine.coordinates is coarse.coordinates
        rows = torch.ops.sparseattn.neighbour_rows.default(
            fine.coordinates, coarse.coordinates, list(fine.spatial_shape),
            list(coarse.spatial_shape), fine.batch_size, window.pack(), method, same,
        )  # fmt: skip
        return cls(rows, fine.coordinates.shape[0], same and window.symmetric)

    @property
    def taps(self) -> int:
        """How many taps the window has."""
        return self.rows.shape[0]

    @property
    def num_outputs(self) -> int:
        """N_out, how many rows the output has."""
        return self.rows.shape[1]

    def __repr__(self) -> str:
        """Describe the sizes without reading the device."""
        return (
            f"KernelMap(taps={self.taps}, num_inputs={self.num_inputs}, "
            f"num_outputs={self.num_outputs}, symmetric={self.symmetric}, "
            f"sorted={self.order is not None}, device={str(self.rows.device)!r})"
        )

    def pairs(self) -> Pairs:
        """Return the pairs of every tap, in the order of the columns of `rows`."""
        found = self.rows >= 0
        ends = found.sum(1).cumsum(0)
        capacity = self.rows.numel()
        place = found.flatten().cumsum(0) - 1
        place = torch.where(found.flatten(), place, capacity)  # one more, for what is not there
        outputs = self._outputs().expand(self.taps, -1)
        made = [
            values.new_zeros((capacity + 1,)).scatter(0, place, values.flatten())[:capacity]
            for values in (self.rows, outputs)
        ]
        return Pairs(made[0], made[1], pad(ends, (1, 0)))

    def transposed(self) -> KernelMap:
        """Return the map of the transposed convolution, which reads backwards through each tap."""
        readers = torch.full(
            (self.taps, self.num_inputs + 1), PAD_INDEX, dtype=torch.int32, device=self.rows.device
        )
        place = torch.where(self.rows >= 0, self.rows, self.num_inputs).long()
        readers = readers.scatter(1, place, self._outputs().expand(self.taps, -1))
        return KernelMap(readers[:, : self.num_inputs].contiguous(), self.num_outputs)

    def sorted_by_taps(self) -> KernelMap:
        """Return the map with columns sorted so that neighbours find inputs through the same taps.

        Which taps find one is a number of as many bits, the tap that finds least first. Read as a
        Gray code it is decoded and sorted, so that from one column to the next few bits change.
        Ties stay in order.
        """
        if self.order is not None:
            return self
        found = self.rows >= 0
        rare = found.sum(1, dtype=torch.int32).argsort(stable=True)
        decoded = found[rare].cumsum(0, dtype=torch.uint8) & 1
        order = self._outputs().long()
        for last in range(self.taps, 0, -_WORD):  # the least significant taps first
            bits = decoded[max(0, last - _WORD) : last]
            places = torch.arange(len(bits) - 1, -1, -1, device=bits.device)
            word = (bits << places[:, None]).sum(0)
            order = order[word[order].argsort(stable=True)]
        rows = self.rows[:, order]
        spare = -self.num_outputs % SITES_PER_LIST
        live = pad(rows >= 0, (0, spare)).unflatten(1, (-1, SITES_PER_LIST)).any(2)
        taps = (~live).to(torch.uint8).argsort(dim=0, stable=True)
        lists = torch.cat((live.sum(0, keepdim=True), taps)).mT.to(torch.int32).contiguous()
        return KernelMap(rows, self.num_inputs, self.symmetric, order.to(torch.int32), lists)

    def _outputs(self) -> Tensor:
        if self.order is not None:
            return self.order
        return torch.arange(self.num_outputs, dtype=torch.int32, device=self.rows.device)


def kernel_map(
    fine: SiteSet, coarse: SiteSet, window: Window, *, backwards: bool, sort: bool
) -> KernelMap:
    """Return the map that is kept with `fine`, made if need be.

    backwards: from coarse to fine. sort: as the kernels want it.
    """

    def forward() -> KernelMap:
        made = KernelMap.between(fine, coarse, window)
        return made.sorted_by_taps() if sort else made

    def back() -> KernelMap:
        made = found.transposed()
        return made.sorted_by_taps() if sort else made

    found: KernelMap = fine.find(("map", sort), window, coarse.coordinates, forward)
    if not backwards or found.symmetric:
        return found
    returned: KernelMap = fine.find(("map back", sort), window, coarse.coordinates, back)
    return returned


def _rows(
    fine: Tensor, coarse: Tensor, shape: list[int], coarse_shape: list[int], batch: int,
    window: list[int], method: str, same: bool,
) -> Tensor:  # fmt: skip
    sizes, coarse_sizes = [batch, *shape], [batch, *coarse_shape]
    taps = Window.unpack(window)
    return site_lookup.neighbour_rows(fine, coarse, sizes, coarse_sizes, taps, method, same)


def _rows_fake(
    fine: Tensor, coarse: Tensor, shape: list[int], coarse_shape: list[int], batch: int,
    window: list[int], *rest: Any,
) -> Tensor:  # fmt: skip
    return coarse.new_empty((window[0] * window[1] * window[2], coarse.shape[0]))


_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "neighbour_rows(Tensor fine, Tensor coarse, int[] shape, int[] coarse_shape, int batch, "
    "int[] window, str method, bool same) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _library.impl("neighbour_rows", _rows, _device)
torch.library.register_fake("sparseattn::neighbour_rows", _rows_fake, lib=_library)
