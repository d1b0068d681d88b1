"""What densify means: features at active sites, the token at all others."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseattn.structures.patch_grid import PatchGrid


def densify(x: PatchGrid, token: Tensor) -> Tensor:
    """Return the volume [B, C, X, Y, Z]."""
    active = x.mask.to_dense(x.patch)[:, None]
    return torch.where(active, x.to_dense(), token.view(1, -1, 1, 1, 1))
