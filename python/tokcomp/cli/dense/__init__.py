"""tokcomp dense ACTION."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, blame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.data import Dataset

    from tokcomp.dense.data import Prepared
    from tokcomp.dense.files import SegmenterSettings
    from tokcomp.dense.segmenter import Segmenter
    from tokcomp.methods import Method

#: action -> (module, one line)
ACTIONS = {
    "train": ("tokcomp.cli.dense.train", "train a segmenter: a vision transformer and a head"),
    "tocom": ("tokcomp.cli.dense.tocom", "train a plugin for a segmenter's encoder, by self-distillation"),
    "evaluate": ("tokcomp.cli.dense.evaluate", "mIoU and speed by degree, with and without a plugin"),
    "visualize": ("tokcomp.cli.dense.visualize", "draw images, masks and a segmenter's predictions at some degrees"),
}

DESCRIPTION = """\
Semantic segmentation with tokens merged for each MLP and unmerged after it (ToMeMLP), or for the rest of the encoder
(ToMe, DiffRate). Degree d merges d x --tokens-per-degree tokens. Without DATA, pictures are generated: textured shapes
on photographs, no download.
"""

EXAMPLES = """\
examples:
  tokcomp dense train --model-kwargs embed_dim=96 depth=4 num_heads=3 --img-size 256 -o segmenter
      a small one, on generated pictures, in minutes
  tokcomp dense tocom segmenter/segmenter.safetensors --max-degree 8 --tokens-per-degree 16 --steps 150 -o plugin
      a plugin for it: 8 degrees of 16 tokens, up to half of the 256 patches
  tokcomp dense evaluate segmenter/segmenter.safetensors --plugin plugin/tocom.safetensors --tokens-per-degree 16
      mIoU at each degree, with and without the plugin
  tokcomp dense visualize segmenter/segmenter.safetensors --degrees 0,4,8 --tokens-per-degree 16 -o drawn.png
      input, truth, and one prediction per degree
  tokcomp dense ACTION --help
      more, for ADE20k and pre-trained encoders
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (module, text) in ACTIONS.items():
        action = actions.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        import_module(module).add_arguments(action)


def run(args: argparse.Namespace) -> int | None:
    status: int | None = import_module(ACTIONS[args.action][0]).run(args)
    return status


def add_data_options(parser: argparse.ArgumentParser, *, batch_size: int, train: bool, held_out: bool) -> Any:
    """The options of the data, and their group."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DATA",
        help="folder with images/SPLIT/*.jpg and annotations/SPLIT/*.png, as in ADE20k (default: generated)",
    )
    group.add_argument("--reduce-zero-label", action="store_true", help="label 0 of DATA means no label, as in ADE20k")
    if train:
        group.add_argument("--train-split", default="training", help="part of DATA to train on (default: %(default)s)")
        group.add_argument(
            "--train-images",
            type=options.positive_int,
            metavar="N",
            help="train on the first N pictures of DATA, or on N generated ones (default: all; 1200)",
        )
    if held_out:
        group.add_argument("--split", default="validation", help="part of DATA to score (default: %(default)s)")
        group.add_argument(
            "--num-samples",
            type=options.positive_int,
            metavar="N",
            help="score the first N pictures of DATA, or N generated ones (default: all; 120)",
        )
    group.add_argument(
        "-b",
        "--batch-size",
        type=options.positive_int,
        default=batch_size,
        metavar="N",
        help="images in a step, over all processes (default: %(default)s)" if train else "images in a batch",
    )
    group.add_argument(
        "-j", "--workers", type=options.non_negative_int, default=0, metavar="N", help="loader processes (default: 0)"
    )
    return group


def add_segmenter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("segmenter", type=Path, metavar="FILE", help="segmenter.safetensors of tokcomp dense train")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--img-size",
        type=options.listed(options.positive_int),
        metavar="N[,N]",
        help="image side, or height and width (default: as in training)",
    )
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda if available)")


def add_degree_options(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("degrees of compression")
    group.add_argument(
        "--tokens-per-degree",
        type=options.positive_int,
        default=1,
        metavar="N",
        help="tokens that a degree merges for each MLP, or in each block; the ToCom paper has 16 degrees of 32 at "
        "512 x 512 (default: 1)",
    )
    options.add_merge_residual_option(group)
    return group


def add_method_option(group: Any) -> None:
    group.add_argument(
        "--method",
        choices=("tome_mlp", "tome"),
        help="merge for each MLP alone, or until the head reads every position (default: tome_mlp; CAFormer: tome)",
    )


def image_size(value: int | list[int] | None, option: str = "--img-size") -> tuple[int, int] | None:
    """What an option such as --img-size says, as (height, width)."""
    if value is None:
        return None
    sides = [value, value] if isinstance(value, int) else value
    if len(sides) != 2:
        raise UserError(f"{option} must be one number or height,width, got {len(sides)} numbers")
    return sides[0], sides[1]


def open_segmenter(args: argparse.Namespace) -> tuple[Segmenter, SegmenterSettings, tuple[int, int]]:
    """The segmenter that the options name, and its image size."""
    from tokcomp.dense.files import load_segmenter

    size = image_size(args.img_size)
    with blame("FILE"):
        segmenter, settings = load_segmenter(args.segmenter, img_size=size)
    return segmenter, settings, size or settings.img_size


def open_data(
    args: argparse.Namespace,
    settings: SegmenterSettings,
    size: tuple[int, int],
    *,
    train: bool,
    whole: bool = False,
) -> Prepared:
    """The training part of the data, or the held-out one; ``whole``: images in their own shape, masks in their size."""
    from torch.utils.data import Subset

    from tokcomp.data import num_images
    from tokcomp.dense.data import InMemory, MaskFolder, Prepared, WholeImages
    from tokcomp.dense.shapes import CLASSES, ShapesDataset

    count = args.train_images if train else args.num_samples
    dataset: Dataset[Any]
    if args.data_dir is None:
        if args.reduce_zero_label:
            raise UserError("--reduce-zero-label belongs to --data-dir, got generated pictures; leave it out")
        if settings.classes != CLASSES:
            raise UserError(
                f"the segmenter must be for generated pictures ({', '.join(CLASSES)}), got one for "
                f"{len(settings.classes)} other classes; pass --data-dir"
            )
        try:
            with blame("--img-size"):
                dataset = InMemory(ShapesDataset(size, count or (1200 if train else 120), train=train))
        except ImportError as error:
            raise UserError("generated pictures need scikit-learn; pip install 'tokcomp[demo]'") from error
    else:
        with blame("--data-dir"):
            split = args.train_split if train else args.split
            dataset = MaskFolder(args.data_dir, split, reduce_zero_label=args.reduce_zero_label)
        if count is not None:
            dataset = Subset(dataset, range(min(count, num_images(dataset))))
    if whole:
        return WholeImages(dataset, size, settings.mean, settings.std)
    augment = train and args.data_dir is not None  # generated pictures vary anyway
    return Prepared(dataset, size, settings.mean, settings.std, augment=augment)


def data_name(args: argparse.Namespace) -> str:
    """The name of the data in a run's settings."""
    return str(args.data_dir) if args.data_dir else "generated"


