"""Methods under which images keep different numbers of tokens, at a mean cost that is measured on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.api import compress, restore
from tokcomp.cost import counts_by_image, flops_by_image
from tokcomp.equal_cost.budget import count_for_budget, evit_blocks
from tokcomp.equal_cost.counts import Ruler
from tokcomp.equal_cost.thresholds import calibrate
from tokcomp.methods import ATS, AViT, DToMe, Method, ToMe

#: Share of a budget by which the cost found may differ from it, and how often it is corrected.
_NEAR, _CORRECTIONS = 0.005, 4
#: How often the range of a threshold is halved.
_HALVINGS = 10
#: Samples per patch, at most: a token without attention is never taken.
_MOST_SAMPLES = 64


class Measured:
    """What methods cost on the images of some batches [B, 3, H, W], on average. ``model`` is plain, and left so.

    Raises:
        ValueError: there are no images.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model, self.batches = model, [images for images in batches if len(images)]
        if not self.batches:
            raise ValueError("batches must hold images to measure costs on, got none")

    def flops(self, method: Method) -> float:
        """Multiply-adds per image."""
        with self._compressed(method):
            return float(torch.cat([flops_by_image(self.model, images) for images in self.batches]).mean())

    def kept(self, method: Method) -> list[int]:
        """Tokens that each block leaves, prefix included, rounded."""
        with self._compressed(method):
            counts = [counts_by_image(self.model, images).num_out for images in self.batches]
        return [round(one) for one in torch.cat(counts).mean(0).tolist()]

    @contextmanager
    def _compressed(self, method: Method) -> Iterator[None]:
        before = find_adapter(self.model).method(self.model)
        compress(self.model, method)
        try:
            yield
        finally:
            restore(self.model) if before is None else compress(self.model, before)


def dtome_for_budget(model: nn.Module, budget: float, batches: Sequence[Tensor]) -> DToMe:
    """DToMe calibrated on images [B, 3, H, W] so that their mean cost is nearest to ``budget`` multiply-adds.

    Its blocks merge as many tokens of the average image as ToMe's do, first at the budget, then at what makes up for
    the difference between that and what is measured.

    Raises:
        ValueError: no r comes within 5 % of the budget; there are no images.
    """
    measured, ruler, target = Measured(model, batches), Ruler(model), budget
    tried: list[tuple[float, DToMe]] = []
    for _ in range(_CORRECTIONS):
        r = count_for_budget(model, target, ToMe, ruler=ruler).r
        method = calibrate(model, measured.batches, r)
        cost = measured.flops(method)
        tried.append((abs(cost - budget), method))
        if tried[-1][0] <= _NEAR * budget:
            break
        target *= budget / cost
    return min(tried, key=lambda one: one[0])[1]


def ats_for_budget(model: nn.Module, budget: float, batches: Sequence[Tensor]) -> ATS:
    """ATS in every block from a quarter of the depth on, whose mean cost on images [B, 3, H, W] is nearest to a budget.

    Raises:
        ValueError: there are no images.
    """
    measured, ruler = Measured(model, batches), Ruler(model)
    blocks = range(evit_blocks(ruler.depth)[0], ruler.depth)

    def cost(samples: int) -> float:
        return measured.flops(ATS(samples, blocks))

    low, high = 1, ruler.patches
    costs = {low: cost(low), high: cost(high)}
    while costs[high] < budget and high < _MOST_SAMPLES * ruler.patches:
        low, high = high, 2 * high
        costs[high] = cost(high)
    while high - low > 1 and abs(costs[low] - budget) > _NEAR * budget:
        middle = (low + high) // 2
        costs[middle] = cost(middle)
        low, high = (middle, high) if costs[middle] <= budget else (low, middle)
    return ATS(min(costs, key=lambda samples: abs(costs[samples] - budget)), blocks)


def avit_for_budget(model: nn.Module, budget: float, batches: Sequence[Tensor]) -> AViT:
    """A-ViT with the threshold whose mean cost on images [B, 3, H, W] is nearest to a budget.

    Raises:
        ValueError: there are no images, or the model has no parts of A-ViT.
    """
    measured = Measured(model, batches)
    costs = {threshold: measured.flops(AViT(threshold)) for threshold in (0.001, 0.999)}
    low, high = 0.001, 0.999
    for _ in range(_HALVINGS):
        if min(abs(cost - budget) for cost in costs.values()) <= _NEAR * budget:
            break
        middle = (low + high) / 2
        costs[middle] = measured.flops(AViT(middle))
        low, high = (middle, high) if costs[middle] <= budget else (low, middle)
    return AViT(min(costs, key=lambda threshold: abs(costs[threshold] - budget)))


#: Methods by the names that the command line gives them, made for a budget on images.
BY_IMAGES: dict[str, Callable[[nn.Module, float, Sequence[Tensor]], Method]] = {
    "dtome": dtome_for_budget,
    "ats": ats_for_budget,
    "avit": avit_for_budget,
}
