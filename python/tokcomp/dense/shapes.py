"""A generated segmentation set: textured shapes on photographs, without a download. Seeds determine everything.

The photographs are the two that come with scikit-learn; held-out pictures show another part of them.
"""

from __future__ import annotations

import math
from colorsys import hsv_to_rgb
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokcomp.runs.steps import derived_seed

SHAPES = ("disk", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "stripes", "checks", "dots", "noise")
#: Class 0 is the photograph.
CLASSES = ("background", *SHAPES)

_RADIUS = (20.0, 46.0)  # of a shape, in pixels
_HUE_SPREAD = 0.08
_AREA = 96 * 96  # pixels per shape
_TRAIN_SHARE = 0.6  # of a photograph's width
_TRAIN, _HELD_OUT = 1, 2


class ShapesDataset(Dataset[Any]):
    """Pictures with five kinds of shapes in five textures: (PIL image, mask [H, W] uint8), one per index and seed.

    A shape's radius is 20 to 46 pixels whatever the picture's size, so larger pictures hold more of them. Shapes may
    overlap each other and the picture's edge; the photograph under them is background. A shape's colour hints at its
    kind: hues spread by 0.08 about their kind's own, which are 0.2 apart. So a small model learns something within
    minutes, but has to look at more than colour.

    Args:
        size: (height, width) in pixels, each 32 or more.
        count: number of pictures.
        train: draw on the training parts of the photographs; otherwise on the held-out parts.
        seed: another one gives other pictures.

    Raises:
        ValueError: size or count is out of range.
        ImportError: scikit-learn or Pillow is not installed.
    """

    classes = CLASSES

    def __init__(self, size: tuple[int, int], count: int, *, train: bool = False, seed: int = 0) -> None:
        if min(size) < 32:
            raise ValueError(f"size must be at least 32 pixels each way, got {size[0]} x {size[1]}")
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.size, self.count, self.train, self.seed = size, count, train, seed
        _photographs()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        from PIL import Image

        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = np.random.default_rng(derived_seed(self.seed, _TRAIN if self.train else _HELD_OUT, index))
        pixels = _background(draw, self.size, self.train)
        mask = np.zeros(self.size, np.uint8)
        for _ in range(max(1, round(self.size[0] * self.size[1] / _AREA * draw.uniform(0.6, 1.2)))):
            _put_shape(draw, pixels, mask)
        pixels += draw.normal(0, 6, pixels.shape).astype(np.float32)
        return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)), mask


@lru_cache(maxsize=1)
def _photographs() -> list[Any]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _background(draw: np.random.Generator, size: tuple[int, int], train: bool) -> np.ndarray:
    """A random piece of a photograph, [H, W, 3] float32."""
    from PIL import Image

    photograph = _photographs()[draw.integers(2)]
    edge = round(photograph.width * _TRAIN_SHARE)
    left, right = (0, edge) if train else (edge, photograph.width)
    height = photograph.height * draw.uniform(0.4, 1.0)
    height = min(height, (right - left) * size[0] / size[1])
    width = height * size[1] / size[0]
    x, y = draw.uniform(left, right - width), draw.uniform(0, photograph.height - height)
    box = (x, y, x + width, y + height)
    piece = photograph.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(piece, np.float32)
    return pixels[:, ::-1].copy() if draw.integers(2) else pixels.copy()


def _put_shape(draw: np.random.Generator, pixels: np.ndarray, mask: np.ndarray) -> None:
    """Draw one shape over the picture."""
    height, width = mask.shape
    radius, angle = draw.uniform(*_RADIUS), draw.uniform(0, 2 * math.pi)
    y, x = draw.uniform(0, height), draw.uniform(0, width)
    shape, texture = int(draw.integers(len(SHAPES))), str(draw.choice(TEXTURES))
    reach = radius * math.sqrt(2)
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    rows, columns = np.mgrid[top:bottom, left:right].astype(np.float32)
    rows, columns = rows - y, columns - x
    u = columns * math.cos(angle) + rows * math.sin(angle)  # the shape's own axes, in pixels
    v = rows * math.cos(angle) - columns * math.sin(angle)
    inside = _inside(SHAPES[shape], u / radius, v / radius)
    painted = _painted(draw, texture, draw.normal(shape / len(SHAPES), _HUE_SPREAD), u, v)
    pixels[top:bottom, left:right][inside] = painted[inside]
    mask[top:bottom, left:right][inside] = 1 + shape


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points belong to a shape of radius 1."""
    distance = np.hypot(u, v)
    if shape == "disk":
        return distance < 0.9
    if shape == "ring":
        return (distance < 1.0) & (distance > 0.55)
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.8
    if shape == "triangle":
        return (v > -0.55) & (v + math.sqrt(3) * abs(u) < 1.1)
    return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1.0)  # a cross


def _painted(draw: np.random.Generator, texture: str, hue: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two colours of one hue in a pattern over the points (u, v), in pixels: [h, w, 3] float32."""
    first, second = (
        255 * np.array(hsv_to_rgb(hue % 1.0, draw.uniform(0.5, 1.0), draw.uniform(*value)), np.float32)
        for value in ((0.6, 1.0), (0.2, 0.5))
    )
    period = draw.uniform(6, 14)
    if texture == "plain":
        where = np.zeros(u.shape, bool)
    elif texture == "stripes":
        where = np.mod(u, period) < period / 2
    elif texture == "checks":
        where = (np.mod(u, period) < period / 2) ^ (np.mod(v, period) < period / 2)
    elif texture == "dots":
        where = np.hypot(np.mod(u, period) - period / 2, np.mod(v, period) - period / 2) < period / 3.5
    else:
        where = draw.random(u.shape) < 0.5
    return np.where(where[..., None], first, second)
