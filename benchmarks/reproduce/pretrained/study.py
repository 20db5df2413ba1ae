"""The study at each image size: one comparison after the other, on the same images, within the time that there is."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from tokcomp.compare.build import Builder
from tokcomp.compare.cells import weights_digest
from tokcomp.compare.page import render
from tokcomp.compare.probe import attach_head, features_of, fit_head, kept_head
from tokcomp.compare.refining import Refiner
from tokcomp.compare.run import RESULTS, Comparison, Images, Plan
from tokcomp.compare.searches import Searches, SearchImages
from tokcomp.cost import flops
from tokcomp.files import write_whole
from tokcomp.measure.info import machine, package_versions
from tokcomp.reading import read_json
from tokcomp.refine import RefineSettings
from tokcomp.runs.batches import held_out_batches
from tokcomp.runs.data import Part, spread_sample, training_part
from tokcomp.runs.recipe import SEARCH_RECIPE, plain_transform
from tokcomp.runs.steps import StopRequest, seed_all
from tokcomp.search.settings import SearchSettings
from torch import nn
from torch.utils.data import Dataset

from benchmarks.reproduce.pretrained.images import FashionMNIST, Noise
from benchmarks.reproduce.pretrained.plan import Settings, entries_for
from benchmarks.reproduce.pretrained.weights import MODEL, load_backbone

CPU = torch.device("cpu")
#: The paper's recipe with few, larger updates, and nothing but the pictures themselves.
RECIPE = replace(
    SEARCH_RECIPE, aa=None, hflip=0.0, color_jitter=0.0, mixup=0.0, cutmix=0.0, drop_path=0.0, scale=(1.0, 1.0)
)


@dataclass(frozen=True)
class Sources:
    """What the study works on: weights and pictures from files, or random ones."""

    weights: Path | None
    data: Path | None

    def backbone(self, size: int, settings: Settings) -> nn.Module:
        if self.weights is not None:
            return load_backbone(self.weights, size)
        seed_all(0)
        width = {} if settings.width is None else {"embed_dim": settings.width, "num_heads": 3}
        return timm.create_model(MODEL, img_size=size, num_classes=0, **width).eval()

    def images(self, settings: Settings) -> tuple[Dataset, Dataset]:
        """To train on, and to measure on."""
        if self.data is not None:
            return FashionMNIST(self.data, train=True), FashionMNIST(self.data, train=False)
        return Noise(settings.head, 1), Noise(settings.test, 2)

    def describe(self) -> dict[str, str]:
        return {
            "weights": "random" if self.weights is None else self.weights.name,
            "data": "noise" if self.data is None else "Fashion-MNIST",
        }


@dataclass(frozen=True)
class Work:
    """What the parts of the study work on, and the folder of their results. A part returns whether all of it is done;
    what is there is not done again.

    Args:
        end: nothing more is begun once time.monotonic() is past it.
    """

    sources: Sources
    settings: Settings
    folder: Path
    stop: StopRequest
    end: float | None = None
    show_progress: bool = True

    @property
    def over(self) -> bool:
        return self.stop.wanted or (self.end is not None and time.monotonic() > self.end)


def run_study(work: Work) -> bool:
    """Every size in turn."""
    for place, size in enumerate(work.settings.sizes):
        finished = _comparison(work, place).run(work.stop)
        results = work.folder / str(size) / RESULTS
        if results.is_file():
            page = render(read_json(results), f"{MODEL} at {size} x {size}")
            write_whole(work.folder / str(size) / "compare.html", page)
        if not finished:
            return False
    return True


def resumed(path: Path, facts: dict[str, Any], **empty: Any) -> dict[str, Any]:
    """A part's record in a file, if it is of these facts; else a new one of this machine, which holds what is empty."""
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    if record.get("facts") == facts:
        return record
    return {"facts": facts, "machine": machine(), "versions": package_versions(), **empty}


