"""What the launchers of convolution share: the window, and inputs in the form kernels take."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from .. import launch as launching


class Window(NamedTuple):
    """Sizes along x, y and z of a patch of the input and of a convolution's window.

    Output o of a volume reads o * stride - low + dilation * t through tap t; a patch of the output
    has 1 / stride of the sites.
    """

    patch: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    low: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def pooled(self) -> tuple[int, ...]:
        """Sites of a patch of the output along each axis."""
        return tuple(p // s for p, s in zip(self.patch, self.stride, strict=True))

    @property
    def sites(self) -> int:
        """Sites of a patch of the output."""
        return math.prod(self.pooled)

    @property
    def taps(self) -> int:
        """Taps of the window."""
        return math.prod(self.kernel)

    @property
    def mirrored(self) -> Window:
        """The window turned round, through which the gradient of the input goes at stride 1."""
        axes = zip(self.low, self.kernel, self.dilation, strict=True)
        return self._replace(low=tuple(d * (k - 1) - low for low, k, d in axes))

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time sizes, as keywords of a kernel."""
        return {
            "PATCH": self.patch, "POOLED": self.pooled, "KERNEL": self.kernel,
            "STRIDE": self.stride, "LOW": self.low, "DILATION": self.dilation,
        }  # fmt: skip


class Table(NamedTuple):
    """A kernel map with sorted columns.

    rows: int32 [taps, N_out], the input that each column reads through each tap, or -1.
    order: int32 [N_out], the output of each column.
    lists: int32 [ceil(N_out / sites_per_list), 1 + taps]: for each so many columns, how many taps
        find an input in any of them, and these taps.
    """

    rows: Tensor
    order: Tensor
    lists: Tensor
    sites_per_list: int


def features(x: Tensor) -> Tensor:
    """Return features contiguous, and not bfloat16 where that is interpreted."""
    return launching.raise_bfloat16(x, bool(triton.knobs.runtime.interpret)).contiguous()


def padded(x: Tensor, groups: int) -> Tensor:
    """Return x [..., C] with zeros behind each group's channels, so that a group is whole 16 bytes.

    Of other channels a kernel loads element by element and keeps as many addresses. Where the zeros
    would be more than the channels, x stays as it is.
    """
    channels = x.shape[-1] // groups
    missing = -channels % (16 // x.element_size())
    if missing == 0 or missing > channels:
        return x
    return pad(x.unflatten(-1, (groups, -1)), (0, missing)).flatten(-2)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def precision(dtype: torch.dtype, float32: str) -> str:
    """Return how products are made: TF32 for float32 only where torch allows convolutions it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else float32
