"""Options that say what a search must keep to, and the budgets they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, blame

if TYPE_CHECKING:
    import torch

    from tokcomp.budgets import Budget
    from tokcomp.train.distributed import World


def add_budget_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("budgets (at least one; several are summed)")
    group.add_argument(
        "--target-gflops",
        type=options.positive_float,
        nargs="+",
        metavar="G",
        help="1e9 multiply-adds an image; with several, one schedule each, from one pass over the data",
    )
    group.add_argument(
        "--flops-weight",
        type=options.non_negative_float,
        metavar="X",
        help="weight of its loss, (F - T)^2 in GFLOPs (default: 5, as in the paper; more for models below 1 GFLOPs)",
    )


def check_budget_options(args: argparse.Namespace) -> None:
    """Refuse what is wrong whatever the model."""
    if args.target_gflops is None:
        raise UserError("a search needs a budget, got none; pass --target-gflops G")
    names = [f"{target:g}" for target in args.target_gflops]
    if len(set(names)) < len(names):
        raise UserError(f"--target-gflops must name each target once, got {' '.join(names)}")


def build_targets(args: argparse.Namespace, model: Any, device: torch.device, world: World) -> dict[str, list[Budget]]:
    """Target's name -> its budgets. A single target has the name ""."""
    from tokcomp import flops
    from tokcomp.budgets import FlopsBudget
    from tokcomp.search.settings import flops_weight

    weight = flops_weight(flops(model) / 1e9) if args.flops_weight is None else args.flops_weight
    targets: dict[str, list[Budget]] = {}
    for target in args.target_gflops:
        with blame("--target-gflops"):
            budget = FlopsBudget(model, target, weight, granularity=args.granularity)
        targets[f"{target:g}" if len(args.target_gflops) > 1 else ""] = [budget]
    return targets
