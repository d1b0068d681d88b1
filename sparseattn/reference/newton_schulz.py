"""What newton_schulz means: a pseudo-inverse by a fixed number of steps, times values."""

from __future__ import annotations

import torch
from torch import Tensor


def newton_schulz(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    landmark_mask: Tensor | None,
    iterations: int,
    scale: float,
    legacy_start: bool,
) -> Tensor:
    """Return Z_t values, with Z_t -> pinv(softmax(scale * queries @ keys.T)), [B, H, m, D].

    Rows and columns of landmarks that are masked count as 0.
    """
    if values.numel() == 0:
        return values + (queries.sum() + keys.sum()) * 0  # sums of nothing, with a gradient
    logits = queries @ keys.mT * scale
    if landmark_mask is not None:
        shown = landmark_mask[:, None, :, None] & landmark_mask[:, None, None]
        logits = logits.masked_fill(landmark_mask[:, None, :, None] & ~shown, -torch.inf)
        logits = logits.masked_fill(~landmark_mask[:, None, :, None], 0)
        weights = logits.softmax(-1).masked_fill(~shown, 0)
    else:
        weights = logits.softmax(-1)
    length = weights.sum(2, keepdim=True).amax(3, keepdim=True)  # the norm |.|_1; |.|_inf is 1
    if legacy_start:
        length = length.amax((0, 1), keepdim=True)
    z = weights.mT / length.where(length > 0, 1)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    for _ in range(iterations):
        y = weights @ z
        z = z @ (13 * eye - y @ (15 * eye - y @ (7 * eye - y))) / 4
    return z @ values
