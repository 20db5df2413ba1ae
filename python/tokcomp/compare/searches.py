"""The searches of a comparison: each done once, kept in the comparison's folder, and used again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from tokcomp.budgets import FlopsBudget
from tokcomp.compare.answers import Stopped
from tokcomp.compare.cells import key_of
from tokcomp.compare.entries import Variant
from tokcomp.cost import flops
from tokcomp.methods import DiffRate
from tokcomp.runs.batches import LoaderBatches
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.steps import StopRequest
from tokcomp.schedule import CompressionSchedule
from tokcomp.search.folder import SearchFolder
from tokcomp.search.run import run_searches
from tokcomp.search.settings import SearchSettings, flops_weight


@dataclass(frozen=True)
class SearchImages:
    """Where the images of a search come from.

    Args:
        part: how many of the training images to use (None: all), spread over the classes, as the search takes them.
        epoch_images: training images in an epoch, however many are searched on.
        workers: loader processes.
        pieces: parts in which a process computes its share of a batch.
    """

    part: Callable[[int | None], Dataset[Any]]
    epoch_images: int
    workers: int = 0
    pieces: int = 1


class Searches:
    """Finds schedules by the gradient search, in ``folder/searches``. A search that was stopped is continued.

    Args:
        make_model: gives a plain model to search on, on its device; its drop path is the recipe's.
        images: says where the images for a model come from; called once, when a search is needed.
        settings: of every search, apart from what a :class:`Variant` says.
        folder: the comparison's.
        facts: what the result follows from besides: model, weights, data.
        world: the processes of the run.
        stop: ends a search after its step.
        show_progress: whether to show a progress line on stderr.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        images: Callable[[nn.Module], SearchImages],
        settings: SearchSettings,
        folder: Path,
        *,
        facts: Mapping[str, Any],
        world: World = ALONE,
        stop: StopRequest | None = None,
        show_progress: bool = False,
    ) -> None:
        self._make_model, self._open_images, self._settings = make_model, images, settings
        self._folder, self._facts, self._world = folder, dict(facts), world
        self._stop, self._show = stop or StopRequest(), show_progress
        self._opened: tuple[nn.Module, SearchImages] | None = None

    def find(self, gflops: float, variant: Variant) -> DiffRate:
        """The schedule for a budget: read if it was found before, searched otherwise.

        Raises:
            ValueError: no schedule has that cost, or the settings do not fit the images or the model.
            Stopped: the search was asked to stop.
        """
        settings = self._settings_of(variant)
        described = {**settings.describe(), "epochs": settings.recipe.epochs, "images": variant.images}
        key = key_of({**self._facts, "search": described, "gflops": gflops})
        folder = SearchFolder(self._folder / "searches" / f"{gflops:g}-{key}", [""])
        if not self._world.from_main(lambda: folder.summary.is_file() and folder.schedule("").is_file()):
            self._run(gflops, variant, settings, folder.path)
        return DiffRate(CompressionSchedule.load(folder.schedule("")))

    def _settings_of(self, variant: Variant) -> SearchSettings:
        recipe = self._settings.recipe
        if variant.epochs is not None:
            recipe = replace(recipe, epochs=variant.epochs)
        matching = variant.match_inference
        return replace(
            self._settings,
            recipe=recipe,
            metric=variant.metric,
            pipeline=variant.pipeline,
            seed=variant.seed,
            match_inference=self._settings.match_inference if matching is None else matching,
        )

    def _run(self, gflops: float, variant: Variant, settings: SearchSettings, folder: Path) -> None:
        if self._opened is None:
            model = self._make_model()
            self._opened = model, self._open_images(model)
        model, images = self._opened
        budget = FlopsBudget(model, gflops, flops_weight(flops(model) / 1e9), settings.granularity)
        batches = LoaderBatches(
            images.part(variant.images),
            settings.recipe.batch_size,
            variant.seed,
            workers=images.workers,
            epoch_images=images.epoch_images,
            pieces=images.pieces,
            world=self._world,
        )
        (result,) = run_searches(
            model,
            batches,
            {"": [budget]},
            settings,
            output=folder,
            resume=True,
            facts=self._facts,
            world=self._world,
            stop=self._stop,
            show_progress=self._show,
        )
        if not result.complete:
            raise Stopped
