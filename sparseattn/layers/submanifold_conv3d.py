"""Submanifold convolution as a module that takes the weights of a dense one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from sparseattn import checks
from sparseattn.ops.submanifold_conv3d import submanifold_conv3d
from sparseattn.structures.patch_grid import PatchGrid
from sparseattn.structures.voxel_tensor import VoxelTensor

_OP = "SubmanifoldConv3d"
Sites = TypeVar("Sites", PatchGrid, VoxelTensor)


class SubmanifoldConv3d(nn.Conv3d):
    """``nn.Conv3d`` of stride 1 and padding "same", on the active sites of patches or voxels.

    Takes a ``PatchGrid`` or a ``VoxelTensor`` and returns the same structure. Parameters, their
    names and their initial values are those of ``nn.Conv3d``, so state dicts go both ways. See
    :func:`sparseattn.submanifold_conv3d` for what it computes.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: taps along each axis, one number or three.
        dilation: distance of neighbouring taps in voxels, one number or three.
        groups: into how many groups the channels are cut.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        *,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_channels, out_channels, kernel_size, padding="same", dilation=dilation,
            groups=groups, bias=bias, **options,
        )  # fmt: skip

    @classmethod
    def from_torch(cls, conv: nn.Conv3d) -> SubmanifoldConv3d:
        """Return the sparse twin of a dense convolution; both hold the same parameters.

        Raises:
            TypeError: it is no ``nn.Conv3d``.
            ValueError: its stride is not 1, its padding is not "same" as in size, or is not zeros.
        """
        if not isinstance(conv, nn.Conv3d):
            raise TypeError(f"{_OP}: conv {checks.describe(conv)}; expected a torch.nn.Conv3d")
        if obstacle := dense_obstacle(conv):
            raise ValueError(f"{_OP}: {obstacle}")
        twin = cls(
            conv.in_channels, conv.out_channels, _three(conv.kernel_size),
            dilation=_three(conv.dilation), groups=conv.groups, bias=conv.bias is not None,
            device="meta",
        )  # fmt: skip
        twin.weight, twin.bias = conv.weight, conv.bias
        return twin.train(conv.training)

    def forward(self, x: Sites) -> Sites:  # type: ignore[override]
        """Convolve the active sites."""
        return submanifold_conv3d(
            x, self.weight, self.bias, dilation=_three(self.dilation), groups=self.groups
        )


def dense_obstacle(conv: nn.Conv3d) -> str | None:
    """Return why a dense convolution has no submanifold twin, if so."""
    same = tuple(d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    if conv.padding not in ("same", same) or set(conv.stride) != {1}:
        return (
            f"conv has stride={conv.stride} and padding={conv.padding}; expected stride 1 and "
            f"padding {same} or 'same' (from kernel_size and dilation)"
        )
    if conv.padding_mode != "zeros":
        return f"conv has padding_mode={conv.padding_mode!r}; expected 'zeros'"
    return None


def _three(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    return sizes[0], sizes[1], sizes[2]
