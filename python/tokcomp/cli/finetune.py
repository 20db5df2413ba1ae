"""tokcomp finetune."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import method_options, options, training
from tokcomp.cli.data import add_data_options, data_config, data_root, open_data
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.table import table
from tokcomp.cli.training import Job
from tokcomp.runs.recipe import ADAPTFORMER_RECIPE, FINETUNE_RECIPE, SCRATCH_RECIPE, Recipe

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from tokcomp.finetune.run import FineTuneRun
    from tokcomp.methods import Method

DESCRIPTION = """\
Train a model with its tokens really dropped: fine-tuning by the DiffRate paper's recipe (its Table 6: 30 epochs from
trained weights), or with --from-scratch by DeiT's (300 epochs from random ones). A step costs only what the remaining
tokens cost, so training is faster too.

DATA is a folder that contains 'train' and 'validation' with one sub-folder per class in each, or --dataset names any of
timm's data sets that allows random access. Accuracy on the validation images is measured before the first step and
after each epoch, with compression on. Ctrl-C and SIGTERM stop the run after its current step, and --resume continues as
if it had never stopped: to the same weights, bit for bit on a CPU.
"""

EXAMPLES = """\
examples:
  tokcomp finetune --dataset digits -m tokcomp_digits_vit --pretrained --method tome --r 10 \\
      --epochs 5 -b 64 --lr 5e-4 -o digits-run
      the bundled model on the bundled digits, no download
  tokcomp finetune /data/imagenet -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3 --amp -o run
      the paper's fine-tuning, in mixed precision (bfloat16)
  tokcomp finetune /data/flowers -m deit_base_patch16_224 --pretrained --num-classes 102 --adaptformer -b 64 \\
      --method tome --r 16 -o run
      the backbone frozen, a narrow branch beside each MLP trained (AdaptFormer), at ToMe's r = 16
  torchrun --nproc-per-node 8 -m tokcomp finetune /data/imagenet -m deit_small_patch16_224 --from-scratch \\
      --method diffrate --schedule mine.json --amp --torchcompile -o run
      from scratch on 8 GPUs, with your own schedule
  tokcomp finetune /data/imagenet ... -o run --resume
      continue a run that was stopped, with all other options unchanged