def method_of(args: argparse.Namespace, hierarchical: bool = False) -> Callable[[int], Method]:
    """The method of a degree, for a plain encoder or a hierarchical one."""
    from tokcomp import ToMe, ToMeMLP

    method = getattr(args, "method", None) or ("tome" if hierarchical else "tome_mlp")
    if method == "tome":
        if args.merge_residual:
            raise UserError("--merge-residual belongs to --method tome_mlp, got tome; leave it out")
        return lambda degree: ToMe(args.tokens_per_degree * degree)
    return lambda degree: ToMeMLP(args.tokens_per_degree * degree, merge_residual=args.merge_residual)


def schedules_of(
    args: argparse.Namespace, encoder: Any, model: str, size: tuple[int, int]
) -> Iterator[tuple[str, Method]]:
    """The DiffRate methods that --gflops and --schedule name, for the tokens of a plain encoder at an image size."""
    from tokcomp import DiffRate
    from tokcomp.adapters import find_adapter
    from tokcomp.cli.schedules import load_schedule
    from tokcomp.cli.schedules import method_of as method_of_schedule
    from tokcomp.methods import scheduled

    if not args.gflops and not args.schedule:
        return
    adapter = find_adapter(encoder)
    prefix = adapter.geometry(encoder).num_prefix_tokens
    with blame("--img-size"):
        rows, columns = adapter.grid(encoder, *size)
    num_tokens = rows * columns + prefix
    for gflops in args.gflops:
        with blame("--gflops"):
            yield f"DiffRate {gflops:g} G", DiffRate.published(model, gflops, num_tokens=num_tokens)
    open_choice = argparse.Namespace(metric=None, pipeline=None)
    for path in args.schedule:
        schedule = load_schedule(path, "--schedule", model=model)
        with blame("--schedule"):
            if schedule.num_tokens not in (None, num_tokens):
                schedule = schedule.rescaled(num_tokens, prefix)
            diffrate = schedule.method_name == "diffrate"
            yield path.stem, method_of_schedule(schedule, open_choice, encoder) if diffrate else scheduled(schedule)


def compress_encoder(args: argparse.Namespace, segmenter: Segmenter, degree: int) -> None:
    """Compress the encoder to a degree, blaming the options if it does not fit."""
    import tokcomp

    with blame(f"degree {degree} at --tokens-per-degree {args.tokens_per_degree}"):
        tokcomp.compress(segmenter.encoder, method_of(args, segmenter.hierarchical)(degree))
