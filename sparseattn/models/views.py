"""Random views of images, made of a batch at once with torch alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def two_views(images: Tensor, crop: float, degrees: float, jitter: float) -> Tensor:
    """Return two random views of each image: [2 * B, C, H, W], first views first."""
    return torch.cat([_view(images, crop, degrees, jitter) for _ in range(2)])


def _view(images: Tensor, crop: float, degrees: float, jitter: float) -> Tensor:
    """Crop to an area of `crop` .. 1, flip, rotate, and change brightness and contrast.

    Everything is drawn anew for each image, from torch's generator. Places outside are mirrored.
    """
    batch, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch, device=device).uniform_(low, high)

    side = uniform(crop, 1).sqrt()  # of the crop, in sides of the image
    angle = uniform(-degrees, degrees) * (math.pi / 180)
    flip = torch.randint(0, 2, (batch,), device=device) * 2 - 1
    x, y = ((1 - side) * uniform(-1, 1) for _ in range(2))
    cos, sin = side * angle.cos(), side * angle.sin()
    rows = [torch.stack([flip * cos, -sin, x], 1), torch.stack([flip * sin, cos, y], 1)]
    matrix = torch.stack(rows, 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False).to(images.dtype)
    seen = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, offset = uniform(1 - jitter, 1 + jitter), uniform(-jitter, jitter)
    mean = seen.mean((1, 2, 3), keepdim=True)
    changed = (seen - mean) * gain.view(-1, 1, 1, 1) + mean + offset.view(-1, 1, 1, 1)
    return changed.to(images.dtype)
