"""Masks as pictures."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np

_NO_LABEL = (150, 150, 150)
_FIRST = (30, 32, 40)


def paint_mask(mask: np.ndarray, num_classes: int) -> Any:
    """A PIL picture of a mask [H, W]: class 0 dark, each other class in its own colour, grey where there is no
    label."""
    palette = np.full((256, 3), _NO_LABEL, np.uint8)
    palette[0] = _FIRST
    for index in range(1, min(num_classes, 256)):
        # Hues a golden ratio apart: neighbouring classes differ, however many there are.
        red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.65, 0.95 - 0.15 * (index % 2))
        palette[index] = round(255 * red), round(255 * green), round(255 * blue)
    from PIL import Image

    return Image.fromarray(palette[np.clip(mask, 0, 255)])
