"""Where sparse attention starts to be faster than dense attention."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BreakEven(NamedTuple):
    """Dense attention is faster below `least_keys` keys, and where over `most_kept` are kept."""

    least_keys: int
    most_kept: float
    source: str


# Forward and backward against scaled_dot_product_attention. An op and device without a row has not
# been measured and is never dense.
_MEASURED = {
    ("block_sparse_attention", "cpu"): BreakEven(1024, 0.5, "two Xeon threads, README"),
    ("topk_attention", "cpu"): BreakEven(1024, 0.5, "two Xeon threads, README"),
}


def measured(op: str, device: torch.device) -> BreakEven | None:
    """Return where dense attention is faster than an op, or None where that was not measured."""
    return _MEASURED.get((op, device.type))


def dense_reason(op: str, kept: int, parts: int, k_len: int, device: torch.device) -> str | None:
    """Return why dense attention is faster, or None: `kept` of `parts` parts of k_len keys."""
    found = measured(op, device)
    if found is None:
        return None
    if k_len < found.least_keys:
        least = f"below {found.least_keys} keys all are attended to"
        return f"{op}: {least}, which is faster on {device.type}"
    if kept > found.most_kept * parts:
        return f"{op}: keeping over {found.most_kept:.0%} all are attended to, which is faster"
    return None
