"""tokcomp tocom train."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options, training
from tokcomp.cli.data import add_data_options, data_root, open_data
from tokcomp.cli.degrees import add_degree_options, build_degrees
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.model_arguments import model_settings

if TYPE_CHECKING:
    import torch

    from tokcomp.runs.distributed import World
    from tokcomp.runs.recipe import Recipe
    from tokcomp.tocom.train import TocomRun

DESCRIPTION = """\
Train a plugin on a frozen, pre-trained model, on the data that it was pre-trained with. In each step the teacher is
the model at one random degree, the student the model at another with the plugin between the two applied; the plugin
learns to make their answers agree (of models without a classifier, their features). Labels are not looked at.

DATA is a folder with 'train' in it, one sub-folder per class, or --dataset names any data set of timm's that gives an
image by its number. The defaults are the paper's recipe. Ctrl-C and SIGTERM stop the run after its step, and --resume
goes on as if nothing had happened: to the same plugin, bit for bit on a CPU.
"""

EXAMPLES = """\
examples:
  tokcomp tocom train --dataset digits -m tokcomp_digits_vit --pretrained --max-degree 12 -b 64 --epochs 5 \\
      --mixup 0 --cutmix 0 -o digits-plugin
      the bundled model on the bundled digits, no download
  tokcomp tocom train /data/imagenet -m deit_base_patch16_224 --pretrained -o plugin
      the paper's plugin for DeiT-B and ToMe; on a GPU in mixed precision (bfloat16), unless --no-amp
  torchrun --nproc-per-node 8 -m tokcomp tocom train /data/imagenet -m vit_base_patch16_224.mae --pretrained
      on 8 GPUs, by the features of a backbone without a classifier
  tokcomp tocom train ... --method diffrate --schedules dear.json middle.json cheap.json -o plugin
      between DiffRate schedules
