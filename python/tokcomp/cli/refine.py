"""--refine: the second stage of a search, for ``tokcomp search`` and ``tokcomp compare``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import blame

if TYPE_CHECKING:
    from torch import Tensor

    from tokcomp.cli.training import Job
    from tokcomp.refine import RefineResult, RefineSettings
    from tokcomp.runs.steps import StopRequest
    from tokcomp.search.run import SearchRun
    from tokcomp.search.target import Target

#: Candidates that --refine without a number tries.
CANDIDATES = 200


def add_refine_options(group: Any, *, switch: bool) -> None:
    """The options; ``switch``: --refine itself turns the stage on, and otherwise only says how long it is."""
    if switch:
        group.add_argument(
            "--refine",
            type=options.positive_int,
            nargs="?",
            const=CANDIDATES,
            metavar="N",
            help="then move counts between blocks, and between pruning and merging, by the loss with tokens really "
            f"dropped, trying N candidates (default of N: {CANDIDATES}); never worse on the images of the refinement "
            "than the searched schedule, ToMe, EViT, uniform and rescaled published ones at the same cost",
        )
    else:
        group.add_argument(
            "--refine-candidates",
            dest="refine",
            type=options.positive_int,
            default=CANDIDATES,
            metavar="N",
            help="candidates that refine tries (default: %(default)s)",
        )
    group.add_argument(
        "--refine-images",
        type=options.positive_int,
        default=400,
        metavar="N",
        help="training images that judge the candidates of the refinement, as in evaluation (default: %(default)s)",
    )
    group.add_argument(
        "--refine-loss",
        choices=("labels", "answers"),
        default="labels",
        help="cross entropy against the labels, or against the uncompressed model's answers (default: %(default)s)",
    )


def refine_settings(args: argparse.Namespace, seed: int) -> RefineSettings:
    from tokcomp.refine import RefineSettings

    return RefineSettings(args.refine, seed, args.refine_loss)


def refine_run(
    job: Job, run: SearchRun, stop: StopRequest, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
) -> bool:
    """Refine every target of a finished search; returns whether all were. Writes ``refined.json`` into its folder."""
    return all([_refine_target(job, run, target, stop, batches) for target in run.targets])


def _refine_target(
    job: Job,
    run: SearchRun,
    target: Target,
    stop: StopRequest,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> bool:
    import torch

    from tokcomp.api import compress, restore
    from tokcomp.cost import TokenCounts
    from tokcomp.equal_cost import Ruler, fit
    from tokcomp.refine import Refinement, starts_for

    args, folder = job.args, run.folder
    assert folder is not None

    def share(counts: TokenCounts) -> float:
        """The largest of the budgets' costs, as a share of its target."""
        device = next(run.model.parameters()).device
        moved = TokenCounts(counts.num_in.to(device), counts.num_out.to(device))
        return max(float(budget.cost(moved)) / budget.target for budget in target.budgets)

    with torch.no_grad():
        ruler = Ruler(run.model, share)
        searched = fit(ruler, target.search.method(), 1.0)
        starts = starts_for(run.model, args.model, ruler, 1.0, {"search": searched})
        with blame("--refine"):
            refinement = Refinement(
                run.model.eval(),
                batches(),
                ruler,
                1.0,
                starts,
                refine_settings(args, args.seed),
                state=folder.file("refine-state", target.name, ".json"),
                facts={"search": run.settings, "images": args.refine_images},
                amp_dtype=torch.bfloat16 if args.amp else None,
                world=job.world,
                note=noting(job.world.is_main, f"refine {target.name}".rstrip(), args.refine),
            )
        found = refinement.run(stop)
    if not found.complete:
        if job.world.is_main:
            print(
                f"stopped after {found.tried} of {args.refine} candidates; --resume continues from there",
                file=sys.stderr,
            )
        return False
    try:
        compress(run.model, found.method)
        top1 = run.accuracy_now() if run.held_out is not None else None
    finally:
        restore(run.model)
    if job.world.is_main:
        provenance = {
            "source": "tokcomp search --refine",
            **described(found),
            "gflops": ruler.flops(found.method) / 1e9,
            "top1": top1,
            "settings": {name: value for name, value in run.settings.items() if name != "targets"},
            "command": folder.command,
        }
        replace(found.schedule, provenance=json.loads(json.dumps(provenance))).save(folder.refined(target.name))
    return True


def described(found: RefineResult) -> dict[str, Any]:
    """What a refinement found and what it took, as JSON data."""
    return {
        "loss": found.loss,
        "starts": found.starts,
        "candidates": found.tried,
        "images_run": found.images,
        "seconds": round(found.seconds, 1),
    }


def noting(show: bool, label: str, total: int) -> Callable[[int, str], None] | None:
    """Prints each improvement."""
    if not show:
        return None
    return lambda step, text: print(f"{label} candidate {step}/{total}: {text}", file=sys.stderr, flush=True)
