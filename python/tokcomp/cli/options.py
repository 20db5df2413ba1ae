"""Options that several commands share, named as in timm, and what they build."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli.errors import UserError, blame
from tokcomp.cli.misfits import load_checkpoint
from tokcomp.cli.model_arguments import add_model_kwargs, add_pooling_option, model_settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokcomp.runs.distributed import World


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got '{text}'") from None


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


def add_merge_residual_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--merge-residual",
        action="store_true",
        help="tome_mlp: merged positions share one token after the MLP, rather than only the MLP's output",
    )


def add_result_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    output = parser.add_argument_group("output")
    output.add_argument("--results-file", type=Path, metavar="FILE", help="write the result as JSON")
    output.add_argument("--json", action="store_true", help="print the result as JSON rather than as a table")
    return output


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


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[tuple[torch.device, World]]:
    """The device, and this process's place among those that torchrun started, which end together."""
    from tokcomp.runs.distributed import join, leave, local_device

    device = local_device(chosen_device(args.device))
    try:
        world = join(device)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    try:
        yield device, world
    finally:
        leave()


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
        first, *details = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {first}"
        if args.pretrained and details and "loading state_dict" in first:
            cure = "leave out the options that make it another model"
            if args.gp is not None:
                cure = "add --model-kwargs fc_norm=False, which leaves a ViT's norm before its pooling, or omit --gp"
            raise UserError(
                f"--pretrained: the weights of '{args.model}' do not fit it as it was built ({details[0].strip()}); "
                f"{cure}"
            ) from error
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


def gflops(model: nn.Module, images: torch.Tensor | None = None) -> float | None:
    """1e9 multiply-adds per image, or the mean over images [B, 3, H, W]; None for a family whose cost is unknown."""
    from tokcomp import UnsupportedModelError, flops

    try:
        return round(flops(model, images=images) / 1e9, 6)
    except UnsupportedModelError:
        # A family that cannot be compressed can still be used as it is.
        return None
