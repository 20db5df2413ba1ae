"""tokcomp dense tocom."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokcomp.cli import dense, options, training
from tokcomp.cli.errors import blame

if TYPE_CHECKING:
    import torch

    from tokcomp.runs.distributed import World
    from tokcomp.tocom.train import TocomRun

DESCRIPTION = """\
Train a plugin for a segmenter's encoder by self-distillation: in each step the teacher is the segmenter at one random
degree, the student the segmenter at another with the plugin between the two applied. Masks are not looked at.

The paper trains its plugin on the classifier that the encoder was pre-trained as. 'tokcomp tocom train --method
tome_mlp --tokens-per-degree 32 --img-size 512' does that, and its file serves here too.
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
        help="divergence of the patches' classes, or L1 of the encoder's tokens (default: %(default)s)",
    )
    plugin.add_argument("--max-degree", type=options.positive_int, default=16, metavar="D", help="default: 16")
    plugin.add_argument("--rank", type=options.positive_int, default=2, metavar="H", help="of one step (default: 2)")
    plugin.add_argument("--scale", type=options.positive_float, default=0.1, metavar="S", help="default: 0.1")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--steps", type=options.positive_int, default=500, metavar="N", help="default: %(default)s")
    recipe.add_argument("--lr", type=options.positive_float, default=1e-3, metavar="X", help="default: 0.001")
    training.add_seed_option(recipe)
    recipe.add_argument("--amp", action="store_true", help="automatic mixed precision in bfloat16")
    output = parser.add_argument_group("output")
    training.add_output_option(output, "tokcomp-dense-tocom")
    output.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    output.add_argument(
        "--checkpoint-interval", type=options.positive_int, default=100, metavar="N", help="default: 100 steps"
    )


def run(args: argparse.Namespace) -> int:
    from tokcomp.tocom.train import PLUGIN

    training.check_new_run(args)

    def work(device: torch.device, world: World) -> int:
        found = _prepare(args, device, world)

        def report() -> None:
            summary = found.summary()
            print(f"degrees 0 to {args.max_degree} of {args.tokens_per_degree} tokens each")
            print(f"loss {summary['loss']:.4g} after {summary['steps']} steps")
            print(f"written: {args.output / PLUGIN}")

        return training.train_to_end(args, found, world, report, command="dense")

    return training.among_processes(args, work)


def _prepare(args: argparse.Namespace, device: torch.device, world: World) -> TocomRun:
    """Everything that can be refused is refused here, with nothing written."""
    from dataclasses import replace

    import torch

    import tokcomp
    from tokcomp.runs.batches import LoaderBatches, check_batch_size
    from tokcomp.runs.recipe import TOCOM_RECIPE
    from tokcomp.runs.steps import seed_all
    from tokcomp.tocom.distill import Distiller
    from tokcomp.tocom.train import TocomRun

    with blame("--batch-size"):
        check_batch_size(args.batch_size, world.size, 1, mixes=False)
    segmenter, settings, size = dense.open_segmenter(args)
    segmenter.requires_grad_(False).to(device)
    dense.compress_encoder(args, segmenter, args.max_degree)
    tokcomp.restore(segmenter.encoder)
    seed_all(args.seed)
    plugin = tokcomp.ToCom(segmenter.encoder, args.rank, args.max_degree)
    plugin.method = tokcomp.ToMeMLP.name
    data = dense.open_data(args, settings, size, train=True)
    batches = LoaderBatches(
        data, args.batch_size, args.seed, world=world, workers=args.workers, pin_memory=device.type == "cuda"
    )
    recipe = replace(
        TOCOM_RECIPE,
        lr=args.lr,
        min_lr=min(TOCOM_RECIPE.min_lr, args.lr / 100),
        epochs=args.steps / batches.steps_per_epoch,
        batch_size=args.batch_size,
        mixup=0.0,
        cutmix=0.0,
        drop_path=0.0,
        repeated_aug=1,
    )
    with blame("--amp"):
        distiller = Distiller(
            segmenter.encoder,
            plugin,
            dense.method_of(args),
            recipe,
            total_steps=args.steps,
            steps_per_epoch=batches.steps_per_epoch,
            device=device,
            scale=args.scale,
            seed=args.seed,
            world=world,
            amp_dtype=torch.bfloat16 if args.amp else None,
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
        "recipe": recipe.describe(),
        "seed": args.seed,
        "data": str(args.data_dir) if args.data_dir else "generated",
        "train_images": len(data),
        "processes": world.size,
        "device": device.type,
        "amp": "bfloat16" if args.amp else None,
    }
    return TocomRun(
        distiller,
        batches,
        args.output,
        settings=told,
        facts=facts,
        total_steps=args.steps,
        checkpoint_steps=args.checkpoint_interval,
        log_steps=10,
    )
