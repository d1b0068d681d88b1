"""Files that tests of the readers write: pictures, tables, and halves of them."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, pixels: np.ndarray | None = None, side: int = 12) -> Path:
    """Write a picture, of random grey pixels if none are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def table(path: Path, *lines: str) -> Path:
    """Write lines of text."""
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def cut(path: Path) -> Path:
    """Cut the second half of a file off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
