"""Where sparse attention starts to be faster than dense attention."""

from __future__ import annotations

import torch

# What block_sparse_attention was measured at (README, "Speed on a CPU"): below a thousand tokens,
# and where half of the blocks are kept, dense attention is as fast or faster. A method and device
# without a row has not been measured and is never dense.
_LEAST_KEYS = {("topk", "cpu"): 1024}
_MOST_KEPT = 0.5  # share of the keys


def dense_reason(
    method: str, kept: int, places: int, k_len: int, device: torch.device
) -> str | None:
    """Return why dense attention is faster, or None: `kept` of `places` parts of k_len keys."""
    least = _LEAST_KEYS.get((method, device.type))
    if least is None:
        return None
    if k_len < least:
        return f"{method}: below {least} keys all are attended to, which is faster on {device.type}"
    if kept > _MOST_KEPT * places:
        return f"{method}: keeping over {_MOST_KEPT:.0%} all are attended to, which is faster"
    return None
