"""Markdown tables of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.reproduce.spread import Series, difference, markdown, mean_and_deviation, spread


def all_tables(summary: Mapping[str, Any]) -> str:
    """The whole page of tables."""
    settings = summary["settings"]
    tokens = settings["tokens_per_degree"]
    parts = [
        f"Degree d merges {tokens} d of the tokens in every block (ToMe). {len(settings['seeds'])} seeds; a seed's "
        "number is the mean over what was pre-trained on, so over all held-out digits. ± after a mean: standard "
        "deviation over the seeds; after a difference: its 95 % interval. In brackets: seeds on which the number is "
        "higher.",
        "## The task: fine-tuned at one degree, used at another",
        _gains(summary["task"], "top1", "%"),
        "Cross entropy:",
        _gains(summary["task"], "cross_entropy", "", 4),
        "Divergence from the model's own answers at the source degree:",
        _gains(summary["task"], "divergence", "", 4, tuned=False),
        f"## The scale in use (trained at {settings['plugin']['scale']:g}): less the cross entropy without the plugin",
        _scales(summary),
    ]
    for half, cells in summary["halves"].items() if len(summary["halves"]) > 1 else ():
        parts += [f"## Pre-trained on {_classes(half)}", _gains(cells, "top1", "%", tuned=False)]
    parts += [
        "## The pre-trained model on its own half's held-out digits",
        _gains(summary["own"], "top1", "%", tuned=False),
        "Divergence from its own answers at the source degree:",
        _gains(summary["own"], "divergence", "", 4, tuned=False),
        "## Ablations",
        "Top-1 on the task, less that without a plugin:",
        _ablations(summary, "task", "top1", 2, _without(summary)),
        "Less that of ToCom:",
        _ablations(summary, "task", "top1", 2, summary["ablations"]["ToCom"]["task"]),
        "Cross entropy on the task, less that without a plugin:",
        _ablations(summary, "task", "cross_entropy", 4, _without(summary)),
        "Less that of ToCom:",
        _ablations(summary, "task", "cross_entropy", 4, summary["ablations"]["ToCom"]["task"]),
        "Divergence on the task from the model's own answers at the source degree:",
        _plain_ablations(summary, "task", "divergence"),
        "The same of the pre-trained model, on held-out digits of the half that the plugins were trained on:",
        _plain_ablations(summary, "own", "divergence"),
        "Less that of ToCom:",
        _ablations(summary, "own", "divergence", 4, summary["ablations"]["ToCom"]["own"]),
    ]
    return "\n\n".join(parts) + "\n"


def _classes(half: str) -> str:
    return {"low": "0 to 4, task 5 to 9", "high": "5 to 9, task 0 to 4"}[half]


def _gains(
    cells: Mapping[str, Mapping[str, Series]], field: str, unit: str, digits: int = 2, *, tuned: bool = True
) -> str:
    """A row per pair of degrees; where models were ``tuned``, with what one tuned at the target degree has."""
    unit = f" {unit}" if unit else ""
    header = ["source > target", "without", "with ToCom", "gain"]
    body = []
    for cell, rows in cells.items():
        without, found = rows["without"][field], rows.get("with")
        row = [cell, f"{spread(without, digits)}{unit}"]
        row += (
            [f"{spread(found[field], digits)}{unit}", difference(found[field], without, digits)] if found else ["", ""]
        )
        if tuned:
            row.append(difference(rows["chosen"][field], without, digits) if "chosen" in rows else "")
            row.append(_at_target(cells, cell, field, digits))
        body.append(row)
    return markdown(
        [*header, *(["gain, scale chosen", "fine-tuned at the target, less without"] if tuned else [])], body
    )


def _at_target(cells: Mapping[str, Mapping[str, Series]], cell: str, field: str, digits: int) -> str:
    source, target = cell.split(">")
    trained = f"{target}>{target}"
    if source == target or trained not in cells:
        return ""
    return difference(cells[trained]["without"][field], cells[cell]["without"][field], digits)


def _scales(summary: Mapping[str, Any]) -> str:
    scales = list(next(iter(summary["scales"].values())))
    body = []
    for cell, rows in summary["scales"].items():
        without = summary["task"][cell]["without"]["cross_entropy"]
        body.append([cell, *(difference(rows[scale]["cross_entropy"], without, 4) for scale in scales)])
    return markdown(["source > target", *(f"s = {scale}" for scale in scales)], body)


def _without(summary: Mapping[str, Any]) -> dict[str, Series]:
    return {cell: rows["without"] for cell, rows in summary["without"]["task"].items()}


def _ablations(summary: Mapping[str, Any], kind: str, field: str, digits: int, baseline: Mapping[str, Series]) -> str:
    """Differences from a baseline, {cell: Series}, with the numbers of parameters."""
    cells = list(summary["scales"])
    body = []
    for name, one in summary["ablations"].items():
        row = [difference(one[kind][cell][field], baseline[cell][field], digits) for cell in cells]
        body.append([name, f"{one['parameters']:,}", *row])
    return markdown(["", "parameters", *cells], body)


def _plain_ablations(summary: Mapping[str, Any], kind: str, field: str) -> str:
    """Means over the seeds."""
    cells = list(summary["scales"])
    rows = {"without": {cell: summary["without"][kind][cell]["without"] for cell in cells}}
    rows |= {name: one[kind] for name, one in summary["ablations"].items()}
    body = [[name, *(f"{mean_and_deviation(one[cell][field])[0]:.4f}" for cell in cells)] for name, one in rows.items()]
    return markdown(["", *cells], body)
