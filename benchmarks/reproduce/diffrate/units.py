"""The units of work: train, search, compare. Each returns JSON data and follows from its arguments alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp.equal_cost import evit_for_budget, tome_for_budget
from tokcomp.methods import Method

from benchmarks.reproduce.diffrate import measure, models, schedules, search
from benchmarks.reproduce.diffrate.plan import (
    BUNDLED,
    PIPELINES,
    Model,
    SearchSettings,
    Settings,
    all_models,
    base_models,
    other_models,
    searches,
)
from benchmarks.reproduce.runner import Unit, load_result

_HERE = "benchmarks.reproduce.diffrate.units"


def all_units(settings: Settings) -> list[Unit]:
    """Every unit of a run, the long ones on which others wait first."""
    trained = all_models(settings)
    width = {BUNDLED: 1.0, "narrow": 0.7, "base": 1.0, "wide": 1.7}
    units = []
    for model in sorted(trained, key=lambda model: -width[model.shape]):
        arguments = {"shape": model.shape, "seed": model.seed, "epochs": settings.train_epochs}
        weight = 1.0 if model.shape == BUNDLED else 3.0 * settings.train_epochs * width[model.shape]
        units.append(Unit(f"train-{model.name}", f"{_HERE}:train", arguments, weight=weight))
    for model in trained:
        train = [f"train-{model.name}"]
        where = {"shape": model.shape, "seed": model.seed, "held_out": settings.held_out}
        for name, one in searches(settings, model).items():
            arguments = {**where, "settings": asdict(one)}
            weight = 2 + 4.5 * one.epochs * width[model.shape]
            units.append(Unit(f"search-{model.name}-{name}", f"{_HERE}:find", arguments, train, weight))
    for model in [*base_models(settings), Model(BUNDLED, 0)]:
        train = [f"train-{model.name}"]
        where = {"shape": model.shape, "seed": model.seed, "held_out": settings.held_out}
        arguments = {**where, "shares": list(settings.shares)}
        units.append(Unit(f"others-{model.name}", f"{_HERE}:others", arguments, train, weight=10))
        own = {f"{share:g}": default_search(settings, model, share) for share in settings.shares}
        arguments = {**where, "searches": own}
        units.append(Unit(f"parts-{model.name}", f"{_HERE}:parts", arguments, [*train, *own.values()], weight=6))
    for model in base_models(settings):
        train = [f"train-{model.name}"]
        where = {"shape": model.shape, "seed": model.seed, "held_out": settings.held_out}
        for share, pipeline in random_panels(settings):
            arguments = {
                **where,
                "share": share,
                "pipeline": pipeline,
                "count": settings.random_schedules,
                "selection": settings.selection_pictures,
            }
            name = f"random-{model.name}-{share:g}-{pipeline}"
            units.append(Unit(name, f"{_HERE}:random", arguments, train, weight=settings.random_schedules))
        sources = transfer_sources(settings)
        needs = [*train, *sources.values()]
        arguments = {**where, "shares": list(settings.shares), "sources": sources}
        units.append(Unit(f"transfer-{model.name}", f"{_HERE}:transfer", arguments, needs, weight=10))
    return units


def random_panels(settings: Settings) -> list[tuple[float, str]]:
    """Where random schedules are drawn (Fig. 4): each budget, and at one budget each pipeline."""
    panels = [(share, "prune_merge") for share in settings.shares]
    return panels + [(settings.ablation_share, name) for name in PIPELINES if name in ("prune", "merge")]


def default_search(settings: Settings, model: Model, share: float) -> str:
    """The unit that searched on a model by the default settings."""
    return f"search-{model.name}-{replace(settings.search, share=share).name}"


def transfer_sources(settings: Settings) -> dict[str, str]:
    """ "model@share" -> the unit that searched there, by the default settings."""
    models_ = [*base_models(settings), *other_models(settings)]
    return {
        f"{model.name}@{share:g}": default_search(settings, model, share)
        for model in models_
        for share in settings.shares
    }


def train(folder: Path, shape: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train a model; its uncompressed cost in multiply-adds."""
    model = Model(shape, seed)
    models.train_model(folder, model, epochs)
    return {"flops": schedules.cost(models.load_model(folder, model), None)}


