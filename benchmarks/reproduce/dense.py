"""Dense prediction at a small scale: what merging for the MLP costs a segmenter, and what ToCom gives back.

Trains small segmenters from scratch on generated pictures, plugins for them, and scores all of it. Everything follows
from seeds. Stop it with Ctrl-C and start it again: it goes on where it was.

    python -m benchmarks.reproduce.dense
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokcomp.cli.errors import UserError

from benchmarks.reproduce.command import Study, run_command
from benchmarks.reproduce.dense_units import DEGREES, QUICK, DenseSettings, all_units, tokens
from benchmarks.reproduce.runner import load_result

MERGED = "merged residual, plugin, kl"
ROWS = ("tome_mlp", "plugin, kl", "plugin, features", "merged residual", MERGED, "ToMe")


def summarize(folder: Path, settings: DenseSettings) -> dict[str, Any]:
    results = {head: [_result(folder, head, seed) for seed in range(settings.seeds)] for head in settings.heads}
    return {"settings": asdict(settings), "heads": results, "speed": load_result(folder, "speed")}


def all_tables(summary: Mapping[str, Any]) -> str:
    settings = DenseSettings(**summary["settings"])
    tables = [_tables(head, found, settings) for head, found in summary["heads"].items()]
    return "\n".join([*tables, _speed_table(summary["speed"], settings)])


def _result(folder: Path, head: str, seed: int) -> dict[str, Any]:
    """What a model scored, with or without its residual merged."""
    result: dict[str, Any] = load_result(folder, f"score-{head}-{seed}")
    for degree, scores in load_result(folder, f"merged-{head}-{seed}")["own size"].items():
        result["own size"][degree]["rows"][MERGED] = scores
    return result


def _tables(head: str, found: list[dict[str, Any]], settings: DenseSettings) -> str:
    """Means over the seeds; a row that is compared with tome_mlp has the differences' own spread."""
    side, large = settings.side, settings.large_side
    counts = [f"r = {tokens(side, degree)}" for degree in DEGREES]
    lines = [f"Head `{head}`, mIoU in % at {side} x {side}, {len(found)} seeds", ""]
    lines += ["| | " + " | ".join(counts) + " |", "|---" * (len(DEGREES) + 1) + "|"]

    def over_seeds(pick: Callable[[dict[str, Any], str], float]) -> list[list[float]]:
        return [[pick(result, str(degree)) for result in found] for degree in DEGREES]

    def of(name: str) -> list[list[float]]:
        return over_seeds(lambda result, degree: result["own size"][degree]["rows"][name]["mean_iou"])

    base = of("tome_mlp")
    for name in ROWS:
        cells = []
        for ours, theirs in zip(of(name), base, strict=True):
            text = f"{statistics.fmean(ours):.2f}"
            gains = [a - b for a, b in zip(ours, theirs, strict=True)]
            cells.append(_with_spread(text, gains if name != ROWS[0] else ours, differences=name != ROWS[0]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    large_row = over_seeds(lambda result, degree: result["large"][degree]["mean_iou"])
    lines.append(
        f"| tome_mlp at {large} x {large} | "
        + " | ".join(_with_spread(f"{statistics.fmean(row):.2f}", row) for row in large_row)
        + " |"
    )
    cost = over_seeds(lambda result, degree: result["own size"][degree]["flops"] / 1e6)
    lines.append("| encoder, 1e6 multiply-adds | " + " | ".join(f"{row[0]:.1f}" for row in cost) + " |")
    speed = over_seeds(lambda result, degree: result["images_per_core_second"][degree])
    lines.append("| images per core second | " + " | ".join(f"{statistics.median(row):.0f}" for row in speed) + " |")
    return "\n".join(lines) + "\n"


def _speed_table(speed: dict[str, Any], settings: DenseSettings) -> str:
    side, base = settings.speed_side, speed["images_per_core_second"]["0"]
    lines = [f"{settings.speed_model} at {side} x {side}, linear head, one image at a time on one core", ""]
    lines += ["| r | encoder, GFLOPs | images per core second | against r = 0 |", "|---|---|---|---|"]
    for degree in DEGREES:
        found = speed["images_per_core_second"][str(degree)]
        cost = speed["flops"][str(degree)] / 1e9
        lines.append(f"| {tokens(side, degree)} | {cost:.2f} | {found:.2f} | {found / base:.2f}x |")
    return "\n".join(lines) + "\n"


def _with_spread(text: str, values: list[float], differences: bool = False) -> str:
    """With the standard deviation over the seeds; of differences, with their mean."""
    if len(values) < 2:
        return text
    spread = statistics.stdev(values)
    return f"{text} ({statistics.fmean(values):+.2f} ± {spread:.2f})" if differences else f"{text} ± {spread:.2f}"


STUDY = Study("dense", __doc__ or "", DenseSettings(), QUICK, all_units, summarize, all_tables, lambda *_: [])


def main(argv: Sequence[str] | None = None) -> int:
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--seeds", type=int, help="models of each kind (default: 3)")
        parser.add_argument("--heads", nargs="+", choices=("linear", "mask_transformer"), help="default: both")

    def adjust(settings: DenseSettings, args: argparse.Namespace) -> DenseSettings:
        if args.seeds is not None and args.seeds < 1:
            raise UserError(f"--seeds must be at least 1, got {args.seeds}")
        given = {"seeds": args.seeds, "heads": args.heads and tuple(args.heads)}
        return replace(settings, **{name: value for name, value in given.items() if value is not None})

    return run_command(STUDY, argv, add_options, adjust)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker processes too
    sys.exit(main())
