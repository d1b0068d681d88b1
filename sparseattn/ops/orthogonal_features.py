"""Random directions for Performer attention, orthogonal within blocks of D."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from sparseattn import checks

_OP = "orthogonal_features"


def orthogonal_features(
    m: int,
    D: int,
    *,
    norms: Literal["chi", "sqrt"] = "chi",
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the projection of performer_attention.

        w_r = n_r * u_r,   u_r a uniformly random direction, orthogonal to those of its block of D

    Args:
        m: how many features.
        D: head dimension.
        norms: "chi": n_r is the length of a normal vector of D entries, so that w_r is one and the
            estimate of the softmax kernel has no bias; "sqrt": n_r = sqrt(D), with less variance.
        generator: where the numbers come from; default torch's own for the CPU. Equal states give
            equal features, whatever the device of the result.
        out: floating point [m, D], overwritten in place and returned, as a module does that redraws
            its buffer; dtype and device are then those of out.
        dtype: dtype of the result, floating point.
        device: device of the result; default the CPU.

    Returns:
        [m, D].

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or value.

    Notes:
        Drawn and orthogonalised in float32 on the device of the generator. No gradient flows.
        m does not have to be a multiple of D: the last block is cut off.

    Reference:
        Rethinking Attention with Performers (2020), arXiv:2009.14794, section 2.4.
    """
    checks.require_int(_OP, "m", m, low=1)
    checks.require_int(_OP, "D", D, low=1)
    _check_options(m, D, norms, generator, out, dtype)
    source = torch.device("cpu") if generator is None else generator.device
    with torch.no_grad():
        blocks = -(-m // D)
        drawn = torch.randn((blocks, D, D), generator=generator, device=source)
        directions, triangle = torch.linalg.qr(drawn)
        # the sign makes the direction uniform: QR alone fixes those of its factors as it likes
        directions = directions * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
        features = directions.mT.reshape(-1, D)[:m]
        if norms == "sqrt":
            features = features * D**0.5
        else:
            lengths = torch.randn((m, D), generator=generator, device=source).norm(dim=1)
            features = features * lengths[:, None]
        return features.to(device or "cpu", dtype) if out is None else out.copy_(features)


def check_norms(norms: Any, op: str = _OP) -> None:
    """Check the name of the norms."""
    if norms not in ("chi", "sqrt"):
        raise ValueError(f"{op}: norms is {norms!r}; expected one of 'chi', 'sqrt'")


def _check_options(m: int, D: int, norms: Any, generator: Any, out: Any, dtype: Any) -> None:
    check_norms(norms)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{_OP}: generator {checks.describe(generator)}; expected a torch.Generator or None"
        )
    if out is not None:
        shapes = checks.Shapes(_OP)
        shapes.set("m", m, "m")
        shapes.set("D", D, "D")
        shapes.bind("out", out, "m D")
        checks.require_floating(_OP, "out", out)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{_OP}: dtype {checks.describe(dtype)}; expected a floating point dtype")