def _measured(
    model: VisionTransformer, methods: dict[str, Method | None], held_out: int
) -> dict[str, dict[str, float]]:
    pictures = measure.held_out_pictures(held_out)
    dense = measure.logits_of(model, None, pictures[0])
    return {name: measure.measure(model, method, pictures, dense).to_json() for name, method in methods.items()}


def find(folder: Path, shape: str, seed: int, held_out: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Search a schedule, fit it to the budget, measure both."""
    one = SearchSettings(**settings)
    model = models.load_model(folder, Model(shape, seed))
    budget = one.share * schedules.cost(model, None)
    found = search.search_schedule(model, one, seed)
    fitted = schedules.fit(model, found.method, budget)
    return {
        "num_prune_kept": found.method.schedule.num_prune_kept,
        "num_merge_kept": found.method.schedule.num_merge_kept,
        "counts": schedules.counts(model, fitted),
        "gap": search.gap(model, found),
        "log": found.log,
        "measured": _measured(model, {"found": found.method, "fitted": fitted}, held_out),
    }


def others(folder: Path, shape: str, seed: int, held_out: int, shares: Sequence[float]) -> dict[str, Any]:
    """The uncompressed model and, at each budget, what DiffRate is compared with."""
    model = models.load_model(folder, Model(shape, seed))
    dense = schedules.cost(model, None)
    result: dict[str, Any] = {"uncompressed": _measured(model, {"uncompressed": None}, held_out)["uncompressed"]}
    for share in shares:
        tome, evit = tome_for_budget(model, share * dense), evit_for_budget(model, share * dense)
        plain = evit_for_budget(model, share * dense, fuse=False)
        methods: dict[str, Method | None] = {
            "ToMe": tome,
            "EViT": evit,
            "uniform": schedules.uniform(model, share * dense),
            # The other methods' counts under DiffRate's operators: what the schedule alone does.
            "ToMe's counts, merge": schedules.like(model, tome, "merge"),
            "EViT's counts, prune": schedules.like(model, plain, "prune"),
        }
        result[f"{share:g}"] = _measured(model, methods, held_out)
    return result


def parts(folder: Path, shape: str, seed: int, held_out: int, searches: dict[str, str]) -> dict[str, Any]:
    """What explains a difference: the searched counts under one step alone, and ToMe that leaves block 0 as it is."""
    model = models.load_model(folder, Model(shape, seed))
    dense = schedules.cost(model, None)
    result = {}
    for share, unit in searches.items():
        kept = load_result(folder, unit)["counts"][1]
        methods: dict[str, Method | None] = {
            "DiffRate's counts, merge": schedules.from_counts(model, kept, "merge"),
            "DiffRate's counts, prune": schedules.from_counts(model, kept, "prune"),
        }
        with contextlib.suppress(ValueError):  # out of its reach: no row
            methods["ToMe from block 1"] = schedules.tome_from_block_1(model, float(share) * dense)
        result[share] = _measured(model, methods, held_out)
    return result


def random(
    folder: Path, shape: str, seed: int, held_out: int, share: float, pipeline: str, count: int, selection: int
) -> list[dict[str, float]]:
    """Random schedules of equal cost, each measured on held-out and on training pictures."""
    model = models.load_model(folder, Model(shape, seed))
    budget = share * schedules.cost(model, None)
    generator = torch.Generator().manual_seed(seed)
    pictures, training = measure.held_out_pictures(held_out), measure.training_pictures(selection)
    dense = measure.logits_of(model, None, pictures[0])
    rows = []
    for _ in range(count):
        method = schedules.random_method(model, budget, generator, pipeline=pipeline)
        row = measure.measure(model, method, pictures, dense).to_json()
        row["training_cross_entropy"] = measure.measure(model, method, training).cross_entropy
        rows.append(row)
    return rows


def transfer(
    folder: Path, shape: str, seed: int, held_out: int, shares: Sequence[float], sources: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Schedules that were searched on other models, fitted to this one's budget."""
    model = models.load_model(folder, Model(shape, seed))
    dense = schedules.cost(model, None)
    methods: dict[str, Method | None] = {}
    for source, unit in sources.items():
        found = load_result(folder, unit)
        schedule = tokcomp.CompressionSchedule(found["num_prune_kept"], found["num_merge_kept"])
        share = float(source.split("@")[1])
        methods[source] = schedules.fit(model, tokcomp.DiffRate(schedule), share * dense)
    return _measured(model, methods, held_out)
