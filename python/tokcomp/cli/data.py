"""Options that name labelled images, in timm's own names, and what they open."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from tokcomp.runs.data import Part


def add_data_options(parser: argparse.ArgumentParser, *, batch_size: int, batch_help: str = "") -> Any:
    """The options that every command with a data set has; returns their group, for the command's own."""
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


def data_root(args: argparse.Namespace) -> Path | None:
    """The folder that DATA or --data-dir names; None where the data set needs none."""
    if args.data is not None and args.data_dir is not None:
        raise UserError("DATA and --data-dir are the same thing, got both; keep one")
    root = args.data if args.data is not None else args.data_dir
    if args.dataset == "digits":
        return None
    if root is None and not args.dataset:
        raise UserError("DATA must be a folder of images, got nothing; name one, or try --dataset digits")
    if root is not None and not root.exists() and not args.dataset_download:
        raise UserError(f"DATA must be a folder or archive of images, got '{root}', which is not there")
    return root


def open_data(args: argparse.Namespace, root: Path | None, split: str) -> Dataset:
    """The data set that the options name."""
    from tokcomp.runs.data import open_dataset

    try:
        return open_dataset(
            args.dataset,
            root,
            split=split,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def scored_images(args: argparse.Namespace, root: Path | None, split: str, model: Any) -> Part:
    """The labelled images that the options name, ``args.num_samples`` of them, as the model takes them."""
    from timm.data import resolve_model_data_config
    from torch.utils.data import IterableDataset

    from tokcomp.data import count_classes
    from tokcomp.runs.data import Part, spread_sample
    from tokcomp.runs.recipe import plain_transform

    dataset = open_data(args, root, split)
    if isinstance(dataset, IterableDataset):
        raise UserError(
            "DATA must give any image by its number, got a stream; use a folder of images, torch/... or hfds/..."
        )
    classes = count_classes(dataset)
    if classes is not None and classes > model.num_classes:
        raise UserError(
            f"the model must have a class for each of the data set's {classes}, got a model of {model.num_classes}; "
            "pass the right --model, --checkpoint and --num-classes"
        )
    config = resolve_model_data_config(model)
    if args.img_size is not None:
        config["input_size"] = (config["input_size"][0], args.img_size, args.img_size)
    indices = None if args.num_samples is None else spread_sample(dataset, args.num_samples, 0)
    return Part(dataset, indices, plain_transform(config))
