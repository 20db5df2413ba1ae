"""Dense prediction at a small scale: what merging for the MLP costs a segmenter, and what ToCom gives back.

Trains small segmenters from scratch on generated pictures, plugins for them, and scores all of it. Everything follows
from seeds. Stop it with Ctrl-C and start it again: it goes on where it was.

    python -m benchmarks.reproduce.dense
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokcomp.cli.errors import UserError, check_output_folder
from tokcomp.files import write_whole
from tokcomp.measure.provenance import provenance

from benchmarks.reproduce.dense_units import DEGREES, QUICK, DenseSettings, all_units, tokens
from benchmarks.reproduce.runner import load_result, result_path, run_units

DEFAULT_OUTPUT = Path("reproduce-output/dense")
MERGED = "merged residual, plugin, kl"
ROWS = ("tome_mlp", "plugin, kl", "plugin, features", "merged residual", MERGED, "ToMe")


def reproduce(folder: Path, settings: DenseSettings, jobs: int) -> list[Path]:
    """Run what is not yet done, and write results.json and tables.md; returns their paths."""
    units = all_units(settings)
    run_units(folder, units, jobs, lambda line: print(line, flush=True))
    seconds = sum(json.loads(result_path(folder, unit.name).read_text())["core_seconds"] for unit in units)
    results = {head: [_result(folder, head, seed) for seed in range(settings.seeds)] for head in settings.heads}
    speed = load_result(folder, "speed")
    record = {
        "provenance": provenance(torch.device("cpu")),
        "settings": asdict(settings),
        "core_seconds": round(seconds),
        "heads": results,
        "speed": speed,
    }
    write_whole(folder / "results.json", json.dumps(record, indent=1) + "\n")
    tables = [_tables(head, found, settings) for head, found in results.items()]
    write_whole(folder / "tables.md", "\n".join([*tables, _speed_table(speed, settings)]))
    return [folder / "results.json", folder / "tables.md"]


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce.dense",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder of all results (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="models of each kind (default: 3)")
    parser.add_argument("--heads", nargs="+", choices=("linear", "mask_transformer"), help="default: both")
    parser.add_argument("--quick", action="store_true", help="seconds of everything, too small to show anything")
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else DenseSettings()
    try:
        check_output_folder("--output", args.output)
        for option in ("jobs", "seeds"):
            if (value := getattr(args, option)) is not None and value < 1:
                raise UserError(f"--{option} must be at least 1, got {value}")
        if args.seeds is not None:
            settings = replace(settings, seeds=args.seeds)
        if args.heads is not None:
            settings = replace(settings, heads=tuple(args.heads))
        written = reproduce(args.output, settings, args.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("written: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker processes too
    sys.exit(main())
