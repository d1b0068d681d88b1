"""What forward and backward launchers of block attention share: one call's tensors and numbers."""

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
    """Inputs in the form the kernels take; absent ones are stood in for by a small tensor."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, bias, gate
    rows: launching.IndexLists
    bits: Tensor
    block_size: tuple[int, int]
    scale: float
    flags: dict[str, Any]
    mask_steps: tuple[int, int]

    @classmethod
    def prepare(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_bias: Tensor | None,
        block_gate: Tensor | None,
        rows: launching.IndexLists,
        token_bits: Tensor | None,
        block_size: tuple[int, int],
        scale: float,
    ) -> Call:
        """Bring inputs to unit column stride, and scale to base 2 and to a sign of its own."""
        interpreting = bool(triton.knobs.runtime.interpret)
        q, k, v = (
            launching.unit_stride(launching.raise_bfloat16(t, interpreting)) for t in (q, k, v)
        )
        blank = q.new_zeros((1, 1, 1, 1), dtype=torch.float32)
        blank_bits = q.new_zeros((1, 1, 1, 1, 1), dtype=torch.int32)
        d0, d1 = launching.split_head_dim(q.shape[3], q.element_size())
        heads = rows.offsets.shape[1]
        flags = {
            "GROUP": q.shape[1] // max(1, k.shape[1]),
            "NEGATE": scale < 0,
            "HAS_BIAS": key_bias is not None,
            "HAS_GATE": block_gate is not None,
            "HAS_PARTIAL": token_bits is not None,
            "D": q.shape[3],
            "D0": d0,
            "D1": d1,
            "MASK_BLOCK_Q": block_size[0],
            "MASK_BLOCK_K": block_size[1],
        }
        bias = blank[0] if key_bias is None else launching.unit_stride(key_bias)
        gate = blank if block_gate is None else launching.unit_stride(block_gate)
        return cls(
            (q, k, v, bias, gate),
            rows,
            blank_bits if token_bits is None else token_bits,
            block_size,
            abs(scale) * launching.LOG2_E,
            flags,
            (heads if rows.offsets.shape[0] > 1 else 0, 1 if heads > 1 else 0),
        )

    @property
    def backward_flags(self) -> dict[str, Any]:
        """The flags of a backward kernel; it needs no maximum, so the scale keeps its sign."""
        return {name: value for name, value in self.flags.items() if name != "NEGATE"}

    @property
    def device(self) -> AbstractContextManager[Any]:
        """Make the tensors' GPU the current one."""
        q = self.tensors[0]
        return torch.cuda.device_of(q) if q.is_cuda else nullcontext()

    @property
    def num_rows(self) -> int:
        """R."""
        return -(-self.tensors[0].shape[2] // self.block_size[0])

    @property
    def num_columns(self) -> int:
        """C."""
        return -(-self.tensors[1].shape[2] // self.block_size[1])

    @property
    def row_lists(self) -> tuple[Tensor, ...]:
        """The row lists; those of partial blocks are stood in for if there are none."""
        return self.filled(self.rows)

    @staticmethod
    def filled(lists: launching.IndexLists) -> tuple[Tensor, ...]:
        """Return all five tensors of the lists."""
        return tuple(lists.offsets if tensor is None else tensor for tensor in lists)

    @staticmethod
    def capacities(lists: launching.IndexLists) -> tuple[int, int]:
        """Return how many entries a head's full and partial lists can hold."""
        partial = lists.partial_indices
        return lists.indices.shape[-1], 0 if partial is None else partial.shape[-1]

    @property
    def row_capacities(self) -> tuple[int, int]:
        """How many entries a head's full and partial row lists can hold."""
        return self.capacities(self.rows)

    @property
    def extra_strides(self) -> tuple[tuple[int, ...], ...]:
        """Strides of bias, gate and token bits, 0 along what they share."""
        bias, gate = self.tensors[3:]
        gate_strides = (*launching.shared_strides(gate, 2), gate.stride(2))
        bits_strides = (*launching.shared_strides(self.bits, 2), *self.bits.stride()[2:4])
        return launching.shared_strides(bias, 2), gate_strides, bits_strides

    def sources(self, tile: int, options: dict[str, Any], *walked: Tensor) -> tuple[Any, ...]:
        """Return what a kernel reads `walked` by: descriptors of `tile` rows, or the tensors."""
        if not options["IS_TMA"]:
            return walked
        return tuple(launching.describe(tensor, tile, self.flags["D0"]) for tensor in walked)

    def pick(
        self, table: tuple[tuning.Row, ...], *walked: Tensor, may_describe: bool = True
    ) -> tuple[launching.Launch, dict[str, Any]]:
        """Return the launch for these inputs, tiles cut to the mask's blocks, also as keywords.

        walked: the tensors that the kernel reads tile by tile. It does so through descriptors if
        the row says so and nothing hides single rows of them.
        """
        q = self.tensors[0]
        capability = 90
        if q.is_cuda:
            major, minor = torch.cuda.get_device_capability(q.device)
            capability = 10 * major + minor
        loaded = self.flags["HAS_BIAS"] or self.flags["HAS_GATE"]
        kind = (capability, q.element_size(), q.shape[3])
        partial = self.flags["HAS_PARTIAL"]
        row = tuning.pick(table, *kind, self.block_size, loaded=loaded, partial=partial)
        launch = row.launch._replace(
            tile_q=launching.fit_tile(row.launch.tile_q, self.block_size[0]),
            tile_k=launching.fit_tile(row.launch.tile_k, self.block_size[1]),
        )
        return launch, {
            "BLOCK_Q": launch.tile_q,
            "BLOCK_K": launch.tile_k,
            "PRECISION": launching.dot_precision(q.dtype, row.float32),
            "IS_TMA": row.tma
            and may_describe
            and not self.flags["HAS_BIAS"]
            and not self.flags["D1"]
            and launching.describable(*walked),
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
        }
