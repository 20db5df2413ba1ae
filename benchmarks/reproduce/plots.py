"""Pictures of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tokcomp.report import SERIES_COLOURS

from benchmarks.reproduce.summary import mean_and_deviation

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
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    shares = sorted(summary["equal_cost"], key=float)
    units = {"top1": ("top-1 accuracy, %", axes[0]), "cross_entropy": ("cross entropy", axes[1])}
    for field, (title, axis) in units.items():
        for place, method in enumerate(_METHODS):
            values = [mean_and_deviation(summary["equal_cost"][share]["rows"][method][field]) for share in shares]
            at = [100 * float(share) + 0.35 * (place - 1.5) for share in shares]
            means, deviations = zip(*values, strict=True)
            axis.errorbar(at, means, deviations, label=method, color=_COLOURS[method], marker="o", ms=4, capsize=3)
        axis.axhline(mean_and_deviation(summary["uncompressed"][field])[0], color=SERIES_COLOURS[0], ls=":")
        axis.set_xlabel("multiply-adds, % of the uncompressed model")
        axis.set_ylabel(title)
        _bare(axis)
    axes[0].legend(frameon=False)
    return figure


def _random(summary: Mapping[str, Any]) -> Any:
    panels = summary["random"]
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 3.6), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for index, seed in enumerate(panel["seeds"]):
            at = [index + 0.25 * (2 * place / max(1, len(seed["top1"]) - 1) - 1) for place in range(len(seed["top1"]))]
            label = {"label": "random"} if index == 0 else {}
            axis.scatter(at, seed["top1"], s=6, color=SERIES_COLOURS[0], alpha=0.5, **label)
        axis.scatter(
            range(len(panel["seeds"])),
            panel["DiffRate"]["top1"],
            marker="D",
            s=26,
            color=_COLOURS["DiffRate"],
            label="DiffRate",
            zorder=3,
        )
        axis.set_title(f"{panel['pipeline']}, {100 * panel['share']:g} %", fontsize=10)
        axis.set_xlabel("seed")
        axis.set_xticks(range(len(panel["seeds"])))
        # A few random schedules are hopeless; what matters is the top of the cloud.
        values = sorted(value for seed in panel["seeds"] for value in seed["top1"])
        axis.set_ylim(bottom=values[len(values) // 10] - 0.5)
        _bare(axis)
    axes[0][0].set_ylabel("top-1 accuracy, %")
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
