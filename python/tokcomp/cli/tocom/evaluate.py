"""tokcomp tocom evaluate."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import method_options, options
from tokcomp.cli.data import (
    add_data_options,
    add_strict_option,
    data_root,
    marking,
    report_oddities,
    scored_images,
    strict_error,
)
from tokcomp.cli.degrees import add_degree_options, add_plugin_options, build_degrees, load_plugin
from tokcomp.cli.errors import UserError, blame, check_output_file, save
from tokcomp.cli.table import table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from tokcomp.measure.evaluate import Evaluation
    from tokcomp.methods import Method
    from tokcomp.tocom.plugin import ToCom

DESCRIPTION = """\
Accuracy of models trained at some degrees (source) and run at others (target), with and without a plugin, and images
per second. At equal degrees the plugin adds nothing.

DATA is as for 'tokcomp evaluate'. Without --source, the model's own weights (--pretrained, --checkpoint) count as
trained at degree 0.
"""

EXAMPLES = """\
examples:
  tokcomp tocom evaluate /data/imagenet -m deit_base_patch16_224 --pretrained --plugin tocom.safetensors --amp
  tokcomp tocom evaluate /data/cifar100 -m deit_base_patch16_224 --num-classes 100 --plugin tocom.safetensors \\
      --source 0=at0.safetensors 16=at16.safetensors --targets 0,8,16 --heat-map gains.png
