"""PatchMask: which patches of a regular grid are active, and who their neighbours are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparseattn import checks
from sparseattn.constants import PAD_INDEX

_OP = "PatchMask"


@dataclass(frozen=True, eq=False)
class PatchMask:
    """Which patches of a regular grid are active: the mask of masked image modelling.

    A volume is cut into fx * fy * fz equal patches. The active ones of all samples are numbered by
    row, samples first, then raster order. The mask knows nothing of a patch's size, so one mask
    serves every level of a network whose pooling stays inside the patches::

        mask = PatchMask.from_scores(torch.rand(batch, 6, 6, 6), keep=54)  # 54 of 216 patches

    Fields, all int32:
        table [B, fx, fy, fz]: the row of a patch, -1 where it is not active.
        patches [P]: the flat place of each row's patch in `table`.
        neighbours [P, 27]: the row of the patch at offset (dx, dy, dz) from -1 to 1 along each
            axis, dz fastest; -1 where it is not active or lies outside the volume.
        order [64, P]: for each kind of place in a patch (side of x, y and z: inside, low, high or
            both ends), the rows sorted by which of the neighbours that place touches are active.

    Build it with ``from_scores`` or ``from_mask``. With ``keep`` given, all sizes are known on the
    host and nothing waits for the device.
    """

    table: Tensor
    patches: Tensor
    neighbours: Tensor
    order: Tensor

    @classmethod
    def from_scores(cls, scores: Tensor, keep: int) -> PatchMask:
        """Keep the `keep` patches of highest score in every sample.

        Args:
            scores: floating point [B, fx, fy, fz]. Ties go to the first patch in raster order.
            keep: how many patches a sample keeps, at most all of them.

        Not differentiable with respect to the scores.
        """
        checks.Shapes(_OP).bind("scores", scores, "B fx fy fz")
        checks.require_floating(_OP, "scores", scores)
        _check_keep(keep, scores)
        ranked = scores.detach().flatten(1).argsort(dim=1, descending=True, stable=True)
        return cls._from_kept(ranked[:, :keep].sort(dim=1).values, tuple(scores.shape))

    @classmethod
    def from_mask(cls, active: Tensor, keep: int | None = None) -> PatchMask:
        """Keep the patches that are True.

        Args:
            active: bool [B, fx, fy, fz].
            keep: how many patches of every sample are True. Left out, they are counted, which waits
                for the device, and samples may differ. A promise that is broken raises
                RuntimeError; on CUDA it is a device-side assertion.
        """
        checks.Shapes(_OP).bind("active", active, "B fx fy fz")
        checks.require_dtype(_OP, "active", active, torch.bool)
        flat = active.flatten(1)
        if keep is None:
            return cls._from_patches(flat.flatten().nonzero()[:, 0], tuple(active.shape))
        _check_keep(keep, active)
        torch._assert_async(
            (flat.sum(1) == keep).all(),
            f"{_OP}: active has another number of True patches in some sample; expected {keep} "
            "in each (from keep)",
        )
        ranked = flat.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return cls._from_kept(ranked[:, :keep], tuple(active.shape))

    @classmethod
    def _from_kept(cls, kept: Tensor, shape: tuple[int, ...]) -> PatchMask:
        cells = shape[1] * shape[2] * shape[3]
        first = torch.arange(shape[0], device=kept.device)[:, None] * cells
        return cls._from_patches((kept + first).flatten(), shape)

    @classmethod
    def _from_patches(cls, patches: Tensor, shape: tuple[int, ...]) -> PatchMask:
        """Build everything from ascending flat places."""
        rows = torch.arange(patches.shape[0], dtype=torch.int32, device=patches.device)
        cells = shape[0] * shape[1] * shape[2] * shape[3]
        table = torch.full((cells,), PAD_INDEX, dtype=torch.int32, device=patches.device)
        table = table.scatter(0, patches, rows).view(shape)
        patches = patches.to(torch.int32)
        neighbours = neighbour_rows(table, patches, (1, 1, 1))
        return cls(table, patches, neighbours, _orders(neighbours))

    @property
    def batch(self) -> int:
        """B, the number of samples."""
        return self.table.shape[0]

    @property
    def grid(self) -> tuple[int, int, int]:
        """How many patches there are along x, y and z, active or not."""
        return self.table.shape[1], self.table.shape[2], self.table.shape[3]

    @property
    def num_patches(self) -> int:
        """P, the number of active patches of all samples."""
        return self.patches.shape[0]

    @property
    def device(self) -> torch.device:
        """The device of every tensor inside."""
        return self.table.device

    def __repr__(self) -> str:
        """Describe the geometry without reading the device."""
        return (
            f"PatchMask(batch={self.batch}, grid={self.grid}, num_patches={self.num_patches}, "
            f"device={str(self.device)!r})"
        )

    def to_dense(self, patch: int | tuple[int, int, int] = 1) -> Tensor:
        """Return which sites are active, bool [B, fx * px, fy * py, fz * pz]: its definition."""
        active = self.table >= 0
        for axis, size in enumerate(patch_size(_OP, patch)):
            active = active.repeat_interleave(size, axis + 1)
        return active

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return sample, x, y and z of every row's patch, int64 [P] each."""
        return _unravel(self.patches, self.grid)

    def neighbour_rows(self, reach: tuple[int, int, int], outside: int = PAD_INDEX) -> Tensor:
        """Return int32 [P, prod(2 * reach + 1)]: rows of patches up to `reach` away.

        -1 where a patch is not active, `outside` where it would lie outside the volume.
        """
        if reach == (1, 1, 1) and outside == PAD_INDEX:
            return self.neighbours
        return neighbour_rows(self.table, self.patches, reach, outside)

    def to(self, device: torch.device | str) -> PatchMask:
        """Return the mask with every tensor on `device`."""
        target = torch.device(device)
        return self.map(lambda tensor: tensor.to(target))

    def map(self, move: Callable[[Tensor], Tensor]) -> PatchMask:
        """Return the mask with every tensor passed through `move`."""
        tensors = (self.table, self.patches, self.neighbours, self.order)
        return PatchMask(*(move(tensor) for tensor in tensors))


