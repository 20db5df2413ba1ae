"""tokcomp dense tocom."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from tokcomp.cli import dense, options, training
from tokcomp.cli.degrees import add_plugin_shape
from tokcomp.cli.errors import blame
from tokcomp.cli.training import Job
from tokcomp.runs.recipe import TOCOM_RECIPE

if TYPE_CHECKING:
    from tokcomp.tocom.train import TocomRun

DESCRIPTION = """\
Train a plugin for a segmenter's encoder by self-distillation: in each step the teacher is the segmenter at one random
degree, the student the segmenter at another with the plugin between the two applied. Masks are not used. A degree
merges tokens for each MLP (ToMeMLP), in a CAFormer for the rest of its third stage (ToMe).

The paper trains its plugin on the classifier that the encoder was pre-trained as. 'tokcomp tocom train --method
tome_mlp --tokens-per-degree 32 --img-size 512' does that, and its file works here too.
"""

EXAMPLES = """\
examples:
  tokcomp dense tocom segmenter.safetensors --max-degree 8 --tokens-per-degree 16 --steps 150 -o plugin
      8 degrees of 16 tokens, on generated pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    dense.add_segmenter_options(parser)
    dense.add_data_options(parser, batch_size=8, train=True, held_out=False)
    dense.add_degree_options(parser)
    plugin = parser.add_argument_group("plugin")
    plugin.add_argument(
        "--loss",
        choices=("kl", "features"),
        default="kl",
        help="divergence of the patches' classes, or L1 of the encoder's tokens, a CAFormer's last map "
        "(default: %(default)s)",
    )
    plugin.add_argument(
        "--max-degree",
        type=options.positive_int,
        default=16,
        metavar="D",
        help="degrees are 0 to D (default: %(default)s)",
    )
    add_plugin_shape(plugin)
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--steps", type=options.positive_int, default=500, metavar="N", help="length of the run (default: %(default)s)"
    )
    training.add_recipe_options(recipe, ("lr",), TOCOM_RECIPE)
    training.add_speed_options(parser, checkpointing=False)
    intervals = {"checkpoint": (100, "checkpoints"), "log": (10, "rows of the log")}
    training.add_output_options(parser, "tokcomp-dense-tocom", **intervals)


def run(args: argparse.Namespace) -> int:
    return training.train(args, _prepare, lambda run: _report(args, run))


def _report(args: argparse.Namespace, found: TocomRun) -> None:
    from tokcomp.tocom.train import PLUGIN

    summary = found.summary()
    print(f"degrees 0 to {args.max_degree} of {args.tokens_per_degree} tokens each")
    print(f"loss {summary['loss']:.4g} after {summary['steps']} steps")
    print(f"written: {args.output / PLUGIN}")


def _prepare(job: Job) -> TocomRun:
    """Everything that can be refused is refused here, with nothing written."""
    import tokcomp
    from tokcomp.dense.segmenter import pyramid_maps
    from tokcomp.tocom.distill import Distiller
    from tokcomp.tocom.train import TocomRun

    args = job.args
    job.begin(mixes=False)
    segmenter, settings, size = dense.open_segmenter(args)
    segmenter.requires_grad_(False).to(job.device)
    dense.compress_encoder(args, segmenter, args.max_degree)
    tokcomp.restore(segmenter.encoder)
    plugin = tokcomp.ToCom(segmenter.encoder, args.rank, args.max_degree)
    method_at = dense.method_of(args, segmenter.hierarchical)
    plugin.method = method_at(0).name
    data = dense.open_data(args, settings, size, train=True)
    batches = job.batches(data)
    recipe = training.read_recipe(
        args,
        replace(TOCOM_RECIPE, mixup=0.0, cutmix=0.0, drop_path=0.0, repeated_aug=1),
        min_lr=min(TOCOM_RECIPE.min_lr, (args.lr or TOCOM_RECIPE.lr) / 100),
        epochs=args.steps / batches.steps_per_epoch,
    )
    with blame("--amp"):
        distiller = Distiller(
            segmenter.encoder,
            plugin,
            method_at,
            recipe,
            total_steps=args.steps,
            steps_per_epoch=batches.steps_per_epoch,
            scale=args.scale,
            **job.place,
            call=pyramid_maps if args.loss == "kl" and segmenter.hierarchical else None,
            read=segmenter.patch_answers if args.loss == "kl" else None,
        )
    facts = {"segmenter": str(args.segmenter), "model": settings.model, "method": plugin.method}
    told = {
        **facts,
        "head": settings.head,
        "img_size": list(size),
        "loss": args.loss,
        "max_degree": args.max_degree,
        "tokens_per_degree": args.tokens_per_degree,
        "merge_residual": args.merge_residual,
        "rank": args.rank,
        "scale": args.scale,
        "steps": args.steps,
        **job.settings(recipe, data=dense.data_name(args), train_images=len(data)),
    }
    return TocomRun(
        distiller,
        batches,
        args.output,
        settings=told,
        facts=facts,
        total_steps=args.steps,
        **job.intervals,
    )
