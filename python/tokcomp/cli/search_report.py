"""What ``tokcomp search`` prints at its end."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli.model_arguments import model_words
from tokcomp.cli.table import table

if TYPE_CHECKING:
    from tokcomp.search.folder import SearchFolder
    from tokcomp.search.run import SearchRun
    from tokcomp.search.settings import SearchResult

#: Share of a target by which a cost may miss it before that is reported.
_WORTH_A_LINE = 0.02


def report(args: argparse.Namespace, run: SearchRun) -> None:
    """Print the table of results."""
    folder = run.folder
    assert folder is not None
    results = dict(zip(folder.targets, run.results, strict=True))
    if args.json:
        print(folder.summary.read_text(encoding="utf-8"), end="")
        return
    plain = next(iter(results.values()))
    rows = [["uncompressed", "", f"{plain.uncompressed_gflops:.4g}", _percent(plain.uncompressed_top1), "", ""]]
    for name, result in results.items():
        costs = ", ".join(f"{cost:.4g}" for kind, cost in result.costs.items() if kind != "flops") or "-"
        kept = " ".join(str(count) for count in _kept(result))
        rows.append(
            [name or "found", costs, f"{result.gflops:.4g}", _percent(result.top1), kept, folder.schedule(name).name]
        )
        if args.refine is not None:
            rows.append(_refined_row(folder.refined(name), name))
    if all(row[1] in ("", "-") for row in rows):
        rows = [[row[0], *row[2:]] for row in rows]
        header = ["target", "GFLOPs", "top-1", "tokens after each block", "schedule"]
    else:
        header = ["target", "cost", "GFLOPs", "top-1", "tokens after each block", "schedule"]
    print(table(header, rows))
    for line in _misses(folder):
        print(line)
    for name, found in _hardware(folder).items():
        settings = ", ".join(f"{parameter} {value:g}" for parameter, value in found.items())
        print(f"{args.hardware}{f' of {name}' if name else ''}: {settings}")
    if args.refine is not None:
        for name in results:
            print(_what_refining_did(folder.refined(name)))
    print(f"written: {args.output}")
    first = next(iter(results))
    print(f"Next: {_next_command(args, folder.schedule(first) if args.refine is None else folder.refined(first))}")


def _refined_row(path: Path, name: str) -> list[str]:
    from tokcomp import CompressionSchedule

    schedule = CompressionSchedule.load(path)
    counts = [one for one in (schedule.num_prune_kept, schedule.num_merge_kept) if one is not None]
    kept = " ".join(str(min(block)) for block in zip(*counts, strict=True))
    found = schedule.provenance
    return [f"{name} refined".strip(), "", f"{found['gflops']:.4g}", _percent(found["top1"]), kept, path.name]


def _what_refining_did(path: Path) -> str:
    """One line: the loss before and after, and what it took."""
    from tokcomp import CompressionSchedule

    schedule = CompressionSchedule.load(path)
    found = schedule.provenance
    best = min(found["starts"], key=found["starts"].__getitem__)
    starts = ", ".join(f"{name} {loss:.4f}" for name, loss in found["starts"].items())
    return (
        f"{path.name}: {schedule.method_name}, loss {found['loss']:.4f} (best start: {best}; {starts}), "
        f"{found['candidates']} candidates in {found['seconds']:.0f} s"
    )


def _next_command(args: argparse.Namespace, schedule: Path) -> str:
    """The command that evaluates the result on the model and data of the search."""
    from tokcomp import CompressionSchedule

    words = ["tokcomp evaluate", str(args.data or args.data_dir or "")]
    words += [f"--dataset {args.dataset}" if args.dataset else "", *model_words(args)]
    words += [f"--method {CompressionSchedule.load(schedule).method_name} --schedule {schedule}"]
    return " ".join(word for word in words if word)


def _hardware(folder: SearchFolder) -> dict[str, dict[str, float]]:
    """The hardware found for each target, if any was searched."""
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    return {
        target["name"]: budget["hardware"]
        for target in summary["targets"]
        for budget in target["budgets"]
        if "hardware" in budget
    }


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _kept(result: SearchResult) -> list[int]:
    last = result.log[-1]
    return [int(last[f"kept_{block}"]) for block in range(len(result.schedule))]


def _misses(folder: SearchFolder) -> list[str]:
    """A line for each cost that is a few per cent off its target."""
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    lines = [
        _miss(target["costs"][budget["budget"]], budget)
        for target in summary["targets"]
        for budget in target["budgets"]
    ]
    return [line for line in lines if line is not None]


def _miss(cost: float, budget: Mapping[str, Any]) -> str | None:
    """The line about a cost that misses ``budget``'s target, or None."""
    off = cost / budget["target"] - 1
    if abs(off) <= _WORTH_A_LINE:
        return None
    if off > 0:
        side, advice = "above", "search longer (--steps), with a larger --lr, or with a larger weight of the budget"
    elif budget.get("searched"):
        side, advice = "below", "the hardware found meets the target"
    else:
        side, advice = "below", "the target is met; --steps or --lr may bring it nearer, and keep more tokens"
    return f"{cost:.4g} {budget['unit']} is {abs(off):.0%} {side} {budget['target']:.4g}: {advice}"
