"""What the launchers of landmark attention share: one attention's tensors and numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch as launching
from . import tuning


@dataclass(frozen=True)
class Call:
    """Rows q [B, H, Nq, D] and columns k, v [B, G, Nk, D] with a bias [B, G, Nk] or None.

    Batch and heads of q or k may be 1 and serve all. With a floor, v and bias have one more column.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    batch: int
    heads: int
    key_heads: int
    scale: float
    square: float
    flags: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        *,
        stage: int,
        square: float = 0.0,
        is_relu: bool = False,
        has_floor: bool = False,
    ) -> Call:
        """Bring inputs to unit column stride and, in the interpreter, out of bfloat16."""
        q, k, v = (raised(t) for t in (q, k, v))
        d0, d1 = launching.split_head_dim(q.shape[3], q.element_size())
        heads = q.shape[1] if stage == 2 else v.shape[1]
        flags = {
            "STAGE": stage,
            "GROUP": heads // max(1, v.shape[1]),
            "HAS_BIAS": bias is not None,
            "HAS_SQUARE": stage == 1 and square != 0.0,
            "HAS_FLOOR": has_floor,
            "IS_RELU": is_relu,
            "D": q.shape[3],
            "D0": d0,
            "D1": d1,
        }
        blank = q.new_zeros((1, 1, 1), dtype=torch.float32) if bias is None else bias
        bias = launching.unit_stride(blank)
        return cls(q, k, v, bias, v.shape[0], heads, v.shape[1], scale, square, flags)

    @property
    def landmarks(self) -> int:
        """m."""
        return self.q.shape[2] if self.flags["STAGE"] == 1 else self.k.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """q, k, v and bias."""
        return self.q, self.k, self.v, self.bias

    @property
    def bias_strides(self) -> tuple[int, ...]:
        """Batch and head strides of the bias."""
        return launching.shared_strides(self.bias, 2)

    def in_steps(self, *others: Tensor) -> tuple[int, tuple[tuple[int, ...], ...]]:
        """Return the step, and strides of q, k, v and other [B, H, N, D] in steps."""
        return launching.in_steps(self.q, self.k, self.v, *others)

    @property
    def device(self) -> AbstractContextManager[Any]:
        """Make the tensors' GPU the current one."""
        return torch.cuda.device_of(self.q) if self.q.is_cuda else nullcontext()

    def part(self, length: int, heads: int) -> tuple[int, int]:
        """Return the length and the number of the parts of the long side."""
        length = max(1, length)
        part = tuning.part_length(length, self.batch * heads, self.landmarks)
        return part, triton.cdiv(length, part)

    def options(self, table: tuple[tuning.Row, ...]) -> dict[str, Any]:
        """Return flags, tiles and launch parameters as keywords of a kernel."""
        sizes = self.q.element_size(), self.q.shape[3]
        row = tuning.pick(table, capability_of(self.q), *sizes)
        launch, enough = row.launch, max(16, triton.next_power_of_2(self.landmarks))
        of_landmarks = "BLOCK_Q" if self.flags["STAGE"] == 1 else "BLOCK_K"
        tiles = {"BLOCK_Q": launch.tile_q, "BLOCK_K": launch.tile_k}
        tiles[of_landmarks] = min(tiles[of_landmarks], enough)
        return {
            **self.flags,
            **tiles,
            "PRECISION": launching.dot_precision(self.q.dtype, row.float32),
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }


def capability_of(tensor: Tensor) -> int:
    """Return the capability of a tensor's GPU, as 90; 90 in the interpreter."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def raised(tensor: Tensor) -> Tensor:
    """Return a tensor as kernels take it: unit column stride; float32 for bfloat16 interpreted."""
    interpreting = bool(triton.knobs.runtime.interpret)
    return launching.unit_stride(launching.raise_bfloat16(tensor, interpreting))
