"""From cells to a table per budget: rows with paired intervals against the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokcomp.compare.answers import paired, unpacked
from tokcomp.compare.recommend import best_overall, recommend

#: What a row takes from its cell as it is.
_COPIED = (
    *("gflops", "top1", "same", "cross_entropy", "images_per_second", "uncompressed_images_per_second", "speedup"),
    *("int8", "kept", "before_merge", "method", "schedule"),
)


def summarize(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The uncompressed model, and per budget its rows, the random schedules, and what could not be made.

    Args:
        cells: what :class:`tokcomp.compare.run.Comparison` has so far, the uncompressed model's first.

    Returns:
        JSON data: ``uncompressed``; ``budgets``, each with its ``target`` in GFLOPs, ``rows``, ``impossible`` and what
        is ``recommended``; what is ``recommended`` over all of them. A row has ``less_best``: its top-1 less that of
        the best row, in points, and half the width of the paired 95 % interval. Random schedules share a row, that of
        their median, with ``random``: all of their top-1, sorted.
    """
    dense, *others = cells
    labels = unpacked(dense["labels"])
    budgets, hits = [], []
    for target in dict.fromkeys(cell["target"] for cell in others):
        here = [cell for cell in others if cell["target"] == target]
        made = [cell for cell in here if "impossible" not in cell]
        rows = _rows(made, labels)
        hits.append({cell["entry"]: _hits(cell, labels) for cell in made if cell["kind"] != "random"})
        budgets.append(
            {
                "target": target,
                "rows": rows,
                "impossible": {cell["entry"]: cell["impossible"] for cell in here if "impossible" in cell},
                "recommended": recommend(rows),
            }
        )
    return {
        "uncompressed": _copied(dense),
        "num_images": dense["num_images"],
        "budgets": budgets,
        "recommended": best_overall(hits),
    }


def _hits(cell: Mapping[str, Any], labels: Tensor) -> Tensor:
    """[n] bool: which of the images that have a label a cell gets right."""
    return (unpacked(cell["answers"]) == labels)[labels >= 0]


def _copied(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cell[name] for name in _COPIED if name in cell}


def _rows(cells: Sequence[Mapping[str, Any]], labels: Tensor) -> list[dict[str, Any]]:
    random = sorted((cell for cell in cells if cell["kind"] == "random"), key=lambda cell: cell["top1"])
    named = {cell["entry"]: cell for cell in cells if cell["kind"] != "random"}
    if random:
        named[f"random, median of {len(random)}"] = random[(len(random) - 1) // 2]
    if not named:
        return []
    hits = {name: _hits(cell, labels) for name, cell in named.items()}
    best = max(named, key=lambda name: named[name]["top1"])
    rows = []
    for name, cell in named.items():
        row = {"name": name, **_copied(cell), "less_best": list(paired(hits[name], hits[best]))}
        if cell["kind"] == "random":
            row["random"] = [one["top1"] for one in random]
        elif random:
            # Ties count half.
            beaten = sum((one["top1"] < cell["top1"]) + 0.5 * (one["top1"] == cell["top1"]) for one in random)
            row["beats_random"] = 100.0 * beaten / len(random)
        rows.append(row)
    return rows


def header(summary: Mapping[str, Any]) -> list[str]:
    """The columns that a summary has figures for."""
    rows = [row for budget in summary["budgets"] for row in budget["rows"]]
    columns = ["method", "GFLOPs", "top-1", "less the best", "same answers", "cross entropy"]
    columns += ["images/s", "faster"] if "speedup" in summary["uncompressed"] else []
    if any("int8" in row for row in rows):
        columns += ["int8: top-1", "same"] + (["int8: images/s"] if "speedup" in summary["uncompressed"] else [])
    columns += ["beats random"] if any("beats_random" in row for row in rows) else []
    return [*columns, "verdict"] if any(budget.get("recommended") for budget in summary["budgets"]) else columns


def table_of(summary: Mapping[str, Any], budget: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a budget's table as text, under :func:`header`, the uncompressed model's first."""
    columns, found = header(summary), budget.get("recommended") or {"name": None, "as_good": []}
    rows = [{**summary["uncompressed"], "verdict": ""}]
    for row in budget["rows"]:
        verdict = "as good" if row["name"] in found["as_good"] else ""
        rows.append({**row, "verdict": "recommended" if row["name"] == found["name"] else verdict})
    return [cells_of(row, columns) for row in rows]


def cells_of(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """A row of the table as text."""
    mean, half = row.get("less_best", (0.0, 0.0))
    entropy, int8 = row["cross_entropy"], row.get("int8", {})
    texts = {
        "method": row.get("name", "uncompressed"),
        "GFLOPs": f"{row['gflops']:.4g}",
        "top-1": f"{row['top1']:.2f} %",
        "less the best": "" if "less_best" not in row else "best" if mean == half == 0 else f"{mean:+.2f} ± {half:.2f}",
        "same answers": f"{row['same']:.1f} %",
        "cross entropy": "-" if entropy is None else f"{entropy:.4f}",
        "images/s": f"{row['images_per_second']:.1f}" if "images_per_second" in row else "-",
        "faster": f"{row['speedup']:.2f} x" if "speedup" in row else "-",
        "int8: top-1": f"{int8['top1']:.2f} %" if int8 else "-",
        "same": f"{int8['same']:.1f} %" if int8 else "-",
        "int8: images/s": f"{int8['images_per_second']:.1f}" if "images_per_second" in int8 else "-",
        "beats random": f"{row['beats_random']:.0f} %" if "beats_random" in row else "",
        "verdict": row.get("verdict", ""),
    }
    return [texts[column] for column in columns]