"""


def _source(text: str) -> tuple[int, Path | None]:
    degree, _, file = text.partition("=")
    return options.non_negative_int(degree), Path(file) if file else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=64)
    add_strict_option(data)
    data.add_argument("--split", default="validation", help="part of the data set (default: %(default)s)")
    data.add_argument(
        "--num-samples", type=options.positive_int, metavar="N", help="evaluate N images spread over the classes"
    )
    options.add_model_options(parser, default="deit_base_patch16_224")
    options.add_adapter_option(parser)
    add_plugin_options(parser)
    add_degree_options(parser)
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--source",
        type=_source,
        nargs="+",
        metavar="D[=FILE]",
        help="training degrees, each with its checkpoint (default: 0, with the model's own weights)",
    )
    grid.add_argument(
        "--targets",
        type=options.list_of(options.non_negative_int),
        metavar="D,D,...",
        help="degrees to run at (default: five from 0 to the plugin's highest)",
    )
    options.add_precision_options(parser)
    output = options.add_result_options(parser)
    output.add_argument("--heat-map", type=Path, metavar="FILE", help="draw the gains as a PNG picture")


def run(args: argparse.Namespace) -> int:
    for option, path in (("--heat-map", args.heat_map), ("--results-file", args.results_file)):
        if path is not None:
            check_output_file(option, path)
    if args.heat_map is not None and find_spec("matplotlib") is None:
        raise UserError("--heat-map needs matplotlib; pip install 'tokcomp[demo]'")
    root = data_root(args)
    import torch

    device = options.chosen_device(args.device)
    sources = _sources(args)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else torch.float32
    cells: list[dict[str, Any]] = []
    for degree, checkpoint in sources:
        if checkpoint is not None:
            args.checkpoint = checkpoint
        model = options.build_model(args)
        plugin = load_plugin(args, model)
        _check_plugin(args, plugin, [degree for degree, _ in sources])
        method_at, highest = build_degrees(args, model)
        if highest is not None and highest != plugin.max_degree:
            raise UserError(
                f"--schedules must be {plugin.max_degree}, one per degree of the plugin above 0, got {highest}"
            )
        targets = args.targets or sorted({round(part * plugin.max_degree / 4) for part in range(5)})
        score = _scorer(args, root, model, device, dtype)
        model.to(device, dtype)
        cells += [_cell(args, model, plugin, method_at, degree, target, score) for target in targets]
    result = {
        "model": args.model,
        "sources": {str(degree): str(path) if path else options.describe_weights(args) for degree, path in sources},
        "plugin": str(args.plugin),
        "scale": args.scale,
        "method": args.method,
        "data": args.dataset or str(root),
        "device": str(device),
        "cells": cells,
    }
    _report(args, result)
    return 0


def _sources(args: argparse.Namespace) -> list[tuple[int, Path | None]]:
    sources: list[tuple[int, Path | None]] = args.source or [(0, None)]
    degrees = [degree for degree, _ in sources]
    if len(set(degrees)) < len(degrees):
        raise UserError(f"--source must name each degree once, got {', '.join(map(str, degrees))}")
    own = [degree for degree, path in sources if path is None]
    if own and not (args.pretrained or args.checkpoint):
        raise UserError(
            f"--source {own[0]} takes the model's own weights, got none; pass --pretrained, --checkpoint FILE, or "
            f"--source {own[0]}=FILE"
        )
    if len(own) > 1:
        raise UserError(f"--source must name a FILE for all degrees but one, got none for {own[0]} and {own[1]}")
    if args.pretrained and len(own) < len(sources):
        raise UserError("--pretrained and checkpoints by --source exclude each other; leave one of the two out")
    for degree, path in sources:
        if path is not None and not path.is_file():
            raise UserError(f"--source {degree} must name a file, got '{path}', which does not exist")
    return sources


def _check_plugin(args: argparse.Namespace, plugin: ToCom, sources: Sequence[int]) -> None:
    """Refuse, before anything is scored, degrees or a method that the plugin is not for."""
    if plugin.method not in (None, args.method):
        raise UserError(f"--method must be {plugin.method}, which the plugin was trained with, got {args.method}")
    for name, degrees in (("--source", sources), ("--targets", args.targets or ())):
        degree = max(degrees, default=0)
        if degree > plugin.max_degree:
            raise UserError(f"{name} must be from 0 to {plugin.max_degree}, as the plugin's degrees are, got {degree}")


def _scorer(
    args: argparse.Namespace, root: Path | None, model: Any, device: Any, dtype: Any
) -> Callable[[nn.Module], Evaluation]:
    """Scores a model on the images that the options name."""
    import torch

    from tokcomp.data import UnreadableImageError
    from tokcomp.measure.evaluate import evaluate
    from tokcomp.runs.batches import held_out_batches

    part = scored_images(args, root, args.split, model, marking(args))
    batches = held_out_batches(part, args.batch_size, workers=args.workers, pin_memory=device.type == "cuda")
    amp_dtype = None
    if args.amp:
        amp_dtype = getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "bfloat16"))

    said: list[bool] = []
    classes = int(model.num_classes)

    def score(model: nn.Module) -> Evaluation:
        runner: Any = torch.compile(model) if args.torchcompile else model
        try:
            found = evaluate(runner, batches(), device=device, dtype=dtype, amp_dtype=amp_dtype)
        except UnreadableImageError as error:
            raise strict_error(error) from error
        if not said:
            said.append(True)  # the same for every cell
            report_oddities(part, found, classes)
        return found

    return score


def _cell(
    args: argparse.Namespace,
    model: nn.Module,
    plugin: ToCom,
    method_at: Callable[[int], Method],
    source: int,
    target: int,
    score: Callable[[nn.Module], Evaluation],
) -> dict[str, Any]:
    method_options.compress_by(args, model, method_at(target))
    without = found = score(model)
    if source != target:
        with blame("--plugin"):
            plugin.fold(model, source, target, args.scale)
        found = score(model)
        plugin.unfold(model)
    return {
        "source": source,
        "target": target,
        "without": round(without.top1, 4),
        "with_tocom": round(found.top1, 4),
        "gflops": options.gflops(model),
        "num_images": found.num_images,
        "images_per_second": round(found.images_per_second, 2),
    }


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    cells = result["cells"]
    text = json.dumps(result, indent=2)
    if args.results_file is not None:
        save("--results-file", args.results_file, text + "\n")
    if args.heat_map is not None:
        from tokcomp.tocom.plot import draw_gains

        draw_gains(cells, args.heat_map)
    if args.json:
        print(text)
        return
    print(f"{result['model']}, {result['method']}, top-1 in per cent on {cells[0]['num_images']} images")
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    rows = []
    for source in dict.fromkeys(cell["source"] for cell in cells):
        row = [cell for cell in cells if cell["source"] == source]
        rows.append([f"{source}", *(f"{cell['without']:.2f}" for cell in row)])
        with_tocom = [f"{cell['with_tocom']:.2f}" if cell["target"] != source else "" for cell in row]
        rows.append([f"{source} + ToCom", *with_tocom])
    last = cells[-len(targets) :]
    rows.append(["GFLOPs", *("-" if cell["gflops"] is None else f"{cell['gflops']:.4g}" for cell in last)])
    rows.append(["images/s", *(f"{cell['images_per_second']:.1f}" for cell in last)])
    print(table(["source \\ target", *map(str, targets)], rows))
    for path in (args.heat_map, args.results_file):
        if path is not None:
            print(f"written: {path}")
