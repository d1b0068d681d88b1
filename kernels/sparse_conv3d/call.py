"""What the launchers of convolution share: the window, and inputs in the form kernels take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import launch as launching


class Window(NamedTuple):
    """Sizes along x, y and z of a patch and of a convolution's window.

    Padding is torch's "same": of the dilation * (kernel - 1) voxels beside the centre, the smaller
    half lies before it. mirrored: the larger half lies before it, as the input gradient needs.
    """

    patch: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    mirrored: bool = False

    @property
    def sites(self) -> int:
        """Sites of a patch."""
        return self.patch[0] * self.patch[1] * self.patch[2]

    @property
    def taps(self) -> int:
        """Taps of the window."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    def num_sites(self, x: Tensor) -> int:
        """Active sites of all patches."""
        return x.shape[0] * self.sites

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time sizes, as keywords of a kernel."""
        return {
            "PATCH": self.patch,
            "KERNEL": self.kernel,
            "DILATION": self.dilation,
            "MIRRORED": self.mirrored,
        }


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


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def precision(dtype: torch.dtype, float32: str) -> str:
    """Return how products are made: TF32 for float32 only where torch allows convolutions it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else float32
