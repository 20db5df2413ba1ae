"""The units of work: pre-train, fine-tune, train a plugin, evaluate it. Each follows from its arguments alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from tokcomp import ToCom
from tokcomp.files import write_whole
from tokcomp.runs.recipe import Recipe
from torch import Tensor, nn

from benchmarks.reproduce.runner import Unit
from benchmarks.reproduce.tocom import data, training
from benchmarks.reproduce.tocom.measure import compensated_logits, logits_of, measured
from benchmarks.reproduce.tocom.plan import CLASSES, OTHER, PluginSettings, Run, Settings, ablations, method_of, runs

_HERE = "benchmarks.reproduce.tocom.units"


def all_units(settings: Settings) -> list[Unit]:
    """Every unit of a run, those on which others wait first."""
    units: list[Unit] = []
    for run in runs(settings):
        where = run._asdict()
        recipe = settings.pretrain.describe()
        units.append(Unit(f"pretrain-{run}", f"{_HERE}:pretrain", {**where, "recipe": recipe}, weight=50))
    for run in runs(settings):
        for degree in settings.sources:
            arguments = {**run._asdict(), "degree": degree, "tokens_per_degree": settings.tokens_per_degree}
            arguments |= {"digits": settings.task_digits, "recipe": settings.finetune.describe()}
            units.append(Unit(finetune_unit(run, degree), f"{_HERE}:finetune", arguments, [f"pretrain-{run}"], 12))
        units.append(Unit(f"plain-{run}", f"{_HERE}:plain", _grid(settings, run), _models(settings, run), 7))
        units += _plugin_units(settings, run, settings.plugin)
    for name in ablations(settings):
        for run in runs(settings):
            if run.half in settings.ablation_halves:
                units += _plugin_units(settings, run, ablations(settings)[name])
    return units


def _plugin_units(settings: Settings, run: Run, one: PluginSettings) -> list[Unit]:
    """Training of a plugin and its evaluation: the default one at every scale, others at the one they had."""
    common = {"settings": asdict(one), "max_degree": settings.max_degree}
    arguments = {**run._asdict(), **common, "tokens_per_degree": settings.tokens_per_degree}
    arguments["recipe"] = settings.plugin_recipe.describe()
    train = Unit(plugin_unit(run, one), f"{_HERE}:plugin", arguments, [f"pretrain-{run}"], 20)
    scales = sorted({*settings.scales, one.scale}) if one == settings.plugin else [one.scale]
    arguments = {**_grid(settings, run), **common, "scales": scales}
    needs = [*_models(settings, run), train.name]
    return [train, Unit(evaluation_unit(run, one), f"{_HERE}:evaluate", arguments, needs, 4 * len(scales))]


def _grid(settings: Settings, run: Run) -> dict[str, Any]:
    return {
        **run._asdict(),
        "sources": list(settings.sources),
        "targets": list(settings.targets),
        "tokens_per_degree": settings.tokens_per_degree,
        "digits": settings.task_digits,
        "held_out": settings.held_out,
        "validation": settings.validation,
    }


def _models(settings: Settings, run: Run) -> list[str]:
    return [f"pretrain-{run}", *(finetune_unit(run, degree) for degree in settings.sources)]


def finetune_unit(run: Run, degree: int) -> str:
    return f"finetune-{run}-{degree}"


def plugin_unit(run: Run, settings: PluginSettings) -> str:
    return f"plugin-{run}-{settings.name}"


def evaluation_unit(run: Run, settings: PluginSettings) -> str:
    return f"evaluate-{run}-{settings.name}"


def pretrain(folder: Path, half: str, seed: int, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Train a model on one half of the digits, with every token."""
    settings = _recipe(recipe)
    model = training.new_model(seed, CLASSES, settings.drop_path)
    training.train_classifier(model, data.digits_of(half), settings, method_of(0, 1), seed, wander=True)
    return {"weights": _store(folder, f"pretrained-{half}-{seed}", model)}


