"""Strided and transposed convolution of sites as modules that take the weights of dense ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.submanifold_conv3d import SubmanifoldConv3d
from sparseattn.ops.sparse_conv3d import Sites, sparse_conv3d
from sparseattn.ops.sparse_conv_transpose3d import sparse_conv_transpose3d
from sparseattn.structures.voxel_tensor import VoxelTensor


class SparseConv3d(nn.Conv3d):
    """``nn.Conv3d`` of a ``VoxelTensor`` or ``PatchGrid``: :func:`sparseattn.sparse_conv3d`.

    Constructor, parameters, their initial values and the state_dict are those of ``nn.Conv3d``.
    Padding is zeros, in numbers.
    """

    @classmethod
    def from_torch(cls, conv: nn.Conv3d) -> SparseConv3d:
        """Return the sparse twin of a dense convolution; both hold the same parameters.

        Raises:
            TypeError: it is no ``nn.Conv3d``.
            ValueError: its padding is not zeros, in numbers.
        """
        return _twin(cls, nn.Conv3d, conv)

    def forward(  # type: ignore[override]
        self, x: Sites, out_sites: VoxelTensor | None = None
    ) -> Sites:
        """Convolve to the voxels of `out_sites`, to all that read one of x, or to its patches."""
        _check_padding(type(self).__name__, self)
        return sparse_conv3d(
            x, self.weight, self.bias, stride=_three(self.stride), padding=_three(self.padding),
            dilation=_three(self.dilation), groups=self.groups, out_sites=out_sites,
        )  # fmt: skip


class SparseConvTranspose3d(nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` of a ``VoxelTensor``: :func:`sparseattn.sparse_conv_transpose3d`.

    Constructor, parameters, their initial values and the state_dict are those of
    ``nn.ConvTranspose3d``.
    """

    @classmethod
    def from_torch(cls, conv: nn.ConvTranspose3d) -> SparseConvTranspose3d:
        """Return the sparse twin of a dense convolution; both hold the same parameters.

        Raises:
            TypeError: it is no ``nn.ConvTranspose3d``.
        """
        return _twin(cls, nn.ConvTranspose3d, conv)

    def forward(  # type: ignore[override]
        self, x: VoxelTensor, out_sites: VoxelTensor | None = None
    ) -> VoxelTensor:
        """Convolve to the voxels of `out_sites`, or to all that one of x reaches."""
        return sparse_conv_transpose3d(
            x, self.weight, self.bias, stride=_three(self.stride), padding=_three(self.padding),
            output_padding=_three(self.output_padding), dilation=_three(self.dilation),
            groups=self.groups, out_sites=out_sites,
        )  # fmt: skip


def load_spconv(conv: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the parameters of a convolution of spconv 2 into one of ours.

    spconv's weight is [C_out, kx, ky, kz, C_in], its inverse convolution's too.

    Args:
        conv: SubmanifoldConv3d, SparseConv3d or SparseConvTranspose3d, with groups=1.
        state: state_dict of spconv's SubMConv3d, SparseConv3d, or for a transposed convolution
            SparseInverseConv3d or SparseConvTranspose3d.

    Raises:
        TypeError: conv is another module.
        ValueError: the state lacks a parameter of conv or has another one, or a shape differs.
    """
    if not isinstance(conv, (SubmanifoldConv3d, SparseConv3d, SparseConvTranspose3d)):
        raise TypeError(f"load_spconv: conv {checks.describe(conv)}; expected a sparse convolution")
    own = dict(conv.named_parameters())
    if own.keys() != state.keys():
        raise ValueError(f"load_spconv: state has {sorted(state)}; expected {sorted(own)}")
    order = (4, 0, 1, 2, 3) if isinstance(conv, SparseConvTranspose3d) else (0, 4, 1, 2, 3)
    for name, parameter in own.items():
        value = state[name].permute(order) if state[name].dim() == 5 else state[name]
        if value.shape != parameter.shape:
            raise ValueError(
                f"load_spconv: {name} {checks.describe(state[name])}; expected that of "
                f"{list(parameter.shape)} in spconv's order"
            )
        with torch.no_grad():
            parameter.copy_(value)


def _twin(cls: Any, kind: Any, conv: Any) -> Any:
    """Make a module of class `cls` with the options and the very parameters of `conv`."""
    if not isinstance(conv, kind):
        rule = f"expected a torch.nn.{kind.__name__}"
        raise TypeError(f"{cls.__name__}: conv {checks.describe(conv)}; {rule}")
    _check_padding(cls.__name__, conv)
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    options = {name: getattr(conv, name) for name in names}
    if kind is nn.Conv3d:
        del options["output_padding"]
    twin = cls(
        conv.in_channels, conv.out_channels, conv.kernel_size, bias=conv.bias is not None,
        device="meta", **options,
    )  # fmt: skip
    twin.weight, twin.bias = conv.weight, conv.bias
    return twin.train(conv.training)


def strided_obstacle(conv: nn.Conv3d) -> str | None:
    """Return why a dense convolution has no twin on patches whose number of sites it divides."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}; expected zeros"
    axes = zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True)
    if not all(2 * low < d * (k - 1) + 1 <= step + 2 * low for k, step, low, d in axes):
        return (
            f"kernel_size={conv.kernel_size} with stride={conv.stride}, padding={conv.padding} and "
            f"dilation={conv.dilation}; expected 2 * padding < dilation * (kernel_size - 1) + 1 <= "
            "stride + 2 * padding"
        )
    return None


def _check_padding(op: str, conv: Any) -> None:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise ValueError(
            f"{op}: conv has padding={conv.padding!r} and padding_mode={conv.padding_mode!r}; "
            "expected numbers and 'zeros' (SubmanifoldConv3d has padding 'same')"
        )


def _three(sizes: Any) -> tuple[int, int, int]:
    return sizes[0], sizes[1], sizes[2]
