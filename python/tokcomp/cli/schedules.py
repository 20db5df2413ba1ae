"""--schedule and --gflops: which schedule, with which method, for how many tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli.errors import UserError, blame

if TYPE_CHECKING:
    from torch import nn

    from tokcomp import CompressionSchedule, DiffRate
    from tokcomp.methods import Method


def add_rescale_option(group: Any) -> None:
    group.add_argument(
        "--rescale",
        action="store_true",
        help="adapt a schedule for another image size, keeping the same shares of the patches",
    )


def load_schedule(path: Path, option: str, *, model: str, gflops: float | None = None) -> CompressionSchedule:
    """The schedule in a file; ``gflops`` chooses from a table like DiffRate's compression_rate.json."""
    from tokcomp import CompressionSchedule

    if not path.is_file():
        raise UserError(f"{option} must be a JSON file, got '{path}', which does not exist")
    with blame(option):
        return CompressionSchedule.load(path, model=model, gflops=gflops)


def scheduled_method(args: argparse.Namespace, model: nn.Module) -> Method:
    """The method of --schedule FILE, of the published --gflops, or of both: one budget of a table in a file."""
    from tokcomp import DiffRate

    if args.schedule is not None:
        schedule = load_schedule(args.schedule, "--schedule", model=args.model, gflops=args.gflops)
    elif args.gflops is not None:
        with blame("--gflops", hint="or pass --schedule FILE"):
            schedule = DiffRate.published(args.model, args.gflops).schedule
    else:
        raise UserError(f"--method {args.method} needs --gflops or --schedule, got none of them")
    if schedule.method_name != args.method:
        raise UserError(
            f"--method must be {schedule.method_name}, which the schedule was made for, got {args.method}; "
            f"pass --method {schedule.method_name}"
        )
    schedule = fitted(schedule, model, args.model, rescale=args.rescale)
    if args.method == "diffrate":
        return method_of(schedule, args, model)
    for option, setting in (("no_prop_attn", "prop_attn"), ("no_fuse", "fuse")):
        if getattr(args, option) and (schedule.method or {}).get(setting, True):
            raise UserError(
                f"--{option.replace('_', '-')} contradicts the schedule, which was made with {setting}; leave it out"
            )
    from tokcomp.methods import scheduled

    with blame("--schedule"):
        return scheduled(schedule)


def fitted(schedule: CompressionSchedule, model: nn.Module, name: str, *, rescale: bool) -> CompressionSchedule:
    """The schedule for this plain model's tokens: as it is, or with --rescale with the same shares."""
    from tokcomp.adapters import find_adapter

    with blame(f"--model '{name}'"):
        adapter = find_adapter(model)
        num_tokens, prefix = adapter.num_tokens(model), adapter.geometry(model).num_prefix_tokens
    if rescale:
        if schedule.num_tokens is None:
            raise UserError(
                "--rescale needs a schedule that says how many tokens it is for, got one that does not; add "
                '"num_tokens" to its file, the class token included'
            )
        with blame("--rescale"):
            return schedule.rescaled(num_tokens, prefix)
    if schedule.num_tokens not in (None, num_tokens):
        raise UserError(
            f"the schedule is for {schedule.num_tokens} tokens, and {num_tokens} enter {name} at this image size; add "
            "--rescale to keep the same shares of its patches, or choose another --img-size or schedule"
        )
    return schedule


def method_of(schedule: CompressionSchedule, args: argparse.Namespace, model: nn.Module) -> DiffRate:
    """DiffRate as the schedule says; if it says nothing, as the options say or as published for the family."""
    from tokcomp import DiffRate
    from tokcomp.adapters import find_adapter
    from tokcomp.methods.diffrate import published_settings

    carried = schedule.method or {}
    given = {"metric": args.metric, "pipeline": getattr(args, "pipeline", None)}
    for name, value in given.items():
        if value is not None and name in carried and value != carried[name]:
            raise UserError(
                f"--{name} must be {carried[name]}, which the schedule was made with, got {value}; leave --{name} out, "
                'or remove "method" from the schedule\'s file'
            )
    usual = published_settings(find_adapter(model).geometry(model))
    steps = [step for step in ("prune", "merge") if getattr(schedule, f"num_{step}_kept") is not None]
    defaults: dict[str, Any] = {
        "metric": usual.metric,
        "pipeline": "_".join(steps),
        "similarity_weighted_size": usual.similarity_weighted_size,
    }
    chosen = {name: given.get(name) or value for name, value in defaults.items() if name not in carried}
    with blame("--pipeline" if given["pipeline"] else "the schedule"):
        return DiffRate(schedule, **chosen)
