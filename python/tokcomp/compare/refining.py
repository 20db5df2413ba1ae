"""The refinements of a comparison: each done once, its state kept in the comparison's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.compare.answers import Stopped
from tokcomp.compare.cells import key_of
from tokcomp.compare.entries import Variant
from tokcomp.equal_cost import Ruler
from tokcomp.methods import Method
from tokcomp.refine import Refinement, RefineSettings
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.steps import StopRequest


class Refiner:
    """Refines, in ``folder/refined``; what was stopped is continued, and what is done is read.

    Args:
        model: plain, on its device; left plain.
        batches: starts a pass over this process's share of the images that judge.
        settings: of every refinement, apart from the seed, which is the variant's.
        folder: the comparison's.
        facts: what the result follows from besides: model, weights, data.
        amp_dtype: run under autocast.
        world: the processes that share the images.
        stop: ends a refinement after a candidate.
        note: (number of the candidate, text) is called after each improvement.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
        settings: RefineSettings,
        folder: Path,
        *,
        facts: Mapping[str, Any],
        amp_dtype: torch.dtype | None = None,
        world: World = ALONE,
        stop: StopRequest | None = None,
        note: Callable[[int, str], None] | None = None,
    ) -> None:
        self._model, self._start, self._settings, self._folder = model, batches, settings, folder
        self._facts, self._world, self._stop, self._note = dict(facts), world, stop or StopRequest(), note
        self._amp_dtype = amp_dtype
        self._batches: list[tuple[Tensor, Tensor]] | None = None

    def find(self, gflops: float, variant: Variant, starts: Mapping[str, Method]) -> Method:
        """The best candidate at a budget.

        Raises:
            Stopped: the refinement was asked to stop.
        """
        if self._batches is None:
            self._batches = list(self._start())
        settings = replace(self._settings, seed=variant.seed)
        described = {name: repr(method) for name, method in starts.items()}
        key = key_of({**self._facts, "gflops": gflops, "seed": settings.seed, "loss": settings.loss, **described})
        found = Refinement(
            self._model,
            self._batches,
            Ruler(self._model),
            gflops * 1e9,
            starts,
            settings,
            state=self._folder / "refined" / f"{gflops:g}-{key}.json",
            facts=self._facts,
            amp_dtype=self._amp_dtype,
            world=self._world,
            note=self._note,
        ).run(self._stop)
        if not found.complete:
            raise Stopped
        return found.method
