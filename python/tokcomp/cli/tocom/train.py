"""tokcomp tocom train."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tokcomp.cli import options, training
from tokcomp.cli.data import add_data_options, data_config, data_root, open_data
from tokcomp.cli.degrees import add_degree_options, add_plugin_shape, build_degrees
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.training import Job
from tokcomp.runs.recipe import TOCOM_RECIPE, Recipe
from tokcomp.tocom.variants import ARITHMETICS, LOSSES, STEPS

if TYPE_CHECKING:
    from tokcomp.tocom.train import TocomRun

DESCRIPTION = """\
Train a plugin on a frozen, pre-trained model, on the data that it was pre-trained with. In each step the teacher is
the model at one random degree, the student the model at another with the plugin between the two applied; the plugin
learns to make their answers agree (their features, if the model has no classifier). Labels are not used, except by
--loss labels.

DATA is a folder that contains 'train' with one sub-folder per class, or --dataset names any of timm's data sets that
allows random access. The defaults are the paper's recipe. Ctrl-C and SIGTERM stop the run after its current step, and
--resume continues as if it had never stopped: to the same plugin, bit for bit on a CPU.
"""

EXAMPLES = """\
examples:
  tokcomp tocom train --dataset digits -m tokcomp_digits_vit --pretrained --max-degree 12 -b 64 --epochs 5 \\
      --mixup 0 --cutmix 0 -o digits-plugin
      the bundled model on the bundled digits, no download
  tokcomp tocom train /data/imagenet -m deit_base_patch16_224 --pretrained -o plugin
      the paper's plugin for DeiT-B and ToMe; on a GPU in mixed precision (bfloat16) unless --no-amp is given
  torchrun --nproc-per-node 8 -m tokcomp tocom train /data/imagenet -m vit_base_patch16_224.mae --pretrained
      on 8 GPUs, using the features of a backbone without a classifier
  tokcomp tocom train ... --method diffrate --schedules dear.json middle.json cheap.json -o plugin
      between DiffRate schedules
  tokcomp tocom train ... --arithmetic shared; ... --arithmetic two_way; ... --loss labels; ... --rank 4; ... --scale 1
      the ablations of the paper's Table 5