def keep(path: Path, record: dict[str, Any]) -> None:
    write_whole(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


#: (data set, count, seed) -> begins a pass over a sample.
Passes = Callable[[Dataset, int, int], Callable[[], Any]]


def passes_for(model: nn.Module, size: int) -> tuple[dict[str, Any], Passes]:
    """timm's configuration of the data for a backbone at an image size, and how pictures are given to it."""
    config: dict[str, Any] = {**resolve_model_data_config(model), "input_size": (3, size, size), "crop_pct": 1.0}

    def batches(dataset: Dataset, count: int, seed: int) -> Callable[[], Any]:
        return held_out_batches(Part(dataset, spread_sample(dataset, count, seed), plain_transform(config)), 50)

    return config, batches


class Prepared(NamedTuple):
    """A backbone with its head, and how pictures are given to it."""

    model: nn.Module
    config: dict[str, Any]  # timm's, of the data
    facts: dict[str, Any]  # that the model follows from
    batches: Passes


def prepare(work: Work, place: int) -> Prepared:
    """At the size of that place; the head is kept in the size's folder."""
    sources, settings, size = work.sources, work.settings, work.settings.sizes[place]
    training, _ = sources.images(settings)
    model = sources.backbone(size, settings)
    config, batches = passes_for(model, size)

    def head() -> Any:
        return fit_head(*features_of(model, batches(training, settings.head, 0)(), CPU))

    facts: dict[str, Any] = {**sources.describe(), "weights_digest": weights_digest(model), "img_size": size}
    kept = kept_head(work.folder / str(size) / "probe.safetensors", {**facts, "head": settings.head}, head)
    attach_head(model, *kept)
    return Prepared(model, config, {**facts, "head_images": settings.head, "with_head": weights_digest(model)}, batches)


def _comparison(work: Work, place: int) -> Comparison:
    settings, folder = work.settings, work.folder
    here = folder / str(settings.sizes[place])
    training, testing = work.sources.images(settings)
    model, config, facts, batches = prepare(work, place)
    search = SearchSettings(
        replace(RECIPE, lr=settings.lr, min_lr=settings.lr / 10, epochs=settings.steps, batch_size=settings.batch),
        eval_interval=0,
    )
    searches = Searches(
        lambda: copy.deepcopy(model),
        lambda _: SearchImages(partial(_searched, training, config, settings), epoch_images=settings.batch),
        search,
        here,
        facts=facts,
        stop=work.stop,
        show_progress=work.show_progress,
    )
    refiner = Refiner(
        model,
        batches(training, settings.refine, 2),
        RefineSettings(settings.candidates),
        here,
        facts={**facts, "images": settings.refine},
        stop=work.stop,
        note=(lambda step, text: print(f"refine candidate {step}: {text}", flush=True)) if work.show_progress else None,
    )
    dense = flops(model) / 1e9
    # Four digits, so that the name of a budget says it all.
    budgets = [float(f"{share * dense:.4g}") for share in settings.shares]
    entries = entries_for(settings, place, budgets, [folder / str(one) for one in settings.sizes])
    told = f"{settings.steps} updates of {settings.batch} of {settings.search} pictures, AdamW at {settings.lr:g}"
    facts |= {"search": told, "refine_images": settings.refine}
    minutes = None if work.end is None else (work.end - time.monotonic()) / 60
    plan = Plan(entries, budgets, facts, speed_batch=settings.speed_batch, int8=True, minutes=minutes)
    images = Images(batches(testing, settings.test, 0), settings.test)
    builder = Builder(model, MODEL, searches.find, refiner.find)
    return Comparison(model, images, builder, plan, here, device=CPU, show_progress=work.show_progress)


def _searched(training: Dataset, config: dict[str, Any], settings: Settings, count: int | None) -> Dataset:
    indices = spread_sample(training, count or settings.search, 1)
    return training_part(training, indices, RECIPE, config)
