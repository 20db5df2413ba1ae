"""From an entry and a budget to a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.compare.entries import SEARCHED, Entry, Variant
from tokcomp.equal_cost import (
    BY_COUNT,
    BY_IMAGES,
    BY_PREDICTOR,
    BY_RATE,
    Measured,
    Ruler,
    count_for_budget,
    evit_for_budget,
    fit,
    nearest_published,
    predictor_for_budget,
    random_schedule,
    rate_for_budget,
    uniform,
)
from tokcomp.methods import DiffRate, Method, PassageMethod, scheduled
from tokcomp.refine import starts_for
from tokcomp.runs.steps import derived_seed
from tokcomp.schedule import CompressionSchedule, published_schedule

#: Share of a budget by which a comparison's costs may differ from it.
TOLERANCE = 0.02


class Builder:
    """Makes the methods of a comparison.

    Args:
        model: plain, and left so.
        name: timm's name for it, under which schedules may have been published.
        search: (GFLOPs, variant) -> a searched schedule; None: no entry may need a search.
        refine: (GFLOPs, variant, starts by name) -> the best that a refinement finds; None: no entry may need one.
        calibration: -> batches of images [B, 3, H, W] on the model's device, for methods under which images keep
            different numbers of tokens: their cost is the mean over these. None: no entry may be one.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        search: Callable[[float, Variant], DiffRate] | None = None,
        refine: Callable[[float, Variant, dict[str, Method]], Method] | None = None,
        calibration: Callable[[], Sequence[Tensor]] | None = None,
    ) -> None:
        self.model, self.name, self.ruler = model, name, Ruler(model)
        self._search, self._refine, self._calibration = search, refine, calibration
        self._made: dict[tuple[str, float], Method] = {}  # what was calibrated, by kind and budget

    @cached_property
    def measured(self) -> Measured:
        """The costs of methods under which images keep different numbers of tokens.

        Raises:
            ValueError: there are no images for that.
        """
        return Measured(self.model, () if self._calibration is None else self._calibration())

    def flops(self, method: Method | None) -> float:
        """Multiply-adds per image; on average where it depends on the image."""
        return self.ruler.flops(method) if method is None or not method.varies else self.measured.flops(method)

    def build(self, entry: Entry, gflops: float) -> Method:
        """The entry's method at a cost of ``gflops``.

        Raises:
            ValueError: it cannot have that cost within 2 %, or there is nothing that the entry could be made from.
            Stopped: a search was asked to stop.
        """
        method = self._method(entry, gflops)
        cost = self.flops(method) / 1e9
        if abs(cost - gflops) > TOLERANCE * gflops:
            raise ValueError(f"the nearest cost is {cost:.4g} GFLOPs")
        if entry.pipeline is not None:
            method = self.ruler.like(method, pipeline=entry.pipeline)
        self.model_takes(method)
        return method

    def model_takes(self, method: Method) -> None:
        """Raise ValueError or TypeError unless the model can be compressed by the method."""
        find_adapter(self.model).validate(self.model, method)
        method.validate(self.ruler.geometry)
        if isinstance(method, PassageMethod):
            find_adapter(self.model).check_passage(self.model, method)

    def _method(self, entry: Entry, gflops: float) -> Method:
        budget = gflops * 1e9
        if entry.kind == "evit" and entry.pipeline is not None:
            # Counts for pruning come from EViT as it would be without its fused token.
            return evit_for_budget(self.model, budget, fuse=False)
        if entry.kind in BY_COUNT:
            return count_for_budget(self.model, budget, BY_COUNT[entry.kind])
        if entry.kind in BY_RATE:
            return rate_for_budget(self.model, budget, BY_RATE[entry.kind])
        if entry.kind in BY_PREDICTOR:
            return predictor_for_budget(self.model, budget, BY_PREDICTOR[entry.kind])
        if entry.kind in BY_IMAGES:
            key = (entry.kind, gflops)
            if key not in self._made:
                self._made[key] = BY_IMAGES[entry.kind](self.model, budget, self.measured.batches)
            return self._made[key]
        if entry.kind == "uniform":
            return uniform(self.ruler, budget)
        if entry.kind == "random":
            generator = torch.Generator().manual_seed(derived_seed(entry.number))
            return random_schedule(self.ruler, budget, generator)
        if entry.kind == "file":
            assert entry.file is not None
            return fit(self.ruler, self._rescaled(entry.file, budget), budget)
        if entry.kind == "published":
            found = nearest_published(self.ruler, self.name, budget)
            if found is None:
                raise ValueError(f"no schedule was published for a model of {self.ruler.depth} blocks")
            return found
        if entry.kind == "diffrate":
            published = self._published(gflops)
            if published is not None:
                return published
        if self._search is None:
            raise ValueError(f"{entry.name} needs a search, and there are no images to search on")
        searched = fit(self.ruler, self._search(gflops, entry.variant), budget)
        if entry.kind != "refine":
            return searched
        if self._refine is None:
            raise ValueError(f"{entry.name} needs images to judge by, and there are none")
        starts = starts_for(self.model, self.name, self.ruler, budget, {"search": searched})
        return self._refine(gflops, entry.variant, starts)

    def _published(self, gflops: float) -> DiffRate | None:
        """The schedule published for this very model, budget and number of tokens, if there is one."""
        try:
            schedule = published_schedule(self.name, gflops)
        except ValueError:
            return None
        return DiffRate(schedule) if schedule.num_tokens == self.ruler.num_tokens else None

    def _rescaled(self, path: Path, budget: float) -> Method:
        """The schedule of a file, or of another comparison's searched ones that of the nearest cost, for this model."""
        files = sorted((path / "schedules").glob("*.json")) if path.is_dir() else [path]
        searched = [file for file in files if not path.is_dir() or file.name.startswith(SEARCHED)]
        methods = []
        for file in searched:
            schedule = CompressionSchedule.load(file)
            if schedule.num_tokens is not None:
                schedule = schedule.rescaled(self.ruler.num_tokens, self.ruler.prefix)
            if len(schedule) != self.ruler.depth:
                raise ValueError(f"'{file}' is for {len(schedule)} blocks, and the model has {self.ruler.depth}")
            methods.append(scheduled(schedule))
        if not methods:
            raise ValueError(f"'{path}' holds no searched schedule")
        return min(methods, key=lambda method: abs(self.ruler.flops(method) - budget))
