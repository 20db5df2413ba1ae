"""What the commands that train share: the recipe's options, the processes, stopping and going on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, blame, check_output_folder

if TYPE_CHECKING:
    import torch

    from tokcomp.runs.distributed import World
    from tokcomp.runs.recipe import Recipe
    from tokcomp.runs.steps import StopRequest


class Run(Protocol):
    """A training run whose checkpoint is in its output folder."""

    total_steps: int

    @property
    def step_number(self) -> int: ...

    def train(self, stop: StopRequest, *, resumed: bool = False) -> bool: ...


def add_seed_option(group: Any) -> None:
    group.add_argument("--seed", type=options.non_negative_int, default=0, metavar="N", help="default: %(default)s")


def add_accumulation_option(group: Any, more: str = "") -> None:
    group.add_argument(
        "--grad-accum-steps",
        type=options.positive_int,
        default=1,
        metavar="N",
        help=f"compute a process's part of the batch in N pieces{more} (default: %(default)s)",
    )


def add_output_option(group: Any, default: str) -> None:
    group.add_argument("-o", "--output", type=Path, default=Path(default), metavar="DIR", help="default: %(default)s")


def refuse_for_digits(args: argparse.Namespace, given: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Refuse augmentation of the digits, which are drawn anew each time."""
    for field in fields:
        if args.dataset == "digits" and field in given:
            flag = "--" + field.replace("_", "-")
            raise UserError(f"{flag} has no say with --dataset digits, which are drawn anew each time; leave it out")


def changed_recipe(base: Recipe, given: Mapping[str, Any]) -> Recipe:
    """A recipe with the fields that the user gave."""
    given = {**given}
    if given.get("aa") in ("none", "None", ""):
        given["aa"] = None
    with blame("recipe"):
        recipe = replace(base, **given)
    if recipe.min_lr > recipe.lr:
        raise UserError(f"--min-lr must not be above --lr, got {recipe.min_lr:g} and {recipe.lr:g}")
    return recipe


def lower_min_lr(base: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, with a lowest rate that suits an ``lr`` below the recipe's own lowest."""
    if given.get("lr", base.lr) < base.min_lr:
        return {"min_lr": given["lr"] / 100, **given}
    return {**given}


def check_new_run(args: argparse.Namespace, *more: str) -> None:
    """Refuse a folder that cannot be written, or that holds a run where none is to be resumed."""
    from tokcomp.runs.loop import Run, check_free

    check_output_folder("--output", args.output)
    if not args.resume:
        with blame("--output"):
            check_free(args.output, (*Run.traces, *more))


def among_processes(args: argparse.Namespace, work: Callable[[torch.device, World], int]) -> int:
    """``work`` on this process's device, among the processes that torchrun started."""
    from tokcomp.runs.distributed import join, leave, local_device

    device = local_device(options.chosen_device(args.device))
    try:
        world = join(device)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    try:
        return work(device, world)
    finally:
        leave()


def train_to_end(
    args: argparse.Namespace, found: Run, world: World, report: Callable[[], None], *, command: str
) -> int:
    """Resume where asked, train, and say how it ended: the exit status."""
    from tokcomp.runs.checkpoint import CheckpointError
    from tokcomp.runs.steps import DivergedError, StopRequest

    with StopRequest() as stop:
        try:
            finished = found.train(stop, resumed=args.resume)
        except DivergedError as error:
            if world.is_main:
                print(f"tokcomp {command}: error: {error}", file=sys.stderr)
            return 1
        except CheckpointError as error:
            raise UserError(f"--resume: {error}") from error
        except OSError as error:
            raise UserError(
                f"--output must be writable, got '{args.output}' ({error}); choose another folder"
            ) from error
    if world.is_main and finished:
        report()
    elif world.is_main:
        print(
            f"stopped after step {found.step_number} of {found.total_steps}; the same command with --resume goes on "
            "from there",
            file=sys.stderr,
        )
    return 0 if finished else stop.exit_status or 1