def finetune(
    folder: Path,
    half: str,
    seed: int,
    degree: int,
    tokens_per_degree: int,
    digits: int,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Train that model on some digits of the other half, all of its weights, at one degree."""
    model = _load(folder, f"pretrained-{half}-{seed}")
    torch.manual_seed(seed)  # the new classifier is the same at every degree
    model.reset_classifier(CLASSES)
    chosen, _ = data.task_split(OTHER[half], digits, seed)
    method = method_of(degree, tokens_per_degree)
    training.train_classifier(model, chosen, _recipe(recipe), method, seed, wander=False)
    return {"weights": _store(folder, f"finetuned-{half}-{seed}-{degree}", model)}


def plugin(
    folder: Path,
    half: str,
    seed: int,
    settings: Mapping[str, Any],
    max_degree: int,
    tokens_per_degree: int,
    recipe: Mapping[str, Any],
) -> dict[str, Any]:
    """Train a plugin on the pre-trained model and its half of the digits."""
    one = PluginSettings(**settings)
    model = _load(folder, f"pretrained-{half}-{seed}")
    trained, loss = training.train_plugin(
        model,
        data.digits_of(half),
        one,
        _recipe(recipe),
        lambda degree: method_of(degree, tokens_per_degree),
        max_degree,
        seed,
    )
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    return {
        "weights": _store(folder, f"plugin-{half}-{seed}-{one.name}", trained),
        "parameters": parameters,
        "loss": loss,
    }


def plain(folder: Path, **grid: Any) -> dict[str, Any]:
    """Every model at every target degree as it is."""
    return _evaluated(folder, None, [], grid)


def evaluate(
    folder: Path, settings: Mapping[str, Any], max_degree: int, scales: Sequence[float], **grid: Any
) -> dict[str, Any]:
    """Every model at every target degree with a plugin folded in."""
    one = PluginSettings(**settings)
    half, seed = grid["half"], grid["seed"]
    blank = training.new_model(0, CLASSES, 0.0)
    trained = ToCom(blank, one.rank, max_degree, one.arithmetic)
    trained.load_state_dict(load_file(_path(folder, f"plugin-{half}-{seed}-{one.name}")))
    return _evaluated(folder, trained, scales, grid)


def _evaluated(folder: Path, plugin: Any, scales: Sequence[float], grid: Mapping[str, Any]) -> dict[str, Any]:
    """{"task", "validation" or "own": {"source>target": one measurement, or {scale: measurement}}}.

    "own" is the pre-trained model on held-out digits of its own half, each degree in turn as the source.
    """
    half, seed, targets = grid["half"], grid["seed"], grid["targets"]
    task = OTHER[half]
    pictures = {
        "task": data.held_out_pictures(task, grid["held_out"]),
        "validation": data.validation_pictures(task, grid["digits"], seed, grid["validation"]),
    }
    if len(scales) < 2:
        del pictures["validation"]  # there is nothing to choose
    result: dict[str, Any] = {}
    for source in grid["sources"]:
        model = _load(folder, f"finetuned-{half}-{seed}-{source}")
        for name, (images, labels) in pictures.items():
            cells = _cells(model, images, labels, [source], targets, plugin, scales, grid["tokens_per_degree"])
            result.setdefault(name, {}).update(cells)
    own = _load(folder, f"pretrained-{half}-{seed}")
    images, labels = data.held_out_pictures(half, min(grid["held_out"], 180))
    result["own"] = _cells(own, images, labels, grid["sources"], targets, plugin, scales, grid["tokens_per_degree"])
    return result


def _cells(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sources: Sequence[int],
    targets: Sequence[int],
    plugin: Any,
    scales: Sequence[float],
    tokens_per_degree: int,
) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for source in sources:
        at_source = logits_of(model, method_of(source, tokens_per_degree), images)
        for target in targets:
            method = method_of(target, tokens_per_degree)
            cell = f"{source}>{target}"
            if plugin is None:
                cells[cell] = measured(logits_of(model, method, images), labels, at_source).to_json()
            elif source != target:
                found = {
                    f"{scale:g}": compensated_logits(model, method, images, plugin, source, target, scale)
                    for scale in scales
                }
                cells[cell] = {scale: measured(logits, labels, at_source).to_json() for scale, logits in found.items()}
    return cells


def _recipe(recipe: Mapping[str, Any]) -> Recipe:
    return Recipe(**{name: tuple(value) if isinstance(value, list) else value for name, value in recipe.items()})


def _path(folder: Path, name: str) -> Path:
    return folder / "models" / f"{name}.safetensors"


def _store(folder: Path, name: str, module: nn.Module) -> str:
    """Write the weights; returns a digest of them."""
    contents = save({key: value.contiguous() for key, value in module.state_dict().items()})
    write_whole(_path(folder, name), contents)
    return hashlib.sha256(contents).hexdigest()[:16]


def _load(folder: Path, name: str) -> VisionTransformer:
    model = training.new_model(0, CLASSES, 0.0)
    model.load_state_dict(load_file(_path(folder, name)))
    return model.eval()
