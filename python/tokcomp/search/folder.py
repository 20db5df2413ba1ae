"""The folder of a search: checkpoint, logs, and the results at its end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.budgets import Budget
from tokcomp.files import write_whole
from tokcomp.runs.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from tokcomp.runs.log import RunLog, read_log

if TYPE_CHECKING:
    from tokcomp.search.settings import SearchResult

KIND = "search"


class SearchFolder:
    """Names and files of a run. With several targets every file but the checkpoint and the summary bears its target's.

    Args:
        path: the folder; made when the run begins.
        targets: their names, unlike each other.
        command: the command line that makes it.
    """

    def __init__(self, path: Path, targets: Sequence[str], command: str | None = None) -> None:
        self.path, self.targets, self.command = path, list(targets), command
        self.checkpoint = path / "checkpoint.pt"
        self.summary = path / "summary.json"

    def file(self, stem: str, target: str, suffix: str) -> Path:
        return self.path / (f"{stem}-{target}{suffix}" if len(self.targets) > 1 else f"{stem}{suffix}")

    def schedule(self, target: str) -> Path:
        return self.file("schedule", target, ".json")

    def log(self, target: str) -> Path:
        return self.file("log", target, ".csv")

    def plot(self, target: str) -> Path:
        return self.file("kept", target, ".png")

    def check_free(self, resume: bool) -> None:
        """Raise ValueError if the folder holds a run that is not to be resumed."""
        patterns = ("checkpoint.pt", "summary.json", "schedule*.json", "log*.csv")
        if not resume and self.path.is_dir() and any(any(self.path.glob(pattern)) for pattern in patterns):
            raise ValueError(
                f"the output folder must not hold another run, got '{self.path}'; go on with it by --resume, or choose "
                "another folder"
            )

    def open(self, settings: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
        """Make the folder, see that it can be written, and read the checkpoint to go on from, if there is one.

        Raises:
            ValueError: it holds a run and ``resume`` is False, or one of other settings, or a broken checkpoint.
            OSError: it cannot be written.
        """
        self.check_free(resume)
        state = None
        if self.checkpoint.is_file():
            state = load_checkpoint(self.checkpoint, KIND)
            check_same_settings(state["settings"], settings, where=str(self.path))
        self.path.mkdir(parents=True, exist_ok=True)
        for litter in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            litter.unlink()
        with tempfile.TemporaryFile(dir=self.path) as probe:
            probe.write(b"\0")
        return state

    def open_log(self, target: str, columns: Sequence[str], resume_step: int | None) -> RunLog:
        board = self.path / "tensorboard" / (target or "search")
        return RunLog(self.log(target), columns, resume_step=resume_step, tensorboard=board)

    def rows(self, target: str) -> list[dict[str, Any]]:
        return read_log(self.log(target))

    def save(self, state: Mapping[str, Any]) -> None:
        save_checkpoint(self.checkpoint, KIND, state)

    def write_results(
        self, results: Sequence[SearchResult], budgets: Sequence[Sequence[Budget]], settings: Mapping[str, Any]
    ) -> None:
        """Schedules with their provenance, plots where matplotlib is there, and the summary of all."""
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
