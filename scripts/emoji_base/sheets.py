"""Contact sheets: many pictures in one PNG, to be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

_ACROSS = 16


def sheet(path: Path, bands: list[Tensor]) -> None:
    """Write bands of pictures below each other, each wrapped at 16 across.

    Args:
        bands: [N, 3, H, W] in [-1, 1] each; bands of equal length are interleaved by line.
    """
    lines = []
    for start in range(0, max(len(band) for band in bands), _ACROSS):
        for band in bands:
            part = band[start : start + _ACROSS]
            if len(part):
                lines.append(part)
    size = lines[0].shape[-1]
    canvas = np.full((len(lines) * size, _ACROSS * size, 3), 255, np.uint8)
    for y, line in enumerate(lines):
        pixels = line.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
        for x, picture in enumerate(pixels):
            canvas[y * size : (y + 1) * size, x * size : (x + 1) * size] = picture
    Image.fromarray(canvas).save(path, optimize=True)
