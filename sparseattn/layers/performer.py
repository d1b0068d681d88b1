"""The method "performer": softmax attention through random features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.approximation import Approximation
from sparseattn.layers.method import Call, Place
from sparseattn.ops.attention_factors import AttentionFactors
from sparseattn.ops.orthogonal_features import check_norms, orthogonal_features
from sparseattn.ops.performer_attention import Impl, Kernel, check_kernel, performer_attention


class Performer(Approximation):
    """Every query attends to all keys, through random features (FAVOR+).

    features: how many. kernel: "softmax", "cosh" or "relu". norms: of the directions, "chi" or
    "sqrt", as in orthogonal_features. eps: for models trained elsewhere, as in
    performer_attention. seed: what the directions are drawn from; None: torch's own generator.

    The directions are the buffer ``projection`` [features, head dim], part of the state_dict:
    they belong to what is trained. ``redraw`` draws new ones.
    """

    name = "performer"
    options = ("features", "kernel", "norms", "eps", "seed", "impl")
    needs_place = True
    projection: Tensor | None

    def __init__(
        self,
        features: int = 256,
        kernel: Kernel = "softmax",
        norms: Literal["chi", "sqrt"] = "chi",
        eps: float = 0.0,
        seed: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        checks.require_int(self.name, "features", features, low=1)
        check_kernel(kernel, eps, self.name)
        check_norms(norms, self.name)
        if seed is not None:
            checks.require_int(self.name, "seed", seed, low=0)
        self.features, self.kernel, self.norms = features, kernel, norms
        self.eps, self.seed = eps, seed
        self.register_buffer("projection", None)

    def obstacle(self, place: Place) -> str | None:
        """Return what the method misses there, if so."""
        return None if place.head_dim else "method='performer' needs the head dim"

    def prepare(self, place: Place, device: Any = None, dtype: Any = None) -> None:
        """Draw the directions."""
        if not place.head_dim:
            raise ValueError(f"{self.name}: head_dim is {place.head_dim}; expected an int >= 1")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.projection = torch.empty(self.features, place.head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the directions as at the beginning."""
        self.redraw(None if self.seed is None else torch.Generator().manual_seed(self.seed))

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new directions, in place."""
        projection = self._drawn()
        orthogonal_features(
            *projection.shape, norms=self.norms, generator=generator, out=projection
        )

    def factors(self, call: Call) -> AttentionFactors:
        """Return the attention weights as the product of two thin matrices."""
        return AttentionFactors.performer(
            call.q, call.k, self._drawn(), kernel=self.kernel, key_mask=call.key_mask,
            scale=call.scale, eps=self.eps,
        )  # fmt: skip

    def _attend(self, call: Call) -> Tensor:
        return performer_attention(
            call.q, call.k, call.v, self._drawn(), kernel=self.kernel, key_mask=call.key_mask,
            scale=call.scale, eps=self.eps, impl=self.impl,
        )  # fmt: skip

    def _drawn(self) -> Tensor:
        if self.projection is None:
            raise RuntimeError(f"{self.name}: has no features yet; expected a call of prepare")
        return self.projection


def redraw_features(model: nn.Module, generator: torch.Generator | None = None) -> int:
    """Draw the random features of every performer layer in a model anew, in place.

    Call it between steps of training, say every 1000, so that the model does not settle on the
    errors of one draw; it works on compiled models, too. Do not call it before an evaluation whose
    numbers are to be repeated.

    Args:
        model: with layers of the method "performer".
        generator: where the numbers come from, layer by layer; default torch's own for the CPU.
            With several processes all need one of equal state, or else differ until
            DistributedDataParallel broadcasts its buffers.

    Returns:
        How many layers were found.
    """
    found = [module for module in model.modules() if isinstance(module, Performer)]
    for method in found:
        method.redraw(generator)
    return len(found)
