"""How good a segmentation is: pixel accuracy and intersection over union, from one confusion matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """In per cent. A class in neither truth nor prediction has no IoU (NaN) and is left out of the mean."""

    pixel_accuracy: float
    mean_iou: float
    iou: tuple[float, ...]
    num_pixels: int


class ConfusionMatrix:
    """Counts of pixels by (true class, predicted class), over as many batches as :meth:`update` is given.

    Args:
        num_classes: K.
        ignore_index: pixels with this label are not counted.
        device: the device that holds the counts.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add pixels: integers, both of the same shape; classes of ``predicted`` are 0 .. K-1.

        Raises:
            ValueError: the shapes differ, or a class is out of range.
        """
        if predicted.shape != truth.shape:
            raise ValueError(
                f"predicted and truth must have the same shape, got {list(predicted.shape)} and {list(truth.shape)}"
            )
        counted = truth != self.ignore_index
        predicted, truth = predicted[counted].long(), truth[counted].long()
        for name, classes in (("predicted", predicted), ("truth", truth)):
            if len(classes) and (int(classes.min()) < 0 or int(classes.max()) >= self.num_classes):
                raise ValueError(
                    f"{name} must be classes from 0 to {self.num_classes - 1}, got {int(classes.min())} to "
                    f"{int(classes.max())}; ignore_index is {self.ignore_index}"
                )
        pairs = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts).to(self.counts.device)

    def scores(self) -> Scores:
        """The scores over all pixels so far.

        Raises:
            ValueError: there are none.
        """
        counts = self.counts.double().cpu()
        total, hit = counts.sum().item(), counts.diagonal()
        if not total:
            raise ValueError("there must be at least one pixel with a label, got none")
        union = counts.sum(0) + counts.sum(1) - hit
        iou = [100.0 * (a / b) if b else math.nan for a, b in zip(hit.tolist(), union.tolist(), strict=True)]
        found = [value for value in iou if not math.isnan(value)]
        return Scores(100.0 * hit.sum().item() / total, sum(found) / len(found), tuple(iou), int(total))
