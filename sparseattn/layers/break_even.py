"""Where sparse attention starts to be faster than dense attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BreakEven(NamedTuple):
    """Where an op is as fast as dense attention, forward and backward.

    shares: (keys, share): from so many keys on, it is faster while it keeps no more than that share
        of them. With fewer keys than the first row has, dense attention is faster at any share.
    source: what was measured.
    """

    shares: tuple[tuple[int, float], ...]
    source: str

    def share(self, k_len: int) -> float:
        """Return the largest share of `k_len` keys that pays; 0 where none does."""
        found = 0.0
        for keys, share in self.shares:
            if k_len >= keys:
                found = share
        return found


# Measured with the benchmarks of both ops (choice included) against scaled_dot_product_attention at
# 256, 512, 768, 1024 and 2048 tokens and shares of 0.1, 0.25, 0.5, 0.75 and 1; in between on
# logarithmic scales. An op and device without a row has not been measured.
_SOURCE = "one Xeon thread, float32, 6 heads of 64, torch 2.13, 2026-11-21"
_BLOCKS = BreakEven(((512, 0.33), (768, 0.5)), _SOURCE)
_MEASURED = {
    ("block_sparse_attention", "cpu"): _BLOCKS,
    ("topk_attention", "cpu"): _BLOCKS,
    ("saliency_attention", "cpu"): BreakEven(((512, 0.5), (768, 0.6), (1024, 0.7)), _SOURCE),
}


def measured(op: str, device: torch.device) -> BreakEven | None:
    """Return where an op is as fast as dense attention, or None where that was not measured."""
    return _MEASURED.get((op, device.type))


def dense_reason(op: str, kept: int, parts: int, k_len: int, device: torch.device) -> str | None:
    """Return why dense attention is faster, or None: `kept` of `parts` parts of k_len keys."""
    found = measured(op, device)
    if found is None:
        return None
    share = found.share(k_len)
    if not share:
        return f"dense attention is faster on {device.type} below {found.shares[0][0]} keys"
    if kept > share * parts:
        return f"dense attention is faster on {device.type} where over {share:.0%} are kept"
    return None
