"""Options that name labelled images, in timm's own names, and what they open."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError

if TYPE_CHECKING:
    from torch.utils.data import Dataset


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
    from tokcomp.train.data import open_dataset

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
