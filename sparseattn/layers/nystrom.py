"""The method "nystrom": softmax attention through the means of segments of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseattn import checks
from sparseattn.layers.approximation import Approximation
from sparseattn.layers.method import Call, Place
from sparseattn.ops.attention_factors import AttentionFactors
from sparseattn.ops.nystrom_attention import Impl, nystrom_attention


class Nystrom(Approximation):
    """Every query attends to all keys, through landmarks: means of segments of the tokens.

    num_landmarks: segments, or with a grid boxes, a number or one for each axis. iterations: of
    the pseudo-inverse. grid: sizes of the image or volume, whose class tokens stand in front.
    residual_kernel: tokens, an odd number, of a depth-wise convolution of the values along the
    sequence that is added to the result; None: no such convolution. legacy_start: for models
    trained with transformers or nystrom-attention, in which a sample depends on its batch mates.

    Self-attention only. The convolution is the parameter ``residual`` [G, 1, residual_kernel, 1],
    one filter a head, which begins at zero. A masked token counts as 0 in it.
    """

    name = "nystrom"
    options = ("num_landmarks", "iterations", "grid", "residual_kernel", "legacy_start", "impl")
    residual: nn.Parameter | None

    def __init__(
        self,
        num_landmarks: int | Sequence[int] = 64,
        iterations: int = 6,
        grid: Sequence[int] | None = None,
        residual_kernel: int | None = None,
        legacy_start: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        if isinstance(num_landmarks, int):
            checks.require_int(self.name, "num_landmarks", num_landmarks, low=1)
        checks.require_int(self.name, "iterations", iterations, low=1)
        checks.require_bool(self.name, "legacy_start", legacy_start)
        if residual_kernel is not None:
            checks.require_int(self.name, "residual_kernel", residual_kernel, low=1)
            if residual_kernel % 2 == 0:
                raise ValueError(
                    f"{self.name}: residual_kernel is {residual_kernel}; expected an odd int"
                )
        self.num_landmarks, self.iterations, self.grid = num_landmarks, iterations, grid
        self.residual_kernel, self.legacy_start = residual_kernel, legacy_start
        self.needs_place = residual_kernel is not None
        self.register_parameter("residual", None)

    def obstacle(self, place: Place) -> str | None:
        """Return what the method misses there, if so."""
        if self.residual_kernel is not None and not place.heads:
            return "method='nystrom' with residual_kernel needs the number of heads"
        return None

    def prepare(self, place: Place, device: Any = None, dtype: Any = None) -> None:
        """Make the filters, if there are to be any."""
        if self.residual_kernel is None:
            return
        if not place.heads:
            raise ValueError(f"{self.name}: heads is {place.heads}; expected an int >= 1")
        shape = (place.heads, 1, self.residual_kernel, 1)
        self.residual = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Make the filters zero."""
        if self.residual is not None:
            nn.init.zeros_(self.residual)

    def factors(self, call: Call) -> AttentionFactors:
        """Return the attention weights as the product of two thin matrices, without residual."""
        return AttentionFactors.nystrom(
            call.q, call.k, self.num_landmarks, iterations=self.iterations, key_mask=call.key_mask,
            grid=self.grid, scale=call.scale, legacy_start=self.legacy_start,
        )  # fmt: skip

    def _attend(self, call: Call) -> Tensor:
        out = nystrom_attention(
            call.q, call.k, call.v, self.num_landmarks, iterations=self.iterations,
            key_mask=call.key_mask, grid=self.grid, scale=call.scale,
            legacy_start=self.legacy_start, impl=self.impl,
        )  # fmt: skip
        if self.residual_kernel is None:
            return out
        if self.residual is None:
            raise RuntimeError(f"{self.name}: has no residual yet; expected a call of prepare")
        v = call.v
        if call.key_mask is not None:
            v = v.masked_fill(~call.key_mask[:, None, :, None], 0)
        heads, half = v.shape[1], self.residual_kernel // 2
        added = nn.functional.conv2d(v, self.residual.to(v.dtype), padding=(half, 0), groups=heads)
        return out + added.repeat_interleave(out.shape[1] // max(1, heads), 1).to(out.dtype)