"""

#: Fields of the recipe that have an option.
RECIPE_FIELDS = (
    *("epochs", "opt", "lr", "min_lr", "sched", "warmup_epochs", "weight_decay", "clip_grad", "aa", "hflip"),
    *("color_jitter", "reprob", "repeated_aug", "mixup", "cutmix", "smoothing", "drop_path"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=1024, batch_help="images in a step, over all processes; ")
    data.add_argument("--train-split", default="train", help="part of the data set to train on (default: %(default)s)")
    options.add_model_options(parser, default="deit_base_patch16_224")
    add_degree_options(parser)
    plugin = parser.add_argument_group("plugin")
    plugin.add_argument(
        "--max-degree",
        type=options.positive_int,
        metavar="D",
        help="degrees are 0 to D (default: 16, or the number of --schedules)",
    )
    add_plugin_shape(plugin)
    plugin.add_argument(
        "--arithmetic",
        choices=tuple(ARITHMETICS),
        default=STEPS,
        help="; ".join(f"{name}: {text}" for name, text in ARITHMETICS.items()) + " (default: %(default)s)",
    )
    plugin.add_argument(
        "--loss",
        choices=LOSSES,
        default=LOSSES[0],
        help="what the student answers to: the teacher (distillation), or the classes of the images by cross entropy "
        "(labels) (default: %(default)s)",
    )
    recipe = parser.add_argument_group("recipe")
    says = {"weight_decay": "weight decay of the plugin's matrices"}
    says |= {"smoothing": "label smoothing, with --loss labels"}
    says |= {"drop_path": "stochastic depth: probability of dropping the branches of the student's last block"}
    training.add_recipe_options(recipe, RECIPE_FIELDS, TOCOM_RECIPE, says=says)
    training.add_speed_options(parser, amp_on_gpu=True)
    intervals = {"checkpoint": (500, "checkpoints"), "log": (50, "rows of the log")}
    training.add_output_options(parser, "tokcomp-tocom", **intervals)


def run(args: argparse.Namespace) -> int:
    if not (args.pretrained or args.checkpoint):
        raise UserError("training a plugin needs a trained model, got none; pass --pretrained or --checkpoint FILE")
    recipe, root = training.read_recipe(args, TOCOM_RECIPE), data_root(args)
    return training.train(args, lambda job: _prepare(job, recipe, root), lambda run: _report(args, run))


def _report(args: argparse.Namespace, found: TocomRun) -> None:
    from tokcomp.tocom.train import PLUGIN

    summary = found.summary()
    print(f"{summary['model']} ({summary['weights']}), {args.method}, degrees 0 to {found.trainee.degrees[-1]}")
    print(f"loss {summary['loss']:.4g} after {summary['steps']} steps", end="")
    print(f", {summary['images_per_second']:.1f} images/s" if summary["images_per_second"] else "")
    print(f"written: {args.output / PLUGIN}")


def _prepare(job: Job, recipe: Recipe, root: Path | None) -> TocomRun:
    """Whatever can be refused is refused here, with nothing written."""
    from torch.utils.data import IterableDataset

    import tokcomp
    from tokcomp.data import num_images
    from tokcomp.runs.data import check_labels, training_part
    from tokcomp.tocom.distill import Distiller
    from tokcomp.tocom.train import TocomRun

    args = job.args
    job.begin(mixes=recipe.mixes)
    model = options.build_model(args, drop_path_rate=recipe.drop_path)
    try:
        method_at, highest = build_degrees(args, model)
        if highest is not None and args.max_degree not in (None, highest):
            raise UserError(f"--max-degree must be the number of --schedules, {highest}, got {args.max_degree}")
        plugin = tokcomp.ToCom(model, args.rank, highest or args.max_degree or 16, args.arithmetic)
    except tokcomp.UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    plugin.method = args.method
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    dataset = open_data(args, root, args.train_split)
    if isinstance(dataset, IterableDataset) or not num_images(dataset):
        raise UserError(
            "DATA must hold images and allow random access, got a stream or nothing; use a folder of images, "
            "torch/... or hfds/..."
        )
    if args.loss == "labels" and model.num_classes:
        with blame("DATA" if root is not None else "--dataset"):
            check_labels(dataset, model.num_classes)
    config = data_config(args, model)
    with blame("--aa"):
        part = training_part(dataset, None, recipe, config)
    batches = job.batches(part, repeats=recipe.repeated_aug)
    total_steps = max(1, round(recipe.epochs * batches.steps_per_epoch))
    try:
        distiller = Distiller(
            model,
            plugin,
            method_at,
            recipe,
            total_steps=total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            scale=args.scale,
            loss=args.loss,
            **job.place,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model '{args.model}', --method {args.method}: {error}") from error
    methods = [repr(distiller.method(degree)) for degree in (0, distiller.degrees[-1])]
    facts = {
        "model": args.model,
        "num_classes": model.num_classes,
        "weights": options.describe_weights(args),
        "method": args.method,
        **training.versions(),
    }
    settings = {
        "model": args.model,
        "model_settings": model_settings(args),
        "method": args.method,
        "first_and_last_degree": methods,
        "max_degree": plugin.max_degree,
        "rank": plugin.rank,
        "scale": args.scale,
        "arithmetic": plugin.arithmetic,
        "loss": args.loss,
        "img_size": config["input_size"][-1],
        **job.settings(recipe, data=args.dataset or str(root), train_images=len(part)),
    }
    return TocomRun(
        distiller,
        batches,
        args.output,
        settings=settings,
        facts=facts,
        total_steps=total_steps,
        **job.intervals,
    )
