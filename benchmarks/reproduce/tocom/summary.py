"""From the units' results to numbers per comparison: one value per seed, the mean over what was pre-trained on."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduce.runner import load_result
from benchmarks.reproduce.spread import Series
from benchmarks.reproduce.tocom.plan import PluginSettings, Run, Settings, ablations
from benchmarks.reproduce.tocom.units import evaluation_unit, plugin_unit

#: A measurement of one run.
Row = Mapping[str, float]


def summarize(folder: Path, settings: Settings) -> dict[str, Any]:
    """Every comparison of a finished run, as JSON data."""

    def results(half: str, name: Callable[[Run], str]) -> list[Any]:
        return [load_result(folder, name(Run(half, seed))) for seed in settings.seeds]

    plain = {half: results(half, lambda run: f"plain-{run}") for half in settings.halves}
    default = {half: results(half, lambda run: evaluation_unit(run, settings.plugin)) for half in settings.halves}
    trained = f"{settings.plugin.scale:g}"
    cells = [f"{source}>{target}" for source in settings.sources for target in settings.targets]
    moved = [cell for cell in cells if len(set(cell.split(">"))) == 2]

    def compared(kind: str, halves: Sequence[str]) -> dict[str, dict[str, Series]]:
        """Cell -> without, and with the plugin at the scale it was trained with."""
        rows: dict[str, dict[str, Series]] = {}
        for cell in cells:
            rows[cell] = {"without": _series([[one[kind][cell] for one in plain[half]] for half in halves])}
            if cell in moved:
                rows[cell]["with"] = _series([[one[kind][cell][trained] for one in default[half]] for half in halves])
        return rows

    task = compared("task", settings.halves)
    for cell in moved:
        scales = {half: [_best_scale(one["validation"][cell]) for one in default[half]] for half in settings.halves}
        chosen = [
            [one["task"][cell][scale] for one, scale in zip(default[half], scales[half], strict=True)]
            for half in settings.halves
        ]
        task[cell]["chosen"] = _series(chosen)
        task[cell]["scales"] = {half: [float(scale) for scale in scales[half]] for half in settings.halves}  # type: ignore[assignment]
    return {
        "settings": settings.to_json(),
        "task": task,
        "own": compared("own", settings.halves),
        "halves": {half: compared("task", [half]) for half in settings.halves},
        "scales": {
            cell: {
                scale: _series([[one["task"][cell][scale] for one in default[half]] for half in settings.halves])
                for scale in default[settings.halves[0]][0]["task"][cell]
            }
            for cell in moved
        },
        "ablations": _ablations(settings, results, moved),
        "without": {kind: compared(kind, settings.ablation_halves) for kind in ("task", "own")},
    }


def _ablations(
    settings: Settings, results: Callable[[str, Callable[[Run], str]], list[Any]], cells: Sequence[str]
) -> dict[str, Any]:
    """Name -> its parameters, its loss, and what was measured per cell, on the task and on the digits of its own."""

    def measured(one: PluginSettings, kind: str) -> dict[str, Series]:
        evaluated = [results(half, lambda run: evaluation_unit(run, one)) for half in settings.ablation_halves]
        scale = f"{one.scale:g}"
        return {cell: _series([[row[kind][cell][scale] for row in rows] for rows in evaluated]) for cell in cells}

    table = {}
    for name, one in {"ToCom": settings.plugin, **ablations(settings)}.items():
        training = [results(half, lambda run, one=one: plugin_unit(run, one)) for half in settings.ablation_halves]
        table[name] = {
            "parameters": training[0][0]["parameters"],
            "loss": [statistics.fmean(row["loss"] for row in rows) for rows in zip(*training, strict=True)],
            "task": measured(one, "task"),
            "own": measured(one, "own"),
        }
    return table


def _series(rows: Sequence[Sequence[Row]]) -> Series:
    """Rows [half][seed] -> per measured thing, the mean over the halves for each seed."""
    return {
        name: [statistics.fmean(row[name] for row in seed) for seed in zip(*rows, strict=True)] for name in rows[0][0]
    }


def _best_scale(rows: Mapping[str, Row]) -> str:
    """The scale of the lowest cross entropy on digits that were neither trained nor reported on."""
    return min(rows, key=lambda scale: rows[scale]["cross_entropy"])
