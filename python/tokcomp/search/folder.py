"""The folder of a search: the names of its files, and the results written at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.budgets import Budget
from tokcomp.files import write_whole
from tokcomp.runs.loop import CHECKPOINT, SUMMARY

if TYPE_CHECKING:
    from tokcomp.search.settings import SearchResult

#: Patterns of files that mark a folder as holding a search.
TRACES = (CHECKPOINT, SUMMARY, "schedule*.json", "refine*.json", "log*.csv")


class SearchFolder:
    """Names and files of a run. With several targets, every file except checkpoint and summary bears its target's name.

    Args:
        path: the folder.
        targets: their names, all different.
        command: the command line that started the search.
    """

    def __init__(self, path: Path, targets: Sequence[str], command: str | None = None) -> None:
        self.path, self.targets, self.command = path, list(targets), command
        self.checkpoint, self.summary = path / CHECKPOINT, path / SUMMARY

    def file(self, stem: str, target: str, suffix: str) -> Path:
        return self.path / (f"{stem}-{target}{suffix}" if len(self.targets) > 1 else f"{stem}{suffix}")

    def schedule(self, target: str) -> Path:
        return self.file("schedule", target, ".json")

    def refined(self, target: str) -> Path:
        """The schedule of ``--refine``."""
        return self.file("refined", target, ".json")

    def log(self, target: str) -> Path:
        return self.file("log", target, ".csv")

    def plot(self, target: str) -> Path:
        return self.file("kept", target, ".png")

    def board(self, target: str) -> Path:
        """The folder of the target's TensorBoard files."""
        return self.path / "tensorboard" / (target or "search")

    def write_results(
        self, results: Sequence[SearchResult], budgets: Sequence[Sequence[Budget]], settings: Mapping[str, Any]
    ) -> None:
        """Write the schedules with their provenance, plots if matplotlib is installed, and the summary of all."""
        from tokcomp.measure.info import machine, package_versions
        from tokcomp.search.plot import plot_kept

        settings = {name: value for name, value in settings.items() if name != "targets"}
        summary: dict[str, Any] = {"settings": settings, "command": self.command, "machine": machine(), "targets": []}
        for target, result, terms in zip(self.targets, results, budgets, strict=True):
            found = {
                "gflops": result.gflops,
                "uncompressed_gflops": result.uncompressed_gflops,
                "costs": result.costs,
                "top1": result.top1,
                "uncompressed_top1": result.uncompressed_top1,
                "budgets": [budget.describe() for budget in terms],
            }
            provenance = {
                "source": "DiffRate search",
                **found,
                "settings": settings,
                "versions": package_versions(),
                "command": self.command,
            }
            schedule = replace(result.schedule, provenance=provenance)
            schedule.save(self.schedule(target))
            plotted = plot_kept(result.log, self.plot(target), title=_title(target, result))
            summary["targets"].append(
                {
                    "name": target,
                    **found,
                    "num_prune_kept": schedule.num_prune_kept,
                    "num_merge_kept": schedule.num_merge_kept,
                    "schedule": self.schedule(target).name,
                    "log": self.log(target).name,
                    "plot": self.plot(target).name if plotted else None,
                }
            )
        write_whole(self.summary, json.dumps(summary, indent=2) + "\n")


def _title(target: str, result: SearchResult) -> str:
    accuracy = "" if result.top1 is None else f", top-1 {result.top1:.2f} %"
    return f"{target + ': ' if target else ''}{result.gflops:.4g} GFLOPs{accuracy}"