"""

#: Fields of the recipe that have an option.
RECIPE_FIELDS = (
    *("epochs", "opt", "lr", "min_lr", "sched", "warmup_epochs", "warmup_lr", "weight_decay", "clip_grad"),
    *("aa", "hflip", "color_jitter", "reprob", "repeated_aug", "smoothing", "mixup", "cutmix", "drop_path"),
    *("model_ema_decay", "backbone_lr_scale", "frozen_epochs"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tokcomp finetune DATA [-m NAME] [--method METHOD ...] [-o DIR] [options]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=1024, batch_help="images in a step, over all processes; ")
    data.add_argument("--train-split", default="train", help="part of the data set to train on (default: %(default)s)")
    data.add_argument(
        "--val-split", default="validation", help="part of the data set to validate on (default: %(default)s)"
    )
    data.add_argument(
        "--held-out",
        type=options.positive_int,
        metavar="N",
        help="validate on N of the training images, spread over the classes, and do not train on them",
    )
    options.add_model_options(parser, default="deit_small_patch16_224")
    method_options.add_method_options(parser)
    method_options.add_evovit_training_options(parser)
    recipe = parser.add_argument_group("recipe (if two defaults are given, the second is for --from-scratch)")
    recipe.add_argument("--from-scratch", action="store_true", help="start from random weights, by DeiT's recipe")
    lr = {"lr": f"{FINETUNE_RECIPE.lr}; 5e-4 x batch size / 512"}
    training.add_recipe_options(recipe, RECIPE_FIELDS, FINETUNE_RECIPE, SCRATCH_RECIPE, defaults=lr)
    for field, text in (("scale", "share of an image that a crop takes"), ("ratio", "width to height of a crop")):
        least, most = getattr(FINETUNE_RECIPE, field)
        recipe.add_argument(
            f"--{field}",
            type=options.positive_float,
            nargs=2,
            metavar=("LEAST", "MOST"),
            help=f"{text} (default: {least:.2f} {most:.2f})",
        )
    adapter = parser.add_argument_group("AdaptFormer")
    adapter.add_argument(
        "--adaptformer",
        action="store_true",
        help="freeze the model and train a branch beside each MLP, and the classifier, by the ToCom paper's recipe for "
        "VTAB-1k: lr 1e-3 to 1e-5, weight decay 1e-4, 100 epochs, no augmentation, mixing or smoothing (its batch: 64)",
    )
    adapter.add_argument(
        "--bottleneck", type=options.positive_int, metavar="N", help="width of the branches (default: 32)"
    )
    adapter.add_argument(
        "--adapter-scale", type=options.positive_float, metavar="S", help="factor on their output (default: 0.1)"
    )
    speed = training.add_speed_options(parser)
    speed.add_argument(
        "--amp-dtype",
        choices=("bfloat16", "float16"),
        default="bfloat16",
        help="type for --amp (default: %(default)s); float16 scales gradients and needs a GPU",
    )
    speed.add_argument("--torchcompile", action="store_true", help="compile the model with torch.compile")
    output = training.add_output_options(
        parser,
        "tokcomp-finetune",
        checkpoint=(500, "checkpoints, in addition to one after each epoch"),
        log=(50, "rows of the log, in addition to one after each epoch"),
    )
    output.add_argument("--json", action="store_true", help="print the summary as JSON rather than as a table")


def run(args: argparse.Namespace) -> int:
    recipe, root = _recipe(args), data_root(args)
    return training.train(args, lambda job: _prepare(job, recipe, root), lambda run: _report(args, run))


def _recipe(args: argparse.Namespace) -> Recipe:
    if args.from_scratch and (args.pretrained or args.checkpoint is not None):
        raise UserError("--from-scratch starts from random weights, got trained ones too; leave one of the two out")
    if not (args.from_scratch or args.pretrained or args.checkpoint is not None):
        raise UserError(
            "fine-tuning needs trained weights, got none; pass --pretrained, --checkpoint FILE or --from-scratch"
        )
    for option in ("bottleneck", "adapter_scale"):
        if getattr(args, option) is not None and not args.adaptformer:
            raise UserError(f"--{option.replace('_', '-')} belongs to --adaptformer, which is not given; add it")
    if args.adaptformer and args.from_scratch:
        raise UserError("--adaptformer leaves the model's weights as they are, got --from-scratch too; leave one out")
    crops = {name: tuple(value) for name in ("scale", "ratio") if (value := getattr(args, name)) is not None}
    if args.from_scratch:
        return training.read_recipe(args, SCRATCH_RECIPE, lr=5e-4 * args.batch_size / 512, **crops)
    return training.read_recipe(args, ADAPTFORMER_RECIPE if args.adaptformer else FINETUNE_RECIPE, **crops)


def _prepare(job: Job, recipe: Recipe, root: Path | None) -> FineTuneRun:
    """Whatever can be refused is refused here, with nothing written."""
    from tokcomp.finetune.run import FineTuneRun
    from tokcomp.finetune.tuner import FineTuner
    from tokcomp.measure.evaluate import evaluate
    from tokcomp.runs.data import Part, check_labels, training_part
    from tokcomp.runs.recipe import plain_transform

    args = job.args
    job.begin(mixes=recipe.mixes)
    model = options.build_model(args, drop_path_rate=recipe.drop_path)
    method = method_options.build_method(args, model)
    plain_cost = options.gflops(model)
    branches = _attach_branches(args, model)
    teacher = _prepare_learned(args, model, method)
    method_options.compress_by(args, model, method)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    train, indices, val = _parts(args, root)
    for part in (train, val):
        with blame("DATA" if root is not None else "--dataset"):
            check_labels(part, model.num_classes)
    config = data_config(args, model)
    with blame("--aa"):
        train_set = training_part(train, indices, recipe, config)
    val_set = Part(val, transform=plain_transform(config))
    batches = job.batches(train_set, repeats=recipe.repeated_aug)
    held_out = job.held_out(val_set)
    total_steps = max(1, round(recipe.epochs * batches.steps_per_epoch))
    with blame("recipe"):
        tuner = FineTuner(
            model,
            recipe,
            num_classes=model.num_classes,
            total_steps=total_steps,
            steps_per_epoch=batches.steps_per_epoch,
            **job.place,
            compiled=args.torchcompile,
            teacher=teacher,
        )
    method_settings = repr(method) if method is not None else None
    facts = {
        "model": args.model,
        "num_classes": model.num_classes,
        "weights": options.describe_weights(args),
        "method": args.method,
        "method_settings": method_settings,
        "gflops": options.gflops(model),
        "uncompressed_gflops": plain_cost,
        "adaptformer": branches,
        **training.versions(),
    }
    settings = {
        "model": args.model,
        "model_settings": model_settings(args),
        "method": method_settings,
        "adaptformer": branches,
        "img_size": config["input_size"][-1],
        "val_images": len(val_set),
        **({} if teacher is None else {"teacher": options.describe_weights(args)}),
        **job.settings(recipe, data=args.dataset or str(root), train_images=len(train_set)),
    }
    return FineTuneRun(
        tuner,
        batches,
        lambda one: evaluate(one, held_out(), device=job.device, amp_dtype=job.amp_dtype, world=job.world),
        args.output,
        settings=settings,
        facts=facts,
        total_steps=total_steps,
        **job.intervals,
    )


def _prepare_learned(args: argparse.Namespace, model: nn.Module, method: Method | None) -> nn.Module | None:
    """Attach the parts of a learned method if the checkpoint had none; returns its teacher, if it has one."""
    from tokcomp import UnsupportedModelError, learned
    from tokcomp.methods import LearnedMethod, PassageMethod

    if not isinstance(method, PassageMethod):
        return None
    if args.torchcompile:
        raise UserError(f"--method {args.method} takes no --torchcompile, as its losses watch the model; leave it out")
    if args.adaptformer and (isinstance(method, LearnedMethod) or args.second_weight):
        lost = "--second-weight, whose classifier" if args.second_weight else f"--method {args.method}, whose parts"
        raise UserError(
            f"--adaptformer keeps branches and classifier alone, got {lost} would be lost; leave one of the two out"
        )
    # A model with random weights teaches nothing.
    teacher = copy.deepcopy(model) if method.has_teacher and not args.from_scratch else None
    if teacher is not None:
        learned.detach(teacher)
    try:
        if isinstance(method, LearnedMethod) and not learned.is_attached(model, method):
            learned.attach(model, method)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    except ValueError as error:
        raise UserError(f"--method {args.method} does not fit {args.model}: {error}") from error
    return teacher


def _attach_branches(args: argparse.Namespace, model: nn.Module) -> dict[str, Any] | None:
    """Attach the branches that --adaptformer asks for and return their settings; None without it."""
    from tokcomp import UnsupportedModelError, adaptformer

    if not args.adaptformer:
        return None
    bottleneck, scale = args.bottleneck or 32, args.adapter_scale or 0.1
    try:
        adaptformer.attach(model, bottleneck, scale)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    names = set(adaptformer.freeze(model))
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    return {"bottleneck": bottleneck, "scale": scale, "trained_parameters": trained}


def _parts(args: argparse.Namespace, root: Path | None) -> tuple[Dataset[Any], list[int] | None, Dataset[Any]]:
    """The data set, the indices to train on (None: all), and the images to validate on."""
    from tokcomp.runs.data import Part, split_off

    train = open_data(args, root, args.train_split)
    if args.held_out is not None:
        total = len(train) if hasattr(train, "__len__") else 0
        if args.held_out >= total:
            raise UserError(f"--held-out must leave images to train on, got {args.held_out} of {total}")
        kept, held_out = split_off(train, args.held_out, args.seed)
        return train, kept, Part(train, held_out)
    val = open_data(args, root, args.val_split)
    folders = [
        Path(getattr(getattr(one, "reader", None), "root", None) or str(n)) for n, one in enumerate((train, val))
    ]
    if folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0]):
        # timm takes the whole folder if it has no part of that name.
        raise UserError(
            f"DATA must have folders '{args.train_split}' and '{args.val_split}', got '{root}' without one of them; "
            "pass --held-out N to validate on N of the training images"
        )
    return train, None, val


def _report(args: argparse.Namespace, found: FineTuneRun) -> None:
    summary = found.summary()
    if args.json:
        print(json.dumps(summary, indent=2))
        return
    cost = "" if summary["gflops"] is None else f", {summary['gflops']:.4g} GFLOPs"
    print(f"{summary['model']} ({summary['weights']}), {summary['method_settings'] or 'uncompressed'}{cost}")
    if summary["adaptformer"]:
        print(f"AdaptFormer: {summary['adaptformer']['trained_parameters']} parameters trained, the others frozen")
    rows = [
        [name, f"{epoch:g}", f"{value:.2f} %"]
        for name, epoch, value in (
            ("before", 0, summary["before"]["top1"]),
            ("last", summary["epochs"], summary["last"]["top1"]),
            (f"best ({summary['best']['of']})", summary["best"]["epoch"], summary["best"]["top1"]),
        )
    ]
    print(table(["validation", "epoch", "top-1"], rows))
    if summary["images_per_second"]:
        print(f"trained on {summary['images_per_second']:.1f} images/s")
    print(f"written: {args.output}")
