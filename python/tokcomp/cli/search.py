"""tokcomp search."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options, training
from tokcomp.cli.budgets import add_budget_options, build_targets, check_budget_options
from tokcomp.cli.data import add_data_options, data_config, data_root, open_data
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.refine import add_refine_options, refine_run
from tokcomp.cli.search_report import report
from tokcomp.cli.training import Job
from tokcomp.runs.recipe import SEARCH_RECIPE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from tokcomp.budgets import Budget
    from tokcomp.runs.steps import StopRequest
    from tokcomp.search.run import SearchRun
    from tokcomp.search.settings import SearchSettings

DESCRIPTION = """\
Find how many tokens each block of a model should prune and merge, for a budget: the search of the DiffRate paper. The
model is frozen and not changed; the result is a schedule, which 'tokcomp evaluate --method diffrate --schedule FILE' or
tokcomp.compress then applies to it.

DATA is a folder that contains 'train' with one sub-folder per class, or --dataset names any of timm's data sets that
allows random access. 1,000 images are enough (--images 1000): a search learns only a few hundred numbers. Some training
images are held out to monitor the accuracy of the current schedule with its tokens really dropped.

The defaults are the paper's recipe. Ctrl-C and SIGTERM stop the search after its current step, and --resume continues
as if it had never stopped: to the same schedule, bit for bit on a CPU.
"""

EXAMPLES = """\
examples:
  tokcomp search --dataset digits -m tokcomp_digits_vit --pretrained --target-gflops 0.0105 -b 64 --steps 300 -o digits
      the bundled model on the bundled digits, no download
  tokcomp search --model deit_small_patch16_224 --pretrained --data /data/imagenet --target-gflops 2.9 --amp
      the paper's search, in mixed precision (bfloat16)
  tokcomp search /data/imagenet -m deit_small_patch16_224 --pretrained --images 1000 --target-gflops 2.3 2.5 2.9
      three schedules from one pass over the data, with 1,000 images
  torchrun --nproc-per-node 8 -m tokcomp search /data/imagenet -m deit_base_patch16_224 --pretrained --target-gflops 8.7
      on 8 GPUs, each with an eighth of every batch
  tokcomp search /data/imagenet -m deit_small_patch16_224 --pretrained --target-gflops 2.3 --refine
      then moves counts by the loss with tokens really dropped; never worse than ToMe, EViT and others at that cost
  tokcomp search ... -o run --resume
      continue a run that was stopped, with all other options unchanged
