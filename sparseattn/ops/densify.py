"""A PatchGrid as a dense volume with a learned token at hidden sites: the public op."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.ops import dispatch
from sparseattn.ops.blocked.plan import accumulate_dtype
from sparseattn.ops.convolution_checks import DTYPES, unsupported
from sparseattn.ops.once import differentiated_once
from sparseattn.reference.densify import densify as reference
from sparseattn.structures.patch_grid import PatchGrid

_OP = "densify"
Impl = Literal["auto", "triton", "torch", "reference"]

_library = torch.library.Library("sparseattn", "FRAGMENT")
_library.define(
    "densify(Tensor x, Tensor token, Tensor table, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "densify_backward(Tensor dy, Tensor table, int[] shape, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def densify(x: PatchGrid, token: Tensor, *, impl: Impl = "auto") -> Tensor:
    """Write active patches into a volume, and a token everywhere else, in one pass.

        y_v = x_v where v is active, else token

    Args:
        x: PatchGrid, float32, float16, bfloat16 or float64.
        token: [C] or [1, C, 1, 1, 1], dtype of x.
        impl: "triton" (NVIDIA GPU of capability 8.0 or newer; CPU under TRITON_INTERPRET=1),
            "torch" (any device), "reference" (differentiable twice), or "auto": triton on CUDA,
            else torch.

    Returns:
        [B, C, X, Y, Z], dtype of x, channels last in memory.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: the token has the wrong shape or device.
        NotImplementedError: impl="triton" cannot run this; the message lists every reason.

    Notes:
        Gradients are exact for features and token: a site gets that of its voxel, the token the sum
        over all others, made in float32 (float64 for float64) in a fixed order. So what arrives at
        an active voxel, be it NaN, never reaches the token. Deterministic. No wait for the device;
        shapes are static. Memory beyond the output: on a GPU 4 bytes for each 2048 voxels and
        channel in the backward; a gradient that is not channels last in memory is copied. Not
        differentiable twice, except impl="reference".

    Reference:
        Designing BERT for Convolutional Networks (2023), arXiv:2301.03580, section 3.2: mask
        embeddings.
    """
    if not isinstance(x, PatchGrid):
        raise TypeError(f"{_OP}: x {checks.describe(x)}; expected a PatchGrid")
    checks.require_dtype(_OP, "x", x.features, *DTYPES)
    checks.require_tensor(_OP, "token", token)
    if token.shape not in ((x.channels,), (1, x.channels, 1, 1, 1)):
        raise ValueError(
            f"{_OP}: token {checks.describe(token)}; expected [C] or [1, C, 1, 1, 1], "
            f"C={x.channels} (from x)"
        )
    checks.require_device(_OP, "token", token, x.device, "x")
    features, token = dispatch.autocast_inputs(x.features, token.flatten())
    if token.dtype != features.dtype:
        raise TypeError(
            f"{_OP}: token has dtype {token.dtype}; expected the dtype of x, "
            f"dtype={features.dtype} (from x)"
        )
    asked = impl == "triton" or (impl == "auto" and features.device.type == "cuda")
    chosen = dispatch.choose(_OP, impl, features.device, unsupported(features) if asked else [])
    if chosen == "reference":
        return reference(x.with_features(features), token)
    arguments = (features, token, x.mask.table, chosen)
    if torch.is_grad_enabled() and (features.requires_grad or token.requires_grad):
        y = _Densify.apply(*arguments)
    else:
        y = torch.ops.sparseattn.densify.default(*arguments)
    return y.permute(0, 4, 1, 2, 3)


class _Densify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, table: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(table)
        ctx.shape, ctx.impl = list(x.shape), impl
        return torch.ops.sparseattn.densify.default(x, token, table, impl)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.sparseattn.densify_backward.default(
            dy, *ctx.saved_tensors, ctx.shape, ctx.impl
        )
        needed = zip(found, ctx.needs_input_grad[:2], strict=True)
        wanted = tuple(gradient if needs else None for gradient, needs in needed)
        return *differentiated_once(_OP, wanted, dy), None, None


def _forward(x: Tensor, token: Tensor, table: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from sparseattn.kernels.sparse_pool3d import densify as kernels

        return kernels.forward(x, token, table).to(x.dtype)
    volume = token.expand(*_cells(table, x.shape), x.shape[4]).clone()
    sample, i, j, k = _active(table, x.shape[0])
    volume[sample, i, :, j, :, k, :] = x
    return volume.view(_volume(table, x.shape))


def _backward(dy: Tensor, table: Tensor, shape: list[int], impl: str) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from sparseattn.kernels.sparse_pool3d import densify as kernels

        dx, dtoken = kernels.backward(dy, table, tuple(shape))
        return dx.to(dy.dtype), dtoken.to(dy.dtype)
    volume = dy.contiguous().view(*_cells(table, shape), shape[4])
    sample, i, j, k = _active(table, shape[0])
    dx = volume[sample, i, :, j, :, k, :]
    # patch by patch, so that no sum has the gradient of an active one in it
    sums = volume.sum((2, 4, 6), dtype=accumulate_dtype(dy.dtype))  # [B, fx, fy, fz, C]
    dtoken = torch.where((table < 0)[..., None], sums, 0).flatten(0, 3).sum(0)
    return dx, dtoken.to(dy.dtype)


def _cells(table: Tensor, shape: Any) -> tuple[int, ...]:
    """Return [B, fx, px, fy, py, fz, pz]."""
    (batch, fx, fy, fz), (px, py, pz) = table.shape, shape[1:4]
    return batch, fx, px, fy, py, fz, pz


def _volume(table: Tensor, shape: Any) -> tuple[int, ...]:
    """Return [B, X, Y, Z, C]."""
    batch, fx, px, fy, py, fz, pz = _cells(table, shape)
    return batch, fx * px, fy * py, fz * pz, shape[4]


def _active(table: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return sample and cell of each active patch, whose number is known: no wait for it."""
    order = table.flatten().argsort(stable=True)[table.numel() - count :]
    return torch.unravel_index(order, table.shape)


def _forward_fake(x: Tensor, token: Tensor, table: Tensor, impl: str) -> Tensor:
    return x.new_empty(_volume(table, x.shape))


def _backward_fake(dy: Tensor, table: Tensor, shape: list[int], impl: str) -> tuple[Tensor, Tensor]:
    return dy.new_empty(shape), dy.new_empty(shape[4])


for _device in ("CPU", "CUDA"):
    _library.impl("densify", _forward, _device)
    _library.impl("densify_backward", _backward, _device)
torch.library.register_fake("sparseattn::densify", _forward_fake, lib=_library)
torch.library.register_fake("sparseattn::densify_backward", _backward_fake, lib=_library)
