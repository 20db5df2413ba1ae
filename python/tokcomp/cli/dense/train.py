"""tokcomp dense train."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tokcomp.cli import dense, options, training
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.model_arguments import add_model_kwargs
from tokcomp.cli.training import Job
from tokcomp.runs.recipe import DENSE_RECIPE, Recipe

if TYPE_CHECKING:
    from tokcomp.dense.train import DenseRun

DESCRIPTION = """\
Train a segmenter: any plain timm vision transformer, from scratch or pre-trained, with a linear head or Segmenter's
mask transformer, or a CAFormer with Semantic FPN. Without --data-dir, pictures are generated: five kinds of textured
shapes on photographs.

The encoder may be compressed during training (--r). Ctrl-C and SIGTERM stop the run after its current step, and
--resume continues as if it had never stopped.
"""

EXAMPLES = """\
examples:
  tokcomp dense train --model-kwargs embed_dim=96 depth=4 num_heads=3 --img-size 256 -o segmenter
      a small one, on generated pictures, in minutes on a CPU
  tokcomp dense train --data-dir /data/ADEChallengeData2016 --num-classes 150 --reduce-zero-label \\
      -m deit_base_patch16_384 --pretrained --img-size 512 --steps 160000 -b 8 --lr 1e-4 --amp -o ade
      ADE20k at 512 x 512 with DeiT-B
  tokcomp dense train --data-dir /data/ADEChallengeData2016 --num-classes 150 --reduce-zero-label \\
      -m caformer_s36 --pretrained --img-size 512 --steps 80000 -b 16 --lr 1e-4 --amp -o caformer
      the same with CAFormer-S36 and Semantic FPN
  tokcomp dense train ... --r 256 -o at256
      the same, fine-tuned with 256 tokens merged for each MLP
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    dense.add_data_options(parser, batch_size=16, train=True, held_out=True)
    model = parser.add_argument_group("model (names and meanings as in timm's scripts)")
    model.add_argument(
        "-m", "--model", default="vit_tiny_patch16_224", metavar="NAME", help="timm model name (default: %(default)s)"
    )
    add_model_kwargs(model)
    model.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    model.add_argument(
        "--img-size",
        type=options.listed(options.positive_int),
        default=512,
        metavar="N[,N]",
        help="image side, or height and width (default: 512)",
    )
    model.add_argument(
        "--head",
        choices=("linear", "mask_transformer", "semantic_fpn"),
        help="head (default: mask_transformer; for a CAFormer semantic_fpn)",
    )
    model.add_argument("--num-classes", type=options.positive_int, metavar="K", help="number of classes of DATA")
    model.add_argument(
        "--r",
        type=options.listed(options.non_negative_int),
        metavar="R",
        help="tokens to merge for each MLP while training, for good in a CAFormer, or one number per block: 8,8,4,...",
    )
    model.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--steps", type=options.positive_int, default=1000, metavar="N", help="length of the run (default: %(default)s)"
    )
    recipe.add_argument(
        "--warmup-steps",
        type=options.non_negative_int,
        metavar="N",
        help="steps in which the learning rate rises (default: a tenth of them)",
    )
    fields = ("opt", "lr", "min_lr", "weight_decay", "clip_grad", "drop_path")
    training.add_recipe_options(recipe, fields, DENSE_RECIPE)
    training.add_speed_options(parser)
    training.add_output_options(
        parser,
        "tokcomp-segmenter",
        checkpoint=(200, "checkpoints"),
        log=(20, "rows of the log"),
        validate=(500, "scores on the held-out images"),
    )


def run(args: argparse.Namespace) -> int:
    from tokcomp.dense.files import is_timms_own

    options.check_model_name(args.model)
    if not is_timms_own(args.model):
        raise UserError(
            f"--model must be one of timm's own, whose segmenter can be opened without a network, got '{args.model}'; "
            "name one of timm.list_models(['*vit*', 'caformer*'], pretrained=True)"
        )
    return training.train(args, _prepare, lambda run: _report(args, run))


def _report(args: argparse.Namespace, found: DenseRun) -> None:
    from tokcomp.dense.train import WEIGHTS

    summary = found.summary()
    print(f"{summary['model']}, {summary['settings']['head']}, {summary['classes']} classes: ", end="")
    print(f"mIoU {summary['mean_iou']:.2f} %, pixel accuracy {summary['pixel_accuracy']:.2f} %")
    print(f"loss {summary['loss']:.4g} after {summary['steps']} steps", end="")
    print(f", {summary['images_per_second']:.1f} images/s" if summary["images_per_second"] else "")
    print(f"written: {args.output / WEIGHTS}")


