"""Options that define the degrees of compression, and the plugin that moves between them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokcomp.cli import method_options, options
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.schedules import add_rescale_option, fitted, load_schedule, method_of

if TYPE_CHECKING:
    from torch import nn

    from tokcomp.methods import Method
    from tokcomp.tocom.plugin import ToCom

METHODS = ("tome", "pitome", "evit", "diffrate", "tome_mlp")


def add_degree_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("degrees of compression")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="tome",
        help="what a degree counts: tokens merged per block (tome, pitome), tokens dropped per block (evit), the "
        "position in --schedules (diffrate), --tokens-per-degree merged for each MLP (tome_mlp) (default: %(default)s)",
    )
    group.add_argument(
        "--schedules",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="diffrate: schedules saved as JSON for degrees 1, 2, ..., most expensive first; 0 keeps every token",
    )
    group.add_argument(
        "--metric",
        choices=("cls_attn", "image_attn", "cls_attn_v", "random"),
        help="diffrate: what ranks tokens (default: the schedules'; cls_attn; image_attn without a class token)",
    )
    add_rescale_option(group)
    group.add_argument("--no-prop-attn", action="store_true", help="tome, pitome: attention that ignores token sizes")
    group.add_argument("--no-fuse", action="store_true", help="evit: drop the inattentive tokens rather than fuse them")
    group.add_argument(
        "--tokens-per-degree",
        type=options.positive_int,
        metavar="N",
        help="tome_mlp: tokens that each degree merges; 32 suits 16 degrees at 512 x 512, 1024 patches (default: 1)",
    )
    options.add_merge_residual_option(group)


def build_degrees(args: argparse.Namespace, model: nn.Module) -> tuple[Callable[[int], Method], int | None]:
    """The method of each degree, and the highest degree if the options determine it."""
    from tokcomp import EViT, PiToMe, ToMe, ToMeMLP

    method_options.require_readers(args)
    if args.method == "tome":
        return partial(ToMe, prop_attn=not args.no_prop_attn), None
    if args.method == "pitome":
        return partial(PiToMe, prop_attn=not args.no_prop_attn), None
    if args.method == "evit":
        return lambda degree: EViT(num_pruned=degree, fuse=not args.no_fuse), None
    if args.method == "tome_mlp":
        step = args.tokens_per_degree or 1
        return lambda degree: ToMeMLP(step * degree, merge_residual=args.merge_residual), None
    return _schedules(args, model)


def _schedules(args: argparse.Namespace, model: nn.Module) -> tuple[Callable[[int], Method], int]:
    from tokcomp.tocom.degrees import diffrate_degrees

    if not args.schedules:
        raise UserError("--method diffrate needs --schedules FILE ..., got none")
    methods = []
    for path in args.schedules:
        schedule = load_schedule(path, "--schedules", model=args.model)
        methods.append(method_of(fitted(schedule, model, args.model, rescale=args.rescale), args, model))
    with blame("--schedules"):
        degrees = diffrate_degrees(model, methods)
    return degrees.__getitem__, len(methods)


def add_plugin_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    group = parser.add_argument_group("plugin")
    group.add_argument(
        "--plugin",
        "--tocom",
        type=Path,
        required=required,
        metavar="FILE",
        help="a plugin from tokcomp tocom train, or from the published code"
        + ("" if required else " (default: none, so the weights are the same at every degree)"),
    )
    group.add_argument(
        "--scale",
        type=options.non_negative_float,
        default=0.1,
        metavar="S",
        help="factor on the plugin, 0.01 to 0.15 in the paper (default: %(default)s)",
    )


def add_plugin_shape(group: argparse._ArgumentGroup) -> None:
    """Of a plugin to be trained."""
    group.add_argument(
        "--rank", type=options.positive_int, default=2, metavar="H", help="rank of one step (default: %(default)s)"
    )
    group.add_argument(
        "--scale",
        type=options.positive_float,
        default=0.1,
        metavar="S",
        help="factor on the plugin (default: %(default)s)",
    )


def load_plugin(args: argparse.Namespace, model: nn.Module) -> ToCom:
    from tokcomp import ToCom, UnsupportedModelError

    if not args.plugin.is_file():
        raise UserError(f"--plugin must be a file, got '{args.plugin}', which does not exist")
    try:
        with blame("--plugin"):
            return ToCom.load(args.plugin, model)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
