"""From the units' results to numbers per comparison: one value per seed, in the order of the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.reproduce.diffrate.plan import BUNDLED, METRICS, PIPELINES, Model, Settings, base_models, other_models
from benchmarks.reproduce.diffrate.units import default_search, random_panels
from benchmarks.reproduce.runner import load_result
from benchmarks.reproduce.spread import Series


def _series(rows: Sequence[dict[str, float]]) -> Series:
    return {name: [row[name] for row in rows] for name in rows[0]}


def summarize(folder: Path, settings: Settings) -> dict[str, Any]:
    """Every comparison of a finished run, as JSON data."""
    models = base_models(settings)

    def searched(**changes: Any) -> list[dict[str, Any]]:
        name = replace(settings.search, **changes).name
        return [load_result(folder, f"search-{model.name}-{name}") for model in models]

    def fitted(results: Sequence[dict[str, Any]]) -> Series:
        return _series([result["measured"]["fitted"] for result in results])

    others = [load_result(folder, f"others-{model.name}") for model in models]
    parts = [load_result(folder, f"parts-{model.name}") for model in models]
    dense = [load_result(folder, f"train-{model.name}")["flops"] for model in models]
    equal: dict[str, Any] = {}
    matching: dict[str, Any] = {}
    transfer: dict[str, Any] = {}
    moved = [load_result(folder, f"transfer-{model.name}") for model in models]
    for share in settings.shares:
        clamped, matched = searched(share=share), searched(share=share, match_inference=True)
        rows: dict[str, Series] = {"DiffRate": fitted(clamped)}
        rows |= {name: _series([other[f"{share:g}"][name] for other in others]) for name in others[0][f"{share:g}"]}
        rows |= {name: _series([part[f"{share:g}"][name] for part in parts]) for name in parts[0][f"{share:g}"]}
        equal[f"{share:g}"] = {
            "rows": rows,
            "counts": [result["counts"] for result in clamped],
            "found": _series([result["measured"]["found"] for result in clamped]),
        }
        matching[f"{share:g}"] = {
            "rows": {"clamped (published)": fitted(clamped), "match_inference=True": fitted(matched)},
            "gap": {
                "clamped (published)": _series([result["gap"] for result in clamped]),
                "match_inference=True": _series([result["gap"] for result in matched]),
            },
        }
        transfer[f"{share:g}"] = _transfer(settings, moved, share)
    return {
        "settings": settings.to_json(),
        "uncompressed": {**_series([other["uncompressed"] for other in others]), "flops": dense},
        "equal_cost": equal,
        "bundled": _bundled(folder, settings),
        "random": _random(folder, settings, fitted, searched),
        "ablations": _ablations(settings, fitted, searched),
        "match_inference": matching,
        "transfer": transfer,
    }


def _bundled(folder: Path, settings: Settings) -> dict[str, Any]:
    """The same methods on the model that comes with the package."""
    model = Model(BUNDLED, 0)
    others = load_result(folder, f"others-{model.name}")
    parts = load_result(folder, f"parts-{model.name}")
    shares = {}
    for share in settings.shares:
        found = load_result(folder, default_search(settings, model, share))
        rows = {"DiffRate": found["measured"]["fitted"], **others[f"{share:g}"], **parts[f"{share:g}"]}
        shares[f"{share:g}"] = {
            "rows": {name: _series([row]) for name, row in rows.items()},
            "counts": found["counts"],
        }
    dense = load_result(folder, f"train-{model.name}")["flops"]
    return {"uncompressed": {**_series([others["uncompressed"]]), "flops": [dense]}, "equal_cost": shares}


def _ablations(
    settings: Settings, fitted: Callable[..., Series], searched: Callable[..., list[dict[str, Any]]]
) -> dict[str, dict[str, Series]]:
    """Table 4, a to d."""
    share = settings.ablation_share
    default = settings.search
    kinds: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "metric": [(name, {"metric": name}) for name in METRICS],
        "pipeline": [(name, {"pipeline": name}) for name in PIPELINES],
        "images": [(str(count), {"images": count}) for count in settings.images] + [("all", {})],
        "epochs": [(f"{epochs:g}", {"epochs": epochs}) for epochs in sorted({*settings.epochs, default.epochs})],
    }
    return {
        kind: {label: fitted(searched(share=share, **changes)) for label, changes in rows}
        for kind, rows in kinds.items()
    }


def _random(
    folder: Path,
    settings: Settings,
    fitted: Callable[..., Series],
    searched: Callable[..., list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Fig. 4: per panel and seed, where the searched schedule stands among random ones."""
    panels = []
    for share, pipeline in random_panels(settings):
        seeds = []
        ours = fitted(searched(share=share, pipeline=pipeline))
        for index, model in enumerate(base_models(settings)):
            rows = load_result(folder, f"random-{model.name}-{share:g}-{pipeline}")
            chosen = min(rows, key=lambda row: row["training_cross_entropy"])
            seeds.append(
                {
                    "top1": [round(row["top1"], 3) for row in rows],
                    "cross_entropy": [round(row["cross_entropy"], 5) for row in rows],
                    "chosen_top1": chosen["top1"],
                    "chosen_cross_entropy": chosen["cross_entropy"],
                    "below_top1": _share_below(rows, "top1", ours["top1"][index]),
                    "above_cross_entropy": _share_above(rows, "cross_entropy", ours["cross_entropy"][index]),
                }
            )
        panels.append({"share": share, "pipeline": pipeline, "DiffRate": ours, "seeds": seeds})
    return panels


def _share_below(rows: Sequence[dict[str, float]], name: str, value: float) -> float:
    """Share of the random schedules that are worse (accuracy: lower), ties counted half."""
    return sum((row[name] < value) + 0.5 * (row[name] == value) for row in rows) / len(rows)


def _share_above(rows: Sequence[dict[str, float]], name: str, value: float) -> float:
    return sum((row[name] > value) + 0.5 * (row[name] == value) for row in rows) / len(rows)


def _transfer(settings: Settings, moved: Sequence[dict[str, Any]], share: float) -> dict[str, Series]:
    """Fig. 6: on every base model, its own schedule, the mean over the other seeds' ones, and the other widths'."""
    models = base_models(settings)
    own, foreign = [], []
    for index, result in enumerate(moved):
        rows = [result[f"{model.name}@{share:g}"] for model in models]
        own.append(rows[index])
        rest = [row for place, row in enumerate(rows) if place != index]
        foreign.append({name: statistics.fmean(row[name] for row in rest) for name in rest[0]})
    table = {"own": _series(own), "other seeds of the same model": _series(foreign)}
    for model in other_models(settings):
        table[f"a {model.shape} model"] = _series([result[f"{model.name}@{share:g}"] for result in moved])
    return table