"""

#: field of the recipe -> (what parses it, what it says, its default); the options' names are timm's.
RECIPE_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "epochs": (options.positive_float, "passes over the training images", "10"),
    "opt": (str, "optimizer", "adamw"),
    "lr": (options.positive_float, "highest learning rate", "0.001"),
    "min_lr": (options.non_negative_float, "the last step's learning rate", "1e-05"),
    "sched": (str, "learning rate scheduler", "cosine"),
    "warmup_epochs": (options.non_negative_float, "epochs in which the rate rises", "0.0"),
    "weight_decay": (options.non_negative_float, "decay of the plugin's matrices", "0.05"),
    "clip_grad": (options.positive_float, "largest norm of the gradient", "None"),
    "aa": (str, "augmentation policy, or none", "rand-m9-mstd0.5-inc1"),
    "hflip": (options.non_negative_float, "probability of a horizontal flip", "0.5"),
    "color_jitter": (options.non_negative_float, "where --aa is none", "0.3"),
    "reprob": (options.non_negative_float, "probability of random erasing", "0.25"),
    "repeated_aug": (options.positive_int, "copies of an image, each augmented by itself", "3"),
    "mixup": (options.non_negative_float, "alpha of mixup", "0.8"),
    "cutmix": (options.non_negative_float, "alpha of cutmix", "1.0"),
    "drop_path": (options.non_negative_float, "stochastic depth of the student's last block", "0.1"),
}
_FLAGS = {"repeated_aug": "--aug-repeats"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=1024, batch_help="images in a step, over all processes; ")
    data.add_argument("--train-split", default="train", help="part to train on (default: %(default)s)")
    options.add_model_options(parser, default="deit_base_patch16_224")
    add_degree_options(parser)
    plugin = parser.add_argument_group("plugin")
    plugin.add_argument(
        "--max-degree",
        type=options.positive_int,
        metavar="D",
        help="degrees are 0 to D (default: 16, or the schedules)",
    )
    plugin.add_argument(
        "--rank", type=options.positive_int, default=2, metavar="H", help="of one step (default: %(default)s)"
    )
    plugin.add_argument(
        "--scale",
        type=options.positive_float,
        default=0.1,
        metavar="S",
        help="factor on the plugin (default: %(default)s)",
    )
    recipe = parser.add_argument_group("recipe")
    for field, (kind, text, default) in RECIPE_OPTIONS.items():
        flag = _FLAGS.get(field, "--" + field.replace("_", "-"))
        recipe.add_argument(flag, type=kind, dest=field, metavar="X", help=f"{text} (default: {default})")
    training.add_seed_option(recipe)
    speed = parser.add_argument_group("precision, speed and memory")
    speed.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="automatic mixed precision in bfloat16 (default: on a GPU)",
    )
    speed.add_argument("--grad-checkpointing", action="store_true", help="recompute each block in the backward pass")
    training.add_accumulation_option(speed)
    output = parser.add_argument_group("output")
    training.add_output_option(output, "tokcomp-tocom")
    output.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    for name, steps, text in (
        ("--checkpoint-interval", 500, "steps between checkpoints"),
        ("--log-interval", 50, "steps between rows of the log"),
    ):
        output.add_argument(
            name, type=options.positive_int, default=steps, metavar="N", help=f"{text} (default: %(default)s)"
        )


def run(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    root = data_root(args)
    training.check_new_run(args)

    def work(device: torch.device, world: World) -> int:
        found = _prepare(args, recipe, root, device, world)
        return training.train_to_end(args, found, world, lambda: _report(args, found), command="tocom")

    return training.among_processes(args, work)


def _report(args: argparse.Namespace, found: TocomRun) -> None:
    from tokcomp.tocom.train import PLUGIN

    summary = found.summary()
    print(f"{summary['model']} ({summary['weights']}), {args.method}, degrees 0 to {found.distiller.degrees[-1]}")
    print(f"loss {summary['loss']:.4g} after {summary['steps']} steps", end="")
    print(f", {summary['images_per_second']:.1f} images/s" if summary["images_per_second"] else "")
    print(f"written: {args.output / PLUGIN}")


def _recipe(args: argparse.Namespace) -> Recipe:
    from tokcomp.runs.recipe import TOCOM_RECIPE

    if not (args.pretrained or args.checkpoint):
        raise UserError("a plugin is trained on a trained model, got none; pass --pretrained or --checkpoint FILE")
    fields = ["batch_size", *RECIPE_OPTIONS]
    given = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    return training.changed_recipe(TOCOM_RECIPE, training.lower_min_lr(TOCOM_RECIPE, given))


def _mixed_precision(args: argparse.Namespace, device: torch.device) -> bool:
    amp: bool | None = args.amp
    return device.type == "cuda" if amp is None else amp


def _prepare(
    args: argparse.Namespace, recipe: Recipe, root: Path | None, device: torch.device, world: World
) -> TocomRun:
    """Everything that can be refused is refused here, with nothing written."""
    import timm
    import torch
    from timm.data import resolve_model_data_config
    from torch.utils.data import IterableDataset

    import tokcomp
    from tokcomp.data import num_images
    from tokcomp.runs.batches import LoaderBatches, check_batch_size
    from tokcomp.runs.data import training_part
    from tokcomp.runs.steps import seed_all
    from tokcomp.tocom.distill import Distiller
    from tokcomp.tocom.train import TocomRun

    pieces, amp = args.grad_accum_steps, _mixed_precision(args, device)
    with blame("--batch-size"):
        check_batch_size(args.batch_size, world.size, pieces, mixes=recipe.mixes)
    seed_all(args.seed)
    model = options.build_model(args, drop_path_rate=recipe.drop_path)
    try:
        method_at, highest = build_degrees(args, model)
        if highest is not None and args.max_degree not in (None, highest):
            raise UserError(f"--max-degree must be the number of --schedules, {highest}, got {args.max_degree}")
        plugin = tokcomp.ToCom(model, args.rank, highest or args.max_degree or 16)
    except tokcomp.UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    plugin.method = args.method
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    dataset = open_data(args, root, args.train_split)
    if isinstance(dataset, IterableDataset) or not num_images(dataset):
        raise UserError(
            "DATA must hold images and give any by its number, got a stream or nothing; use a folder of images, "
            "torch/... or hfds/..."
        )
    config = resolve_model_data_config(model)
    if args.img_size is not None:
        config["input_size"] = (config["input_size"][0], args.img_size, args.img_size)
    with blame("--aa"):
        part = training_part(dataset, None, recipe, config)
    batches = LoaderBatches(
        part,
        args.batch_size,
        args.seed,
        world=world,
        pieces=pieces,
        repeats=recipe.repeated_aug,
        workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    total_steps = max(1, round(recipe.epochs * batches.steps_per_epoch))
    try:
        distiller = Distiller(
            model,
            plugin,
            method_at,
            recipe,
            total_steps=total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            device=device,
            scale=args.scale,
            seed=args.seed,
            world=world,
            pieces=pieces,
            amp_dtype=torch.bfloat16 if amp else None,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--model '{args.model}', --method {args.method}: {error}") from error
    methods = [repr(distiller.method(degree)) for degree in (0, distiller.degrees[-1])]
    facts = {
        "model": args.model,
        "num_classes": model.num_classes,
        "weights": options.describe_weights(args),
        "method": args.method,
        "tokcomp": tokcomp.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    settings = {
        "model": args.model,
        "model_settings": model_settings(args),
        "method": args.method,
        "first_and_last_degree": methods,
        "max_degree": plugin.max_degree,
        "rank": plugin.rank,
        "scale": args.scale,
        "img_size": config["input_size"][-1],
        "recipe": recipe.describe(),
        "seed": args.seed,
        "data": args.dataset or str(root),
        "train_images": len(part),
        "processes": world.size,
        "grad_accum_steps": pieces,
        "device": device.type,
        "amp": "bfloat16" if amp else None,
    }
    return TocomRun(
        distiller,
        batches,
        args.output,
        settings=settings,
        facts=facts,
        total_steps=total_steps,
        checkpoint_steps=args.checkpoint_interval,
        log_steps=args.log_interval,
    )
