"""Pictures of a summary."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tokcomp.report import SERIES_COLOURS

from benchmarks.reproduce.spread import mean_and_deviation

_METHODS = ("DiffRate", "uniform", "EViT", "ToMe")
_COLOURS = {name: SERIES_COLOURS[place] for name, place in zip(_METHODS, (1, 3, 2, 4), strict=True)}


def draw_all(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every plot as PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "diffrate-equal-cost.png": _equal_cost(summary),
        "diffrate-random.png": _random(summary),
        "diffrate-schedules.png": _schedules(summary),
    }
    paths = []
    for name, figure in figures.items():
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110, metadata={"Software": None})
        plt.close(figure)
        paths.append(folder / name)
    return paths


def _bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def _equal_cost(summary: Mapping[str, Any]) -> Any:
    """What each method costs a model, so that the models' own differences are out of the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    shares = sorted(summary["equal_cost"], key=float)
    units = {
        "top1": ("change of top-1, points", axes[0]),
        "cross_entropy": ("change of cross entropy", axes[1]),
    }
    for field, (title, axis) in units.items():
        whole = summary["uncompressed"][field]
        for place, method in enumerate(_METHODS):
            rows = [summary["equal_cost"][share]["rows"][method][field] for share in shares]
            differences = [[a - b for a, b in zip(row, whole, strict=True)] for row in rows]
            at = [100 * float(share) + 0.35 * (place - 1.5) for share in shares]
            means, deviations = zip(*map(mean_and_deviation, differences), strict=True)
            axis.errorbar(at, means, deviations, label=method, color=_COLOURS[method], marker="o", ms=4, capsize=3)
        axis.axhline(0, color=SERIES_COLOURS[0], ls=":")
        axis.set_xticks([100 * float(share) for share in shares])
        axis.set_xlabel("multiply-adds, % of the uncompressed model's")
        axis.set_ylabel(title)
        _bare(axis)
    axes[0].legend(frameon=False)
    return figure


def _random(summary: Mapping[str, Any]) -> Any:
    panels = summary["random"]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 3.4), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for index, seed in enumerate(panel["seeds"]):
            middle = statistics.median(seed["top1"])
            count = max(1, len(seed["top1"]) - 1)
            at = [index + 0.25 * (2 * place / count - 1) for place in range(len(seed["top1"]))]
            label = {"label": "random"} if index == 0 else {}
            values = [value - middle for value in seed["top1"]]
            axis.scatter(at, values, s=6, color=SERIES_COLOURS[0], alpha=0.5, **label)
            ours = panel["DiffRate"]["top1"][index] - middle
            label = {"label": "DiffRate"} if index == 0 else {}
            axis.scatter([index], [ours], marker="D", s=26, color=_COLOURS["DiffRate"], zorder=3, **label)
        axis.set_title(f"{panel['pipeline']}, {100 * panel['share']:g} %", fontsize=10)
        axis.set_xlabel("seed")
        axis.set_xticks(range(len(panel["seeds"])))
        axis.set_ylim(-3, 3)  # a few random schedules are hopeless; what matters is the top of the cloud
        _bare(axis)
    axes[0][0].set_ylabel("top-1 less the random median, points")
    axes[0][0].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def _schedules(summary: Mapping[str, Any]) -> Any:
    shares = list(summary["equal_cost"])
    figure, axes = plt.subplots(1, len(shares), figsize=(3.2 * len(shares), 3.2), sharey=True, squeeze=False)
    for axis, share in zip(axes[0], shares, strict=True):
        for index, (before, kept) in enumerate(summary["equal_cost"][share]["counts"]):
            colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
            axis.plot(range(len(kept)), kept, color=colour, marker="o", ms=3, label=f"seed {index}")
            axis.plot(range(len(kept)), before, color=colour, ls=":", lw=1)
        axis.set_title(f"{100 * float(share):g} % of the cost", fontsize=10)
        axis.set_xlabel("block")
        _bare(axis)
    axes[0][0].set_ylabel("tokens kept (dotted: after pruning)")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure
