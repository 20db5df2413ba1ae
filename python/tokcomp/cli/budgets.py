"""The options that set a search's budgets, and the budgets that they make."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, blame, check_output_file

if TYPE_CHECKING:
    import torch

    from tokcomp.budgets import Budget, LatencyTable
    from tokcomp.runs.distributed import World

#: option -> the unit after its number in a target's name
_TARGETS = {"target_gflops": "", "target_ms": "ms", "target_images_per_s": "ips", "target_mw": "mw"}
#: options that need a measured latency, or modelled hardware
_OF_MEASURING = ("latency_batch_size", "latency_dtype", "latency_table")
_OF_HARDWARE = ("power_weight", "hardware_point", "fix_hardware", "target_mw")


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budgets (at least one; several kinds are summed)")
    group.add_argument(
        "--target-gflops",
        type=options.positive_float,
        nargs="+",
        metavar="G",
        help="1e9 multiply-adds per image; several give one schedule each, from one pass over the data",
    )
    group.add_argument(
        "--flops-weight",
        type=options.non_negative_float,
        metavar="X",
        help="weight of its loss, (F - T)^2 in GFLOPs (default: 5, as in the paper; more for models under 1 GFLOPs)",
    )
    group.add_argument(
        "--target-ms",
        type=options.positive_float,
        nargs="+",
        metavar="T",
        help="milliseconds per batch, by a table measured on --device; with --hardware, per image on that hardware",
    )
    group.add_argument(
        "--target-images-per-s", type=options.positive_float, nargs="+", metavar="R", help="the same, as a rate"
    )
    group.add_argument(
        "--latency-batch-size", type=options.positive_int, metavar="N", help="images in that batch (default: 1)"
    )
    group.add_argument(
        "--latency-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="type that the model will be served in (default: float32)",
    )
    group.add_argument(
        "--latency-table",
        type=Path,
        metavar="FILE",
        help="the table: read if it exists, otherwise measured and saved (default: latency.json in the output folder)",
    )
    group.add_argument(
        "--latency-weight",
        type=options.non_negative_float,
        metavar="X",
        help="weight of its loss, ((E - T) / uncompressed)^2 (default: 100), or log cosh(E - T) (default: 1)",
    )
    group.add_argument(
        "--hardware",
        choices=("gemmini",),
        help="use an accelerator's cost model and search its parameters along with the schedule (paper, App. B)",
    )
    group.add_argument(
        "--target-mw", type=options.positive_float, nargs="+", metavar="P", help="its power in milliwatts"
    )
    group.add_argument(
        "--power-weight", type=options.non_negative_float, metavar="X", help="weight of log cosh(E - T) (default: 1)"
    )
    group.add_argument(
        "--hardware-point",
        type=_point,
        metavar="NAME=X,...",
        help="its initial parameters, as in mesh_rows=32,bus_bits=256 (default: Gemmini's own)",
    )
    group.add_argument("--fix-hardware", action="store_true", help="do not search its parameters")


def check_budget_options(args: argparse.Namespace) -> None:
    """Refuse options that are wrong whatever the model."""
    given = [option for option in _TARGETS if getattr(args, option) is not None]
    if not given:
        raise UserError("a search needs a budget, got none; pass --target-gflops G")
    if "target_ms" in given and "target_images_per_s" in given:
        raise UserError("--target-ms and --target-images-per-s are the same budget, got both; keep one")
    latency = {"target_ms", "target_images_per_s"} & set(given)
    if not latency and args.latency_weight is not None:
        raise UserError("--latency-weight goes with --target-ms or --target-images-per-s, got neither")
    for option in _OF_MEASURING:
        if getattr(args, option) is not None and (not latency or args.hardware is not None):
            got = "neither" if not latency else "--hardware, which is not measured"
            raise UserError(f"{_flag(option)} goes with --target-ms or --target-images-per-s, got {got}")
    if args.hardware is None:
        for option in _OF_HARDWARE:
            if getattr(args, option):
                raise UserError(
                    f"{_flag(option)} goes with --hardware gemmini, got none; add it or leave the option out"
                )
    elif "target_images_per_s" in given:
        raise UserError("--hardware takes --target-ms, of an image, got --target-images-per-s")
    elif not {"target_ms", "target_mw"} & set(given):
        raise UserError("--hardware needs --target-ms or --target-mw, got neither")
    if args.latency_table is not None:
        check_output_file("--latency-table", args.latency_table)
    lengths = {len(getattr(args, option)) for option in given}
    if len(lengths - {1}) > 1:
        got = ", ".join(f"{len(getattr(args, option))} of {_flag(option)}" for option in given)
        raise UserError(f"each of several budgets must have one target or as many as the others, got {got}")
    names = target_names(args)
    if len(set(names)) < len(names):
        raise UserError(f"targets must differ from each other, got {' '.join(names)}")


def target_names(args: argparse.Namespace) -> list[str]:
    """The names of the targets, as used in their file names; a single target has the name ""."""
    series = [(getattr(args, option), unit) for option, unit in _TARGETS.items() if getattr(args, option) is not None]
    count = max(len(values) for values, _ in series)
    if count == 1:
        return [""]
    several = [(values, unit) for values, unit in series if len(values) > 1]
    return ["-".join(f"{values[index]:g}{unit}" for values, unit in several) for index in range(count)]


def build_targets(
    args: argparse.Namespace, model: Any, device: torch.device, world: World, stop: Callable[[], bool]
) -> dict[str, list[Budget]]:
    """Target's name -> its budgets.

    Raises:
        MeasurementStopped: ``stop`` became true while a latency table was being measured.
    """
    from tokcomp import flops
    from tokcomp.budgets import FlopsBudget, LatencyBudget
    from tokcomp.search.settings import flops_weight

    names = target_names(args)
    targets: dict[str, list[Budget]] = {name: [] for name in names}
    if args.target_gflops is not None:
        weight = flops_weight(flops(model) / 1e9) if args.flops_weight is None else args.flops_weight
        for name, target in zip(names, _each(args.target_gflops, len(names)), strict=True):
            with blame("--target-gflops"):
                targets[name].append(FlopsBudget(model, target, weight, granularity=args.granularity))
    if args.hardware is not None:
        for name, more in zip(names, _on_gemmini(args, model, len(names)), strict=True):
            targets[name] += more
        return targets
    option = "target_ms" if args.target_ms is not None else "target_images_per_s"
    if getattr(args, option) is not None:
        table, path = _latency_table(args, model, device, world, stop)
        weights = {} if args.latency_weight is None else {"weight": args.latency_weight}
        for name, target in zip(names, _each(getattr(args, option), len(names)), strict=True):
            with blame(_flag(option)):
                budget = LatencyBudget(model, table, **{option: target}, granularity=args.granularity, **weights)
            targets[name].append(budget)
        if world.is_main and not path.exists():
            table.save(path)
    return targets


def _on_gemmini(args: argparse.Namespace, model: Any, count: int) -> list[list[Budget]]:
    """The budgets of each target, each with its own Gemmini that learns."""
    from tokcomp import UnsupportedModelError
    from tokcomp.budgets import Gemmini, GemminiSearch

    weights = {"latency_weight": args.latency_weight, "power_weight": args.power_weight}
    with blame("--hardware-point"):
        start = Gemmini(**(args.hardware_point or {}))
    found = []
    for ms, mw in zip(_each(args.target_ms or [None], count), _each(args.target_mw or [None], count), strict=True):
        try:
            search = GemminiSearch(
                model,
                target_ms=ms,
                target_mw=mw,
                hardware=start,
                search_hardware=not args.fix_hardware,
                seed=args.seed,
                granularity=args.granularity,
                **{name: weight for name, weight in weights.items() if weight is not None},
            )
        except UnsupportedModelError as error:
            raise UserError(f"--hardware gemmini does not fit --model '{args.model}': {error}") from error
        except ValueError as error:
            raise UserError(f"--hardware gemmini: {error}") from error
        found.append(search.budgets)
    return found


def _latency_table(
    args: argparse.Namespace, model: Any, device: torch.device, world: World, stop: Callable[[], bool]
) -> tuple[LatencyTable, Path]:
    """The table, and its file. A table that was not asked for by name is saved only once its targets are accepted."""
    from tokcomp.budgets import find_latency_table

    path = args.latency_table or args.output / "latency.json"

    def find() -> LatencyTable:
        return find_latency_table(
            model,
            path if args.latency_table is not None or path.exists() else None,
            batch_size=args.latency_batch_size,
            dtype=args.latency_dtype,
            device=device,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            stop=stop,
        )

    try:
        with blame("--latency-table"):
            return world.from_main(find), path
    except OSError as error:
        raise UserError(f"--latency-table '{path}' cannot be used: {error}") from error


def _point(text: str) -> dict[str, float]:
    """Parses ``mesh_rows=32,bus_bits=256``; Gemmini itself checks the names and values."""
    from tokcomp.budgets.gemmini import SPACE

    point: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in SPACE:
            raise argparse.ArgumentTypeError(f"must name parameters of {', '.join(SPACE)}, got '{name}'")
        try:
            point[name] = float(value) if name == "scratchpad_mb" else int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers, got '{part.strip()}'") from None
    return point


def _each(values: list[Any], count: int) -> list[Any]:
    return values * count if len(values) == 1 else values


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