def patch_size(op: str, patch: Any) -> tuple[int, int, int]:
    """Check a patch size, one number or three; return three."""
    sizes = (patch,) * 3 if isinstance(patch, int) else patch
    rule = "an int >= 1 or three of them"
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 3:
        raise TypeError(f"{op}: patch {checks.describe(patch)}; expected {rule}")
    for size in sizes:
        checks.require_int(op, "patch", size, low=1)
    return sizes[0], sizes[1], sizes[2]


def neighbour_rows(
    table: Tensor, patches: Tensor, reach: tuple[int, int, int], outside: int = PAD_INDEX
) -> Tensor:
    """Look the patches around each active one up in a table with a border of `outside`."""
    rx, ry, rz = reach
    bordered = pad(table, (rz, rz, ry, ry, rx, rx), value=outside)
    sizes = bordered.shape
    sample, x, y, z = _unravel(patches, (table.shape[1], table.shape[2], table.shape[3]))
    # the corner of the neighbourhood, which in the bordered table starts at the patch's own place
    corner = ((sample * sizes[1] + x) * sizes[2] + y) * sizes[3] + z
    dx, dy, dz = (torch.arange(2 * r + 1, device=table.device) for r in reach)
    steps = (dx[:, None, None] * sizes[2] + dy[:, None]) * sizes[3] + dz
    places = corner[:, None] + steps.flatten()
    return bordered.flatten()[places]


def _unravel(patches: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    place = patches.long()
    z = place % grid[2]
    y = place // grid[2] % grid[1]
    x = place // (grid[2] * grid[1]) % grid[0]
    return place // (grid[0] * grid[1] * grid[2]), x, y, z


def _orders(neighbours: Tensor) -> Tensor:
    """Return PatchMask.order: a stable sort by the neighbours that a place touches.

    Neighbours across a face count most, since they serve most taps. Any order is right; a good one
    lets a tile of rows skip more taps. Made of device arithmetic: a table from the host would wait.
    """
    device = neighbours.device
    side, step = torch.arange(4, device=device)[:, None], torch.arange(3, device=device)
    touched = torch.where(step == 0, side & 1, torch.where(step == 2, side >> 1, 1)).double()
    place = torch.arange(27, device=device)
    distance = sum((place // size % 3 - 1).abs() for size in (1, 3, 9))
    value = torch.exp2(27.0 * (3 - distance) - place)
    weights = torch.einsum("ai,bj,ck->abcijk", touched, touched, touched).view(64, 27) * value
    codes = weights @ (neighbours >= 0).double().mT
    return codes.argsort(dim=1, descending=True, stable=True).to(torch.int32)


def _check_keep(keep: Any, scores: Tensor) -> None:
    cells = scores.shape[1] * scores.shape[2] * scores.shape[3]
    checks.require_int(_OP, "keep", keep, low=0)
    if keep > cells:
        raise ValueError(f"{_OP}: keep is {keep}; expected at most {cells} patches of a sample")
