"""Options that name labelled images, called as in timm, and the data sets that they open."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from tokcomp.measure.evaluate import Evaluation
    from tokcomp.runs.data import Part

#: How many unreadable images are named one by one.
_NAMED = 10


def add_data_options(parser: argparse.ArgumentParser, *, batch_size: int, batch_help: str = "") -> Any:
    """The options that every command with a data set has; returns their group, for the command to extend."""
    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="?", type=Path, metavar="DATA", help="folder of the data set")
    data.add_argument("--data-dir", "--data", dest="data_dir", type=Path, metavar="DIR", help="the same, as an option")
    data.add_argument(
        "--dataset", default="", metavar="NAME", help="timm data set type/name (default: image folder), or digits"
    )
    data.add_argument(
        "--dataset-download", action="store_true", help="let torch/ and tfds/ data sets download themselves"
    )
    data.add_argument("--class-map", default="", metavar="FILE", help="text file of class names, in label order")
    data.add_argument(
        "-b",
        "--batch-size",
        type=options.positive_int,
        default=batch_size,
        metavar="N",
        help=f"{batch_help}default: %(default)s",
    )
    data.add_argument(
        "-j",
        "--workers",
        type=options.non_negative_int,
        default=2,
        metavar="N",
        help="loader processes (default: %(default)s)",
    )
    return data


def add_strict_option(data: Any) -> None:
    data.add_argument("--strict", action="store_true", help="stop at an image that cannot be read (default: skip it)")


def data_root(args: argparse.Namespace) -> Path | None:
    """The folder that DATA or --data-dir names; None if the data set needs none."""
    if args.data is not None and args.data_dir is not None:
        raise UserError("DATA and --data-dir are the same thing, got both; keep one")
    root = args.data if args.data is not None else args.data_dir
    if args.dataset == "digits":
        return None
    if root is None and not args.dataset:
        raise UserError("DATA must be a folder of images, got nothing; name one, or try --dataset digits")
    if root is not None and not root.exists() and not args.dataset_download:
        raise UserError(f"DATA must be a folder or archive of images, got '{root}', which does not exist")
    return root


def open_data(args: argparse.Namespace, root: Path | None, split: str, unreadable: str = "next") -> Dataset[Any]:
    """The data set that the options name; ``unreadable`` as in :class:`tokcomp.data.ReadableImages`."""
    from tokcomp.runs.data import open_dataset

    try:
        return open_dataset(
            args.dataset,
            root,
            split=split,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            unreadable=unreadable,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def marking(args: argparse.Namespace) -> str:
    """What happens to unreadable images in an evaluation: marked, or an error under ``--strict``."""
    return "raise" if args.strict else "mark"


def strict_error(error: Exception) -> UserError:
    """The error of ``--strict`` about an unreadable image; a loader's worker puts its traceback before it."""
    return UserError(f"--strict: not a readable picture: {str(error).splitlines()[-1].rpartition('Error: ')[2]}")


def check_classes(args: argparse.Namespace, dataset: Dataset[Any], num_classes: int) -> None:
    """Refuse labels that a model of ``num_classes`` cannot give, and point out odd ones that it can."""
    from tokcomp.data import count_classes

    names = getattr(getattr(dataset, "reader", None), "class_to_idx", None) or {}
    if "" in names:
        raise UserError(
            "DATA must be one folder per class, got pictures that lie in no such folder; move them into folders named "
            "after their classes"
        )
    classes = count_classes(dataset)
    if classes is not None and classes > num_classes:
        raise UserError(
            f"the model must have a class for each of the data set's {classes}, got a model of {num_classes}; "
            "pass the right --model, --checkpoint and --num-classes"
        )
    if names and not args.class_map and classes is not None and classes < num_classes:
        print(
            f"note: the data set has {classes} classes and the model {num_classes}; the folders, by name, stand for "
            f"its first {classes}. Pass --class-map FILE if they are others.",
            file=sys.stderr,
        )


def report_oddities(dataset: Dataset[Any], found: Evaluation, num_classes: int) -> None:
    """Say on stderr what the figures omit or what limits them. Refuses the figures of a model that gives no numbers."""
    while not hasattr(dataset, "filename") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if found.unreadable:
        named = sorted(set(found.unreadable))
        print(f"note: {len(named)} images could not be read and are not counted:", file=sys.stderr)
        for index in named[:_NAMED]:
            print(f"  {dataset.filename(index)}", file=sys.stderr)  # type: ignore[attr-defined]
        if len(named) > _NAMED:
            print(f"  and {len(named) - _NAMED} more", file=sys.stderr)
    if found.num_not_finite == found.num_images:
        raise UserError(
            f"the model's logits must be numbers, got NaN or infinity for all {found.num_images} images; check the "
            "weights, or compute in float32"
        )
    if found.num_not_finite:
        print(
            f"note: {found.num_not_finite} of {found.num_images} images have logits that are NaN or infinite, and "
            "count as wrong",
            file=sys.stderr,
        )
    if num_classes <= 5:
        print(f"note: with {num_classes} classes every answer is in the top 5, so top-5 says nothing", file=sys.stderr)


def data_config(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """How the model wants its images, in timm's terms, at the size that the options name."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    if args.img_size is not None:
        config["input_size"] = (config["input_size"][0], args.img_size, args.img_size)
    return config


def scored_images(
    args: argparse.Namespace, root: Path | None, split: str, model: Any, unreadable: str = "next"
) -> Part:
    """The labelled images that the options name, ``args.num_samples`` of them, as the model takes them."""
    from torch.utils.data import IterableDataset

    from tokcomp.runs.data import Part, spread_sample
    from tokcomp.runs.recipe import plain_transform

    dataset = open_data(args, root, split, unreadable)
    if isinstance(dataset, IterableDataset):
        raise UserError("DATA must allow random access, got a stream; use a folder of images, torch/... or hfds/...")
    check_classes(args, dataset, model.num_classes)
    indices = None if args.num_samples is None else spread_sample(dataset, args.num_samples, 0)
    return Part(dataset, indices, plain_transform(data_config(args, model)))