"""

#: Fields of the recipe that have an option.
RECIPE_FIELDS = (
    *("epochs", "opt", "lr", "min_lr", "sched", "weight_decay", "clip_grad", "aa", "hflip", "color_jitter"),
    *("train_interpolation", "reprob", "smoothing", "mixup", "cutmix", "drop_path"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tokcomp search DATA [-m NAME] --target-gflops G [-o DIR] [options]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    _add_data_options(parser)
    options.add_model_options(parser, default="deit_small_patch16_224")
    add_budget_options(parser)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--granularity",
        type=options.positive_int,
        default=4,
        metavar="N",
        help="step between the candidate numbers of tokens to keep (default: %(default)s, as published)",
    )
    search.add_argument(
        "--metric",
        choices=("cls_attn", "image_attn", "cls_attn_v", "random"),
        help="what ranks the tokens (default: cls_attn; image_attn without a class token)",
    )
    search.add_argument(
        "--pipeline",
        choices=("prune_merge", "merge_prune", "prune", "merge"),
        help="which steps, in which order (default: prune_merge; merge for CAFormers)",
    )
    search.add_argument(
        "--match-inference",
        action="store_true",
        help="weight a merged token's size in the search as the compressed model does",
    )
    search.add_argument(
        "--budget-warmup-epochs",
        type=options.non_negative_float,
        default=0.0,
        metavar="X",
        help="epochs at the start that ignore the budget (default: %(default)s)",
    )
    add_refine_options(parser.add_argument_group("second stage, not in the paper"), switch=True)
    recipe = parser.add_argument_group(
        "recipe (defaults are the paper's, its Table 5; names and meanings as in timm's scripts)"
    )
    recipe.add_argument(
        "--steps", type=options.positive_int, metavar="N", help="length of the search, instead of --epochs"
    )
    says = {"weight_decay": "weight decay of the learnt logits"}
    training.add_recipe_options(recipe, RECIPE_FIELDS, SEARCH_RECIPE, says=says)
    training.add_speed_options(parser, checkpointing=False)
    intervals = {"checkpoint": (50, "checkpoints"), "log": (10, "rows of the log")}
    output = training.add_output_options(parser, "tokcomp-search", **intervals)
    output.add_argument(
        "--eval-interval",
        type=options.non_negative_int,
        metavar="N",
        help="steps between accuracy checks (default: ten over the search; 0: only at its end)",
    )
    output.add_argument("--json", action="store_true", help="print the summary as JSON rather than as a table")


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = add_data_options(parser, batch_size=1024, batch_help="images in a step, over all processes; ")
    data.add_argument(
        "--train-split",
        default="train",
        metavar="NAME",
        help="part of the data set to search on (default: %(default)s)",
    )
    data.add_argument(
        "--images",
        type=options.positive_int,
        metavar="N",
        help="search on N of the images, spread over the classes; an epoch keeps its number of steps",
    )
    data.add_argument(
        "--held-out",
        type=options.non_negative_int,
        metavar="N",
        help="training images held out to monitor the accuracy (default: a tenth of them, at most 1000)",
    )
    data.add_argument("--val-data", type=Path, metavar="DIR", help="monitor the accuracy on this data set instead")
    data.add_argument(
        "--val-split", metavar="NAME", help="monitor it on this part of the data set instead, such as validation"
    )


def run(args: argparse.Namespace) -> int:
    from tokcomp.search.folder import TRACES

    check_budget_options(args)
    root = data_root(args)
    if args.val_data is not None and not args.val_data.exists():
        raise UserError(
            f"--val-data must be a folder or archive of images, got '{args.val_data}', which does not exist"
        )
    settings = _settings(args)

    def then(job: Job, run: SearchRun, stop: StopRequest) -> bool:
        return args.refine is None or refine_run(job, run, stop, _calibration(job, root, run))

    return training.train(
        args, lambda job: _prepare(job, settings, root), lambda run: report(args, run), traces=TRACES, then=then
    )


def _calibration(job: Job, root: Path | None, run: SearchRun) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """Starts a pass over the images that judge a refinement: of those that are searched on, as in evaluation."""
    from tokcomp.runs.data import Part, spread_sample
    from tokcomp.runs.recipe import plain_transform

    config = data_config(job.args, run.model)
    dataset, indices, _, _ = _parts(job.args, root, int(run.model.num_classes), config)  # type: ignore[arg-type]
    part = Part(dataset, indices)
    chosen = [indices[place] for place in spread_sample(part, job.args.refine_images, job.args.seed)]
    return job.held_out(Part(dataset, chosen, plain_transform(config)))


def _settings(args: argparse.Namespace) -> SearchSettings:
    from tokcomp.search.settings import SearchSettings

    if args.steps is not None and args.epochs is not None:
        raise UserError("--steps and --epochs both set the length of the search, got both; keep one")
    return SearchSettings(
        recipe=training.read_recipe(args, SEARCH_RECIPE),
        steps=args.steps,
        granularity=args.granularity,
        metric=args.metric,
        pipeline=args.pipeline,
        match_inference=args.match_inference,
        seed=args.seed,
        budget_warmup_epochs=args.budget_warmup_epochs,
        amp=args.amp,
        log_interval=args.log_interval,
        eval_interval=args.eval_interval,
        checkpoint_interval=args.checkpoint_interval,
    )


def _prepare(job: Job, settings: SearchSettings, root: Path | None) -> SearchRun:
    """Whatever can be refused is refused before the first step, with nothing written."""
    from tokcomp import UnsupportedModelError
    from tokcomp.data import num_images
    from tokcomp.runs.data import training_part
    from tokcomp.search.model import DiffRateSearch
    from tokcomp.search.run import SearchRun

    args = job.args
    job.begin(mixes=settings.recipe.mixes)
    model = options.build_model(args, drop_path_rate=settings.recipe.drop_path).to(job.device)
    config = data_config(args, model)
    try:
        DiffRateSearch(model, args.granularity, metric=args.metric, pipeline=args.pipeline)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    except ValueError as error:
        raise UserError(f"the search does not fit {args.model}: {error}") from error
    dataset, indices, watched, epoch_images = _parts(args, root, model.num_classes, config)
    with blame("--aa"):
        images = training_part(dataset, indices, settings.recipe, config)
    facts = {
        "model": args.model,
        "model_settings": model_settings(args),
        "weights": options.describe_weights(args),
        "data": args.dataset or str(root),
        "img_size": config["input_size"][-1],
        "held_out_images": 0 if watched is None else num_images(watched),
    }
    if job.world.is_main and facts["weights"] == "random weights":
        print(
            "note: the weights are random, so the schedule will mean nothing; pass --pretrained or --checkpoint",
            file=sys.stderr,
        )
    targets = _targets(job, model)
    try:
        return SearchRun(
            model,
            job.batches(images, epoch_images=epoch_images),
            targets,
            settings,
            held_out=None if watched is None else job.held_out(watched),
            output=args.output,
            facts=facts,
            command=_command(),
            world=job.world,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _targets(job: Job, model: nn.Module) -> dict[str, list[Budget]]:
    """The budgets of each target; a latency may have to be measured first, which a signal stops."""
    from tokcomp.budgets import MeasurementStopped
    from tokcomp.runs.steps import StopRequest

    targets = None
    with StopRequest() as stop, suppress(MeasurementStopped):
        try:
            targets = build_targets(job.args, model, job.device, job.world, lambda: stop.wanted)
        except OSError as error:
            raise UserError(
                f"--output must be writable, got '{job.args.output}' ({error}); choose another folder"
            ) from error
    if targets is None or stop.wanted:
        if job.world.is_main:
            print("stopped while the latency was being measured; nothing was written", file=sys.stderr)
        raise SystemExit(stop.exit_status or 1)
    return targets


def _parts(
    args: argparse.Namespace, root: Path | None, num_classes: int, config: dict[str, Any]
) -> tuple[Dataset[Any], list[int], Dataset[Any] | None, int]:
    """The data set, the images to search on, the images to monitor accuracy on, and the number of images in an
    epoch."""
    from tokcomp.data import num_images
    from tokcomp.runs.data import Part, check_labels, split_off, spread_sample
    from tokcomp.runs.recipe import plain_transform

    dataset = open_data(args, root, args.train_split)
    where = f"--dataset {args.dataset}" if args.dataset else f"DATA '{root}'"
    with blame(where):
        check_labels(dataset, num_classes)
    total = num_images(dataset)
    other = args.val_data is not None or args.val_split is not None
    if other and args.held_out:
        raise UserError("--held-out and --val-data or --val-split both say where to take the accuracy; keep one")
    digits = args.dataset == "digits"
    watched: Dataset[Any] | None = None
    indices = list(range(total))
    if other or (digits and args.held_out is None):
        watched = open_data(args, args.val_data or root, args.val_split or "validation")
        with blame("--val-data" if args.val_data is not None else "--val-split"):
            check_labels(watched, num_classes)
        watched = Part(watched, None, plain_transform(config))
    else:
        count = min(1000, total // 10) if args.held_out is None else args.held_out
        if count >= total:
            raise UserError(f"--held-out must leave images to search on, got {count} of {total}")
        if count > 0:
            indices, held_out = split_off(dataset, count, args.seed)
            watched = Part(dataset, held_out, plain_transform(config))
    epoch_images = len(indices)
    if args.images is not None:
        if args.images > len(indices):
            raise UserError(
                f"--images must be at most the {len(indices)} images there are to search on, got {args.images}"
            )
        chosen = spread_sample(Part(dataset, indices), args.images, args.seed)
        indices = [indices[index] for index in chosen]
    return dataset, indices, watched, epoch_images


def _command() -> str:
    """The command line that produces this schedule in one run."""
    return shlex.join(["tokcomp", *(word for word in sys.argv[1:] if word != "--resume")])
