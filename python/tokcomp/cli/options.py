"""Options that several commands share, named as in timm, and what they build."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.misfits import load_checkpoint
from tokcomp.cli.model_arguments import add_model_kwargs, add_pooling_option, model_settings
from tokcomp.cli.schedules import add_rescale_option, scheduled_method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokcomp.methods import Method

METHODS = ("none", "diffrate", "tome", "tome_mlp", "evit")
#: option -> the methods that read it
_READERS = {
    "schedule": ("diffrate", "tome", "evit"),
    "schedules": ("diffrate",),
    "metric": ("diffrate",),
    "pipeline": ("diffrate",),
    "rescale": ("diffrate", "tome", "evit"),
    "gflops": ("diffrate", "tome", "evit"),
    "r": ("tome", "tome_mlp"),
    "no_prop_attn": ("tome",),
    "tokens_per_degree": ("tome_mlp",),
    "merge_residual": ("tome_mlp",),
    "keep_rate": ("evit",),
    "keep_blocks": ("evit",),
    "num_pruned": ("evit",),
    "no_fuse": ("evit",),
}


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got '{text}'")
    return value


def non_negative_int(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got '{text}'")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return value


def non_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got '{text}'")
    return value


def listed(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """``8`` is one value, ``8,8,4`` a list."""

    def parse(text: str) -> Any:
        values = [kind(part.strip()) for part in text.split(",")]
        return values if "," in text else values[0]

    return parse


def list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part.strip()) for part in text.split(",")]


def add_model_options(parser: argparse.ArgumentParser, *, default: str) -> None:
    group = parser.add_argument_group("model (names and meanings as in timm's scripts)")
    group.add_argument("-m", "--model", default=default, metavar="NAME", help="timm model name (default: %(default)s)")
    group.add_argument("--pretrained", action="store_true", help="load timm's pretrained weights")
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="load weights from a checkpoint")
    group.add_argument("--num-classes", type=positive_int, metavar="N", help="classes (default: the model's own)")
    group.add_argument("--img-size", type=positive_int, metavar="N", help="image side (default: the model's own)")
    add_pooling_option(group)
    add_model_kwargs(group)
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: cuda if available)")


def add_adapter_option(parser: argparse.ArgumentParser) -> None:
    """For commands that run trained models; :func:`build_model` applies it."""
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FILE",
        help="AdaptFormer branches and classifier for these weights, from tokcomp finetune --adaptformer",
    )


def add_method_options(parser: argparse.ArgumentParser, *, default: str = "none") -> None:
    group = parser.add_argument_group("compression")
    group.add_argument("--method", choices=METHODS, default=default, help="how to compress (default: %(default)s)")
    group.add_argument(
        "--gflops",
        type=positive_float,
        metavar="G",
        help="budget, 1e9 multiply-adds per image: diffrate takes the schedule published for it, tome and evit "
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
    group.add_argument(
        "--r",
        type=listed(non_negative_int),
        metavar="R",
        help="tome, tome_mlp: tokens to merge in a block, or one per block: 8,8,4,...",
    )
    group.add_argument("--no-prop-attn", action="store_true", help="tome: attention that ignores token sizes")
    group.add_argument(
        "--merge-residual",
        action="store_true",
        help="tome_mlp: merged positions share one token after the MLP, rather than only the MLP's output",
    )
    group.add_argument(
        "--keep-rate", type=listed(positive_float), metavar="K", help="evit: share of patches to keep, or one per block"
    )
    group.add_argument(
        "--keep-blocks",
        type=list_of(non_negative_int),
        metavar="B,B,...",
        help="evit: blocks (from 0) that --keep-rate applies to (default: 3,6,9)",
    )
    group.add_argument("--num-pruned", type=non_negative_int, metavar="R", help="evit: tokens to drop in every block")
    group.add_argument("--no-fuse", action="store_true", help="evit: drop the inattentive tokens rather than fuse them")


def add_precision_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("precision and speed")
    group.add_argument("--amp", action="store_true", help="automatic mixed precision")
    group.add_argument(
        "--amp-dtype",
        choices=("float16", "bfloat16"),
        help="type for --amp (default: float16 on cuda, bfloat16 on cpu)",
    )
    group.add_argument(
        "--model-dtype", choices=("float32", "float16", "bfloat16"), help="convert the weights (default: as they are)"
    )
    group.add_argument("--torchcompile", action="store_true", help="compile the model with torch.compile")
    return group


def add_quantize_option(group: argparse._ArgumentGroup, text: str) -> None:
    group.add_argument("--quantize", choices=("int8",), help=f"{text}; on CPU, in float32 else, for timm's ViTs")


def chosen_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device must be a device of this machine, got '{name}' ({reason}); try --device cpu"
        ) from error
    return device


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know; names with a slash are for model hubs and are left to timm."""
    import timm

    base = name.split(".")[0]
    if "/" not in name and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models('*vit*') lists them"
        raise UserError(f"--model must be a name that timm knows, got '{name}'; {hint}")