def _recipe(args: argparse.Namespace, steps_per_epoch: int) -> Recipe:
    warmup = args.steps // 10 if args.warmup_steps is None else args.warmup_steps
    epochs = {"epochs": args.steps / steps_per_epoch, "warmup_epochs": warmup / steps_per_epoch}
    return training.read_recipe(args, DENSE_RECIPE, **epochs)


def _prepare(job: Job) -> DenseRun:
    """Whatever can be refused is refused here, with nothing written."""
    import timm

    import tokcomp
    from tokcomp.dense.evaluate import evaluate_segmenter
    from tokcomp.dense.files import SegmenterSettings, is_hierarchical
    from tokcomp.dense.metrics import Scores
    from tokcomp.dense.segmenter import Segmenter, heads_for
    from tokcomp.dense.shapes import CLASSES
    from tokcomp.dense.train import DenseRun, SegmenterTuner
    from tokcomp.runs.batches import held_out_batches

    args = job.args
    size = dense.image_size(args.img_size)
    assert size is not None
    if args.data_dir is None and args.num_classes not in (None, len(CLASSES)):
        raise UserError(f"--num-classes must be {len(CLASSES)} for generated pictures, got {args.num_classes}")
    if args.data_dir is not None and (args.num_classes is None or args.num_classes < 2):
        raise UserError("--num-classes must be the number of classes of DATA, 2 or more; name it")
    classes = CLASSES if args.data_dir is None else tuple(f"class {index}" for index in range(args.num_classes))
    config = timm.models.get_pretrained_cfg(args.model)
    mean, std = (config.mean, config.std) if config is not None else ((0.5,) * 3, (0.5,) * 3)
    hierarchical = is_hierarchical(args.model)
    head = args.head or heads_for(hierarchical)[-1]
    if head not in heads_for(hierarchical):
        raise UserError(f"--head must be {' or '.join(heads_for(hierarchical))} for {args.model}, got {head}")
    build = SegmenterSettings(
        args.model, size, head, classes, tuple(mean), tuple(std), model_kwargs=dict(args.model_kwargs)
    )
    job.begin(mixes=False)
    segmenter = _build(args, build)
    if args.r is not None:
        with blame("--r"):
            merging = tokcomp.ToMe if segmenter.hierarchical else tokcomp.ToMeMLP
            tokcomp.compress(segmenter.encoder, merging(args.r))
    train_data = dense.open_data(args, build, size, train=True)
    held_out = dense.open_data(args, build, size, train=False)
    with blame("--img-size"):
        segmenter(train_data[0][0][None])
    batches = job.batches(train_data)
    recipe = _recipe(args, batches.steps_per_epoch)
    with blame("recipe"):
        tuner = SegmenterTuner(
            segmenter,
            recipe,
            num_classes=len(classes),
            total_steps=args.steps,
            steps_per_epoch=batches.steps_per_epoch,
            **job.place,
        )
    held_out_start = held_out_batches(held_out, args.batch_size, workers=args.workers)

    def validate(model: Segmenter) -> Scores:
        return evaluate_segmenter(model, held_out_start(), device=job.device).scores

    facts = {
        "model": args.model,
        "classes": len(classes),
        "weights": "pretrained encoder" if args.pretrained else "from scratch",
        **training.versions(),
    }
    settings = {
        "model": args.model,
        "model_kwargs": dict(args.model_kwargs),
        "pretrained": args.pretrained,
        "head": head,
        "img_size": list(size),
        "r": args.r,
        "steps": args.steps,
        **job.settings(recipe, data=dense.data_name(args), train_images=len(train_data)),
    }
    return DenseRun(
        tuner,
        batches,
        validate,
        args.output,
        build=build,
        settings=settings,
        facts=facts,
        total_steps=args.steps,
        **job.intervals,
        validate_steps=args.validate_interval,
    )


def _build(args: argparse.Namespace, build: Any) -> Any:
    from tokcomp import UnsupportedModelError

    try:
        segmenter = build.build(pretrained=args.pretrained, drop_path_rate=args.drop_path or 0.0)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(f"--model '{args.model}' could not be built for segmentation ({reason})") from error
    if args.grad_checkpointing:
        segmenter.encoder.set_grad_checkpointing(True)
    return segmenter
