"""What the ablations change in ToCom: the groups of matrices, the inversion, the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokcomp import ToCom
from tokcomp.tocom.distill import Distiller
from torch import Tensor, nn


class SharedToCom(ToCom):
    """One group as large as all steps together, for every pair of degrees: forth it is added, back subtracted."""

    def _steps(self, source: int, target: int, scale: float) -> tuple[slice, float]:
        columns, factor = super()._steps(source, target, scale)
        return (columns if source == target else slice(0, self.rank * self.max_degree)), factor


class SharedByDistanceToCom(SharedToCom):
    """The shared group times the share of all degrees that lies between the two."""

    def _steps(self, source: int, target: int, scale: float) -> tuple[slice, float]:
        columns, factor = super()._steps(source, target, scale)
        return columns, factor * abs(int(target) - int(source)) / self.max_degree


class TwoWayToCom(ToCom):
    """No inversion: the steps back have matrices of their own."""

    def __init__(self, model: nn.Module, rank: int = 2, max_degree: int = 16) -> None:
        super().__init__(model, rank, 2 * max_degree)
        self.max_degree = max_degree

    def _steps(self, source: int, target: int, scale: float) -> tuple[slice, float]:
        columns, factor = super()._steps(source, target, scale)
        if target < source:
            offset = self.rank * self.max_degree
            columns = slice(columns.start + offset, columns.stop + offset)
        return columns, factor


KINDS: dict[str, type[ToCom]] = {
    "tocom": ToCom,
    "shared": SharedToCom,
    "shared_by_distance": SharedByDistanceToCom,
    "two_way": TwoWayToCom,
}


class LabelDistiller(Distiller):
    """Cross entropy with the labels in place of the teacher's answers. Set ``labels`` [b] before each step."""

    labels: Tensor

    def _teach(self, parts: list[Tensor], degree: int) -> list[Tensor]:
        # KL(one-hot || student) is the cross entropy; e^-30 is next to nothing.
        right = F.one_hot(self.labels, int(self.models[degree].num_classes)).bool()
        return list(torch.where(right, 0.0, -30.0).chunk(len(parts)))


LOSSES: dict[str, type[Distiller]] = {"distillation": Distiller, "labels": LabelDistiller}
