"""Options that choose a compression method, and the method that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.options import (
    list_of,
    listed,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    real,
)
from tokcomp.cli.schedules import add_rescale_option, scheduled_method

if TYPE_CHECKING:
    from torch import nn

    from tokcomp.methods import Method

#: Methods that keep a share of the patches in some blocks, with the same options.
_KEEPING = ("visionzip", "divprune", "cdpruner")
#: Methods that keep a share of the patches between some blocks.
_PREDICTING = ("dynamicvit", "spvit", "evovit")
METHODS = ("none", "diffrate", "tome", "tome_mlp", "pitome", "dtome", "evit", *_KEEPING, "ats", *_PREDICTING, "avit")
#: option -> the methods that read it, what its values are, how they are shown, and what it is
_VALUES: dict[str, tuple[tuple[str, ...], Callable[[str], Any], str, str]] = {
    "r": (
        ("tome", "tome_mlp", "pitome"), listed(non_negative_int), "R",
        "tokens to merge in a block, or one per block: 8,8,4,...",
    ),
    "margin": (("pitome",), real, "M", "cosine from which on tokens count as alike (default: 0.9)"),
    "unprotected": (
        ("pitome",), non_negative_float, "S",
        "share of the blocks, from the first on, in which all tokens may merge (default: 0)",
    ),
    "thresholds": (
        ("dtome",), listed(real), "T",
        "cosine above which a pair merges, or one per block; tokcomp.calibrate finds them",
    ),
    "num_kept": (_KEEPING, listed(positive_int), "K", "patches to keep, or one number for each of --keep-blocks"),
    "contextual": (
        ("visionzip",), positive_float, "S", "share of the kept tokens that the others join (default: 0.15625)",
    ),
    "samples": (("ats",), positive_int, "K", "how often is sampled, and so the most patches kept"),
    "num_pruned": (("evit",), non_negative_int, "R", "tokens to drop in every block"),
    "halt_at": (
        ("avit",), positive_float, "T", "sum of its halting probabilities at which a token halts (default: 0.99)",
    ),
    "halting_scale": (("avit",), real, "S", "of new parts, factor before the sigmoid (default: 10)"),
    "halting_shift": (("avit",), real, "S", "of new parts, shift before the sigmoid (default: -30)"),
}  # fmt: skip
#: option -> the methods that read it
_READERS = {
    **{option: readers for option, (readers, *_) in _VALUES.items()},
    "schedule": ("diffrate", "tome", "evit"),
    "schedules": ("diffrate",),
    "metric": ("diffrate",),
    "pipeline": ("diffrate",),
    "rescale": ("diffrate", "tome", "evit"),
    "gflops": ("diffrate", "tome", "pitome", "evit", *_KEEPING, *_PREDICTING),
    "no_prop_attn": ("tome", "pitome", "dtome"),
    "tokens_per_degree": ("tome_mlp",),
    "merge_residual": ("tome_mlp",),
    "keep_rate": ("evit", *_KEEPING, *_PREDICTING),
    "keep_blocks": ("evit", *_KEEPING, "ats", *_PREDICTING),
    "no_fuse": ("evit",),
    "layerwise": ("evovit",),
    "second_weight": ("evovit",),
}


def add_method_options(parser: argparse.ArgumentParser, *, default: str = "none") -> None:
    group = parser.add_argument_group("compression")
    group.add_argument("--method", choices=METHODS, default=default, help="how to compress (default: %(default)s)")
    group.add_argument(
        "--gflops",
        type=positive_float,
        metavar="G",
        help="budget, 1e9 multiply-adds per image: diffrate takes the schedule published for it, the others "
        "choose their r or keep rate to meet it",
    )
    group.add_argument(
        "--schedule",
        type=Path,
        metavar="FILE",
        help="a schedule saved as JSON, for the method that it names (if none, diffrate); or, for diffrate, a table "
        "like DiffRate's compression_rate.json, with --gflops",
    )
    add_rescale_option(group)
    group.add_argument(
        "--metric",
        choices=("cls_attn", "image_attn", "cls_attn_v", "random"),
        help="diffrate: what ranks tokens (default: the schedule's; cls_attn; image_attn without a class token)",
    )
    group.add_argument(
        "--pipeline",
        choices=("prune_merge", "merge_prune", "prune", "merge"),
        help="diffrate: which steps, in which order (default: what the schedule says, or prune_merge as far as it has "
        "both)",
    )
    for option, (readers, kind, metavar, text) in _VALUES.items():
        group.add_argument(_flag(option), type=kind, metavar=metavar, help=f"{', '.join(readers)}: {text}")
    group.add_argument("--no-prop-attn", action="store_true", help="tome, pitome, dtome: attention that ignores sizes")
    options.add_merge_residual_option(group)
    group.add_argument(
        "--keep-rate",
        type=listed(positive_float),
        metavar="K",
        help="evit, visionzip, divprune, cdpruner: share of patches to keep, or one per block; dynamicvit, spvit: "
        "share left after the first stage, or one for each of --keep-blocks; evovit: share of informative ones",
    )
    group.add_argument(
        "--keep-blocks",
        type=list_of(non_negative_int),
        metavar="B,B,...",
        help="blocks (from 0) for --keep-rate, --num-kept or --samples (default: 3,6,9; ats: all from 3 on; "
        "dynamicvit, spvit: a quarter, half and three quarters of the way; evovit: a third and two thirds)",
    )
    group.add_argument("--no-fuse", action="store_true", help="evit: drop the inattentive tokens rather than fuse them")


def add_evovit_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Evo-ViT's training")
    group.add_argument(
        "--layerwise",
        type=non_negative_float,
        metavar="S",
        help="share of the run, from its start, in which tokens are selected anew before every block from the first "
        "selection on (default: 0; as published: 0.667)",
    )
    group.add_argument(
        "--second-weight",
        type=non_negative_float,
        metavar="W",
        help="weight of the loss of a second classifier, on the class token, beside the model's own on the average of "
        "its patches, as --gp avg builds it (default: 0, no such classifier; as published: 0.5)",
    )


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def given_method_options(args: argparse.Namespace) -> list[str]:
    """Those options that the user gave and that only some methods read."""
    # `is`, not `in`: --r 0 is given, and 0 == False. No command has all of these options.
    given = {option: getattr(args, option, None) for option in _READERS}
    return [option for option, value in given.items() if value is not None and value is not False]


def methods_reading(option: str) -> tuple[str, ...]:
    """The methods that read an option of :func:`given_method_options`."""
    return _READERS[option]


def build_method(args: argparse.Namespace, model: nn.Module) -> Method | None:
    """The method that the options describe, for this plain model; None for ``--method none``."""
    require_readers(args)
    if args.method == "none":
        return None
    build = _BUILDERS.get(args.method, _keeping)
    return build(args, model)


def require_readers(args: argparse.Namespace) -> None:
    """Refuse an option of :func:`given_method_options` that the chosen method does not read."""
    for option in given_method_options(args):
        if args.method not in _READERS[option]:
            readers = " or ".join(_READERS[option])
            raise UserError(
                f"{_flag(option)} belongs to --method {readers}, got --method {args.method}; "
                "change the method or leave the option out"
            )


def _one_of(args: argparse.Namespace, *options: str) -> str:
    given = [option for option in options if getattr(args, option) is not None]
    if len(given) != 1:
        wanted = " or ".join(_flag(option) for option in options)
        got = " and ".join(_flag(option) for option in given) or "none of them"
        raise UserError(f"--method {args.method} needs {'exactly one of ' if given else ''}{wanted}, got {got}")
    return given[0]


def _refuse_rescale(args: argparse.Namespace, chosen: str) -> None:
    if args.rescale:
        raise UserError(f"--rescale goes with --schedule, got {_flag(chosen)}; leave it out")


def _tome(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import ToMe
    from tokcomp.equal_cost import tome_for_budget

    chosen = _one_of(args, "r", "gflops", "schedule")
    if chosen == "schedule":
        return scheduled_method(args, model)
    _refuse_rescale(args, chosen)
    if chosen == "gflops":
        with blame("--gflops"):
            r = tome_for_budget(model, args.gflops * 1e9).r
    else:
        r = args.r
    return ToMe(r, prop_attn=not args.no_prop_attn)


def _tome_mlp(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import ToMeMLP

    _one_of(args, "r")
    return ToMeMLP(args.r, merge_residual=args.merge_residual)


def _pitome(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import PiToMe
    from tokcomp.equal_cost import count_for_budget

    chosen = _one_of(args, "r", "gflops")
    margin = 0.9 if args.margin is None else args.margin

    def make(r: int | Sequence[int]) -> PiToMe:
        return PiToMe(r, margin, prop_attn=not args.no_prop_attn, unprotected=args.unprotected or 0.0)

    with blame("--method pitome"):
        make(0)
    if chosen == "r":
        return make(args.r)
    with blame("--gflops"):
        return count_for_budget(model, args.gflops * 1e9, make)


def _keeping(args: argparse.Namespace, model: nn.Module) -> Method:
    """VisionZip, DivPrune or CDPruner."""
    from tokcomp.equal_cost import BY_RATE, rate_for_budget

    chosen = _one_of(args, "keep_rate", "num_kept", "gflops")
    settings = {} if args.contextual is None else {"contextual": args.contextual}
    make: Callable[..., Method] = partial(BY_RATE[args.method], **settings)
    with blame(f"--method {args.method}"):
        make(1.0)
    if chosen == "gflops":
        if args.keep_blocks is not None:
            raise UserError("--keep-blocks goes with --keep-rate or --num-kept, got --gflops; leave it out")
        with blame("--gflops"):
            return rate_for_budget(model, args.gflops * 1e9, make)
    blocks = {} if args.keep_blocks is None else {"blocks": args.keep_blocks}
    with blame(_flag(chosen)):
        return make(**{chosen: getattr(args, chosen)}, **blocks)


def _evit(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import EViT
    from tokcomp.equal_cost import evit_for_budget

    chosen = _one_of(args, "keep_rate", "num_pruned", "gflops", "schedule")
    if chosen == "schedule":
        return scheduled_method(args, model)
    _refuse_rescale(args, chosen)
    if args.keep_blocks is not None and chosen != "keep_rate":
        raise UserError(f"--keep-blocks goes with --keep-rate, got {_flag(chosen)}; leave it out")
    if chosen == "gflops":
        with blame("--gflops"):
            return evit_for_budget(model, args.gflops * 1e9, fuse=not args.no_fuse)
    if chosen == "num_pruned":
        return EViT(num_pruned=args.num_pruned, fuse=not args.no_fuse)
    with blame("--keep-rate"):
        blocks = {} if args.keep_blocks is None else {"blocks": args.keep_blocks}
        return EViT(args.keep_rate, fuse=not args.no_fuse, **blocks)


def _dtome(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import DToMe

    _one_of(args, "thresholds")
    with blame("--thresholds"):
        return DToMe(args.thresholds, prop_attn=not args.no_prop_attn)


def _ats(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import ATS

    _one_of(args, "samples")
    return ATS(args.samples, args.keep_blocks)


def _predicting(args: argparse.Namespace, model: nn.Module) -> Method:
    """DynamicViT, SPViT or Evo-ViT."""
    from tokcomp.equal_cost import BY_PREDICTOR, predictor_for_budget

    given = {name: getattr(args, name, None) for name in ("layerwise", "second_weight")}
    make = partial(BY_PREDICTOR[args.method], **{name: value for name, value in given.items() if value is not None})
    with blame(f"--method {args.method}"):
        make(1.0, None)
    if _one_of(args, "keep_rate", "gflops") == "gflops":
        if args.keep_blocks is not None:
            raise UserError("--keep-blocks goes with --keep-rate, got --gflops; leave it out")
        with blame("--gflops"):
            return predictor_for_budget(model, args.gflops * 1e9, make)
    with blame("--keep-rate"):
        return make(args.keep_rate, args.keep_blocks)


def _avit(args: argparse.Namespace, model: nn.Module) -> Method:
    from tokcomp import AViT

    given = {"threshold": args.halt_at, "scale": args.halting_scale, "shift": args.halting_shift}
    with blame("--method avit"):
        return AViT(**{name: value for name, value in given.items() if value is not None})


_BUILDERS: dict[str, Callable[[argparse.Namespace, nn.Module], Method]] = {
    "diffrate": scheduled_method,
    "tome": _tome,
    "tome_mlp": _tome_mlp,
    "pitome": _pitome,
    "dtome": _dtome,
    "evit": _evit,
    "ats": _ats,
    "avit": _avit,
    **dict.fromkeys(_PREDICTING, _predicting),
}


def compress_by(args: argparse.Namespace, model: nn.Module, method: Method | None) -> nn.Module:
    """Compress, blaming the option if it does not fit the model."""
    from tokcomp import UnsupportedModelError, compress

    if method is None:
        return model
    try:
        return compress(model, method)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"--method {args.method} does not fit {args.model}: {error}") from error
