"""What treats every value alone, such as an activation, on the features of a ``PatchGrid``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sparseattn.structures.patch_grid import PatchGrid


class SparsePointwise(nn.Module):
    """First base of a class whose second is a module that treats every value alone."""

    def forward(self, x: PatchGrid) -> PatchGrid:
        """Apply it to the features."""
        return x.with_features(super().forward(x.features))  # type: ignore[misc]


class SparseChannelNorm(nn.Module):
    """Layer norm over the channels of each active site, for modules written channels first.

    Takes the place of the ``LayerNorm(C, eps, data_format="channels_first")`` of ConvNeXt, SparK,
    MedNeXt and HySparK, whose weight, bias and eps it uses.
    """

    weight: Tensor
    bias: Tensor
    eps: float

    def forward(self, x: PatchGrid) -> PatchGrid:
        """Normalise every active site over its channels."""
        return x.with_features(
            layer_norm(x.features, (x.channels,), self.weight, self.bias, self.eps)
        )


def _pointwise(kind: type[nn.Module]) -> type[nn.Module]:
    members: dict[str, Any] = {"__module__": __name__, "__doc__": f"``nn.{kind.__name__}``."}
    return type(f"Sparse{kind.__name__}", (SparsePointwise, kind), members)


POINTWISE: dict[type[nn.Module], type[nn.Module]] = {
    kind: _pointwise(kind)
    for kind in (
        nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU,
        nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
    )
}  # fmt: skip
globals().update({twin.__name__: twin for twin in POINTWISE.values()})  # so that they are pickled
