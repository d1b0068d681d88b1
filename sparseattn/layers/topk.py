"""The method "topk": blocks of queries attend to the key blocks of highest pooled score."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn import checks
from sparseattn.layers.break_even import dense_reason
from sparseattn.layers.method import Call, Fallback, Method
from sparseattn.ops.block_sparse_attention import Impl
from sparseattn.ops.topk_attention import Pooling, topk_attention
from sparseattn.structures.block_mask import BlockMask, check_geometry, keep_count


class TopK(Method):
    """Each block of queries attends to the key blocks of highest pooled score.

    keep: key blocks a query block keeps, a count or a fraction. block_size: tokens in a block.
    prefix: class and register tokens at the front; their blocks see and are seen by all.
    pooling: how a block becomes one vector, "mean" or "max".
    """

    name = "topk"
    options = ("keep", "block_size", "prefix", "pooling", "impl", "fallback")

    def __init__(
        self,
        keep: int | float = 0.25,
        block_size: int = 64,
        prefix: int = 0,
        pooling: Pooling = "mean",
        impl: Impl = "auto",
        fallback: Fallback = "auto",
    ) -> None:
        super().__init__(impl, fallback)
        checks.require_int(self.name, "prefix", prefix, low=0)
        keep_count(keep, 1, self.name)
        check_geometry(1, 1, block_size, self.name)
        self.keep, self.block_size, self.prefix = keep, block_size, prefix
        self.pooling: Pooling = pooling

    def dense_reason(self, k_len: int, device: torch.device) -> str | None:
        """Return why queries attend densely to that many keys, or None if they do not."""
        blocks = -(-k_len // self.block_size)
        kept = keep_count(self.keep, blocks, self.name)
        return (
            None
            if self.fallback == "never"
            else dense_reason("topk_attention", kept, blocks, k_len, device)
        )

    def _attend(self, call: Call) -> Tensor:
        if call.extra is not None:  # their softmax is joined by lse, which only the engine returns
            return super()._attend(call)
        return topk_attention(
            call.q, call.k, call.v, self.keep, block_size=self.block_size, pooling=self.pooling,
            always=self._always(call), query_mask=call.query_mask, key_mask=call.key_mask,
            scale=call.scale, impl=self.impl,
        )  # fmt: skip

    @torch.no_grad()
    def _mask(self, call: Call) -> BlockMask:
        _, mask = topk_attention(
            call.q, call.k, call.v, self.keep, block_size=self.block_size, pooling=self.pooling,
            always=self._always(call), query_mask=call.query_mask, key_mask=call.key_mask,
            scale=call.scale, return_mask=True, impl=self.impl,
        )  # fmt: skip
        return mask

    def _always(self, call: Call) -> Tensor | None:
        if not self.prefix:
            return None
        first = -(-self.prefix // self.block_size)
        rows, columns = (
            torch.arange(-(-x.shape[2] // self.block_size), device=x.device) < first
            for x in (call.q, call.k)
        )
        return rows[:, None] | columns