def build_model(args: argparse.Namespace, **more: Any) -> Any:
    """The plain model, in evaluation mode, on the CPU; ``more`` is also passed to timm, such as ``drop_path_rate``."""
    import tokcomp.assets  # registers the digits model with timm
    import tokcomp.lvvit  # noqa: F401  and LV-ViT

    if args.checkpoint is not None and not args.checkpoint.is_file():
        raise UserError(f"--checkpoint must be a file, got '{args.checkpoint}', which does not exist")
    if args.checkpoint is not None and args.pretrained:
        raise UserError("--pretrained and --checkpoint exclude each other; keep the one that names your weights")
    check_model_name(args.model)
    options = {**model_settings(args), "num_classes": args.num_classes, "img_size": args.img_size, **more}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        model = _create_model(args.model, args.pretrained, options)
    except Exception as error:
        if args.gp is not None and isinstance(error, AssertionError):
            raise UserError(
                f"--gp must be a pooling that {args.model} knows (a ViT: token, avg, max, avgmax, map), got '{args.gp}'"
            ) from error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if args.pretrained:
            raise UserError(
                f"--pretrained: the weights of '{args.model}' could not be loaded ({reason}); "
                "check the network and timm's cache, or pass --checkpoint FILE"
            ) from error
        raise UserError(
            f"--model '{args.model}' could not be built with {options or 'these options'} ({reason})"
        ) from error
    if args.checkpoint is not None:
        load_checkpoint(args, model)
    if getattr(args, "adapter", None) is not None:
        _load_adapter(args, model)
    return model.eval()


def _load_adapter(args: argparse.Namespace, model: nn.Module) -> None:
    from tokcomp import UnsupportedModelError, adaptformer

    if not args.adapter.is_file():
        raise UserError(f"--adapter must be a file, got '{args.adapter}', which does not exist")
    try:
        with blame("--adapter"):
            adaptformer.load(args.adapter, model)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error


def _create_model(name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    import timm

    side = options.get("img_size")
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if side is None or "img_size" not in str(error):
            raise
        options = {option: value for option, value in options.items() if option != "img_size"}
        model = timm.create_model(name, pretrained=pretrained, **options)
    if side is not None and not hasattr(model, "patch_embed"):
        # A model for any image size: its configuration says which size it is used at.
        config = model.pretrained_cfg
        model.pretrained_cfg = {**config, "input_size": (config["input_size"][0], side, side)}
    return model


def describe_weights(args: argparse.Namespace) -> str:
    weights = "pretrained weights" if args.pretrained else "random weights"
    if args.checkpoint is not None:
        weights = f"weights from {args.checkpoint}"
    adapter = getattr(args, "adapter", None)
    return weights if adapter is None else f"{weights}, branches from {adapter}"


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
    build = {"diffrate": scheduled_method, "tome": _tome, "tome_mlp": _tome_mlp, "evit": _evit}[args.method]
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


def check_quantize(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse --quantize for a model, or beside options, that it does not serve."""
    from tokcomp.adapters import find_adapter

    if args.quantize is None:
        return
    beside = [name for name in ("amp", "torchcompile") if getattr(args, name, False)]
    if beside:
        raise UserError(f"--quantize {args.quantize} takes no --{beside[0]}; leave one of them out")
    try:
        find_adapter(model).check_int8(model)
    except (ValueError, TypeError) as error:
        raise UserError(f"--quantize {args.quantize}: {error}") from error


def gflops(model: nn.Module) -> float | None:
    """1e9 multiply-adds per image; None for a family whose cost is unknown."""
    from tokcomp import UnsupportedModelError, flops

    try:
        return round(flops(model) / 1e9, 6)
    except UnsupportedModelError:
        # A family that cannot be compressed can still be used as it is.
        return None
