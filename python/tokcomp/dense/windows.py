"""Segmenting an image that is larger than what the segmenter takes, and answering at the size of its mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.dense.segmenter import Segmenter


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a side; the last one ends with it."""
    if not 0 < stride <= window <= side:
        raise ValueError(
            f"a window must be no larger than the image and its stride no larger than the window, got {window} of "
            f"{side} pixels and a stride of {stride}"
        )
    return [*range(0, side - window, stride), side - window]


@torch.no_grad()
def sliding_logits(
    segmenter: Segmenter, images: Tensor, window: tuple[int, int], stride: tuple[int, int], batch_size: int = 8
) -> Tensor:
    """Logits [B, K, H, W] of images [B, 3, H, W]: the mean over the windows that a pixel is in.

    Args:
        segmenter: takes images of the window's size.
        images: of at least that size.
        window: height and width.
        stride: pixels between windows, down and across.
        batch_size: windows that are segmented at once.

    Raises:
        ValueError: the image is smaller than the window, or the stride is larger.
    """
    batch, height, width = images.shape[0], *images.shape[-2:]
    tops = window_starts(height, window[0], stride[0])
    lefts = window_starts(width, window[1], stride[1])
    places = [(image, top, left) for image in range(batch) for top in tops for left in lefts]
    total: Tensor | None = None
    covered = images.new_zeros(height, width)
    for top in tops:
        for left in lefts:
            covered[top : top + window[0], left : left + window[1]] += 1
    for first in range(0, len(places), batch_size):
        some = places[first : first + batch_size]
        cut = torch.stack([images[i, :, top : top + window[0], left : left + window[1]] for i, top, left in some])
        for (image, top, left), logits in zip(some, segmenter(cut), strict=True):
            if total is None:
                total = logits.new_zeros(batch, logits.shape[0], height, width)
            total[image, :, top : top + window[0], left : left + window[1]] += logits
    assert total is not None
    return total / covered


def classes_at(logits: Tensor, size: tuple[int, int], at_once: int = 16) -> Tensor:
    """The class of every pixel at another size: logits [B, K, h, w] -> int64 [B, H, W], bilinear.

    ``at_once``: classes that are resized together, so that 150 of a large photograph need no gigabytes.
    """
    best: Tensor | None = None
    found: Tensor | None = None
    for first in range(0, logits.shape[1], at_once):
        some = F.interpolate(logits[:, first : first + at_once], size=size, mode="bilinear", align_corners=False)
        values, classes = some.max(1)
        if best is None or found is None:
            best, found = values, classes
        else:
            found = torch.where(values > best, classes + first, found)
            best = torch.maximum(values, best)
    assert found is not None
    return found
