"""--gp and --model-kwargs: arguments of timm's models that have no separate option here."""

from __future__ import annotations

import argparse
import ast
import shlex
from typing import Any

from tokcomp.cli.errors import UserError

#: Argument of timm.create_model -> the option that sets it; --model-kwargs must not.
_CREATE_OPTIONS = {
    "pretrained": "--pretrained",
    "checkpoint_path": "--checkpoint",
    "num_classes": "--num-classes",
    "img_size": "--img-size",
    "global_pool": "--gp",
    "drop_path_rate": "--drop-path",
}


def model_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE of ``--model-kwargs``: as in timm, a Python literal if it is one, otherwise text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got '{text}'; arguments such as DATA go before it")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def add_model_kwargs(group: Any) -> None:
    group.add_argument(
        "--model-kwargs",
        type=model_argument,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="further arguments for the timm model, such as depth=6 reg_tokens=4",
    )


def add_pooling_option(group: Any) -> None:
    group.add_argument(
        "--gp", metavar="POOL", help="pooling (default: the model's own; ViT: token, avg, max, avgmax, map)"
    )


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--gp`` and ``--model-kwargs`` say, in the form that timm.create_model takes and records keep."""
    settings = dict(args.model_kwargs)
    for name, flag in _CREATE_OPTIONS.items():
        if name in settings:
            raise UserError(f"--model-kwargs must not set {name}, which is for {flag}; got {name}={settings[name]!r}")
    return settings if args.gp is None else {"global_pool": args.gp, **settings}


def model_words(args: argparse.Namespace) -> list[str]:
    """The options that build this model and load its weights, as words of a command line."""
    words = ["-m", args.model]
    words += ["--pretrained"] if args.pretrained else []
    for name in ("checkpoint", "num_classes", "img_size", "gp"):
        value = getattr(args, name)
        words += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
    if args.model_kwargs:
        words += ["--model-kwargs", *(f"{name}={value}" for name, value in args.model_kwargs)]
    return [shlex.quote(word) for word in words]
