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
    sequence that is added to the result; with a grid also an odd number for each of its axes, of
    one on the grid; None: no such convolution. legacy_start: for models trained with transformers
    or nystrom-attention, in which a sample depends on its batch mates.

    Self-attention only. The convolution is the parameter ``residual``, one filter a head, which
    begins at zero: [G, 1, residual_kernel, 1], as the others have it, or on a grid
    [G, 1, *residual_kernel]. A masked token counts as 0 in it.
    """

    name = "nystrom"
    options = ("num_landmarks", "iterations", "grid", "residual_kernel", "legacy_start", "impl")
    residual: nn.Parameter | None

    def __init__(
        self,
        num_landmarks: int | Sequence[int] = 64,
        iterations: int = 6,
        grid: Sequence[int] | None = None,
        residual_kernel: int | Sequence[int] | None = None,
        legacy_start: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(impl)
        if isinstance(num_landmarks, int):
            checks.require_int(self.name, "num_landmarks", num_landmarks, low=1)
        checks.require_int(self.name, "iterations", iterations, low=1)
        checks.require_bool(self.name, "legacy_start", legacy_start)
        self._check_residual_kernel(residual_kernel, grid)
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
        kernel = self.residual_kernel
        shape = (place.heads, 1, *((kernel, 1) if isinstance(kernel, int) else kernel))
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
        residual: Tensor | None = self.residual
        if self.residual_kernel is not None:
            if residual is None:
                raise RuntimeError(f"{self.name}: has no residual yet; expected a call of prepare")
            residual = residual[:, 0]
            residual = residual[..., 0] if isinstance(self.residual_kernel, int) else residual
        return nystrom_attention(
            call.q, call.k, call.v, self.num_landmarks, iterations=self.iterations,
            key_mask=call.key_mask, grid=self.grid, scale=call.scale,
            legacy_start=self.legacy_start, residual=residual, impl=self.impl,
        )  # fmt: skip

    def _check_residual_kernel(self, kernel: Any, grid: Any) -> None:
        if kernel is None:
            return
        on_grid = grid is not None and isinstance(kernel, Sequence)
        sizes = kernel if on_grid else (kernel,)
        for size in sizes:
            checks.require_int(self.name, "residual_kernel", size, low=1)
        rule = "an odd int" + ("" if grid is None else ", or one for each axis of the grid")
        if any(size % 2 == 0 for size in sizes) or (on_grid and len(kernel) != len(grid)):
            raise ValueError(
                f"{self.name}: residual_kernel {checks.describe(kernel)}; expected {rule}"
            )
