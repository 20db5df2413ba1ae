"""tokcomp dense evaluate."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import dense, options
from tokcomp.cli.degrees import load_plugin
from tokcomp.cli.errors import UserError, blame, check_output_file, save
from tokcomp.cli.table import table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokcomp.dense.evaluate import Windows
    from tokcomp.dense.files import SegmenterSettings
    from tokcomp.tocom.plugin import ToCom

DESCRIPTION = """\
Mean intersection over union, pixel accuracy and images per second of a segmenter at some degrees of compression, with
and without a plugin, and by DiffRate's schedules. GFLOPs are 1e9 multiply-adds of the encoder. Images and masks are
resized to the segmenter's size; --full-resolution scores as benchmarks do.
"""

EXAMPLES = """\
examples:
  tokcomp dense evaluate segmenter.safetensors --degrees 0,64,96,128
      on generated pictures, merging up to 128 tokens for each MLP
  tokcomp dense evaluate ade.safetensors --data-dir /data/ADEChallengeData2016 --reduce-zero-label \\
      --plugin tocom.safetensors --tokens-per-degree 32 --degrees 0,8,12,16
      the degrees of the ToCom paper's Table 11, with and without a plugin
  tokcomp dense evaluate caformer.safetensors --data-dir /data/ADEChallengeData2016 --reduce-zero-label \\
      --img-size 512,704 --gflops 5.2,6.0 --full-resolution
      a CAFormer with Semantic FPN as it is and by the published schedules, on windows over the whole photographs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    dense.add_segmenter_options(parser)
    dense.add_data_options(parser, batch_size=8, train=False, held_out=True)
    group = dense.add_degree_options(parser)
    group.add_argument(
        "--degrees",
        type=options.list_of(options.non_negative_int),
        metavar="D,D,...",
        help="default: five from 0 to the plugin's highest, or only 0 without a plugin",
    )
    dense.add_method_option(group)
    group.add_argument(
        "--gflops",
        type=options.list_of(options.positive_float),
        default=[],
        metavar="G,G,...",
        help="also by DiffRate's published schedules of the encoder, for its own number of tokens",
    )
    group.add_argument("--schedule", type=Path, nargs="+", default=[], metavar="FILE", help="also by these schedules")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--full-resolution",
        action="store_true",
        help="windows of --img-size slide over each image, as small as they fit into; scored at the mask's own size",
    )
    scoring.add_argument(
        "--stride",
        type=options.listed(options.positive_int),
        metavar="N[,N]",
        help="pixels between windows, down and across (default: two thirds of the window)",
    )
    add_plugin_options(parser)
    options.add_result_options(parser)


def add_plugin_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plugin")
    group.add_argument("--plugin", type=Path, metavar="FILE", help="from tokcomp dense tocom or tokcomp tocom train")
    group.add_argument("--scale", type=options.non_negative_float, default=0.1, metavar="S", help="default: 0.1")
    group.add_argument(
        "--source", type=options.non_negative_int, default=0, metavar="D", help="training degree (default: 0)"
    )


def open_plugin(args: argparse.Namespace, encoder: Any) -> ToCom | None:
    """The plugin that the options name, for this encoder."""
    if args.plugin is None:
        return None
    return load_plugin(argparse.Namespace(plugin=args.plugin, model="segmenter"), encoder)


def check_degrees(args: argparse.Namespace, degrees: list[int], plugin: ToCom | None) -> None:
    for degree in [*degrees, args.source]:
        if plugin is not None and degree > plugin.max_degree:
            raise UserError(f"--degrees and --source must be from 0 to the plugin's {plugin.max_degree}, got {degree}")


def _scoring(
    args: argparse.Namespace, settings: SegmenterSettings, size: tuple[int, int]
) -> tuple[Callable[[], Iterator[Any]], Windows | None]:
    """What starts a pass over the data, and the windows that slide at full resolution."""
    from tokcomp.dense.evaluate import Windows
    from tokcomp.runs.batches import held_out_batches

    if not args.full_resolution:
        if args.stride is not None:
            raise UserError("--stride belongs to --full-resolution, got no such option; add it or leave --stride out")
        data = dense.open_data(args, settings, size, train=False)
        return held_out_batches(data, args.batch_size, workers=args.workers), None
    stride = dense.image_size(args.stride, "--stride") or (max(1, size[0] * 2 // 3), max(1, size[1] * 2 // 3))
    if any(step > side for step, side in zip(stride, size, strict=True)):
        raise UserError(f"--stride must be at most the window, {size[0]},{size[1]}, got {stride[0]},{stride[1]}")
    data = dense.open_data(args, settings, size, train=False, whole=True)
    return held_out_batches(data, 1, workers=args.workers), Windows(size, stride, args.batch_size)


def run(args: argparse.Namespace) -> int:
    if args.results_file is not None:
        check_output_file("--results-file", args.results_file)
    device = options.chosen_device(args.device)
    import tokcomp
    from tokcomp.dense.evaluate import evaluate_segmenter

    segmenter, settings, size = dense.open_segmenter(args)
    encoder: Any = segmenter.to(device).encoder
    plugin = open_plugin(args, encoder)
    highest = 0 if plugin is None else plugin.max_degree
    degrees = args.degrees or sorted({round(part * highest / 4) for part in range(5)})
    check_degrees(args, degrees, plugin)
    schedules = list(dense.schedules_of(args, encoder, settings.model, size))
    start, windows = _scoring(args, settings, size)
    rows: list[dict[str, Any]] = []

    def score() -> dict[str, Any]:
        with blame("the data"):
            found = evaluate_segmenter(segmenter, start(), device=device, windows=windows)
        return {
            "gflops": round(tokcomp.flops(encoder, img_size=size) / 1e9, 6),
            "mean_iou": found.scores.mean_iou,
            "pixel_accuracy": found.scores.pixel_accuracy,
            "iou": [None if math.isnan(value) else value for value in found.scores.iou],
            "images_per_second": found.images_per_second,
            "images": found.num_images,
        }

    for degree in degrees:
        dense.compress_encoder(args, segmenter, degree)
        row = {"degree": degree, "r": degree * args.tokens_per_degree, **score()}
        if plugin is not None:
            with blame("--plugin"):
                plugin.fold(encoder, args.source, degree, args.scale)
            row["mean_iou_with_plugin"] = score()["mean_iou"]
            plugin.unfold(encoder)
        rows.append(row)
    for name, method in schedules:
        with blame("--schedule" if args.schedule else "--gflops"):
            tokcomp.compress(encoder, method)
        rows.append({"degree": None, "r": None, "schedule": name, **score()})
    images = rows[0]["images"]
    result = {
        "segmenter": str(args.segmenter),
        "model": settings.model,
        "head": settings.head,
        "img_size": list(size),
        "classes": list(settings.classes),
        "images": images,
        "method": dense.method_of(args, segmenter.hierarchical)(0).name,
        "full_resolution": args.full_resolution,
        "plugin": None if plugin is None else str(args.plugin),
        "source": args.source,
        "scale": args.scale,
        "device": str(device),
        "degrees": rows,
    }
    print(json.dumps(result, indent=2) if args.json else _table(result))
    if args.results_file is not None:
        save("--results-file", args.results_file, json.dumps(result, indent=2) + "\n")
    return 0


def _table(result: dict[str, Any]) -> str:
    header = ["degree", "r", "GFLOPs", "mIoU %", "pixels %", "images/s"]
    if result["plugin"] is not None:
        header.insert(4, "with plugin")
    lines = []
    for row in result["degrees"]:
        names = [row["schedule"], ""] if row["degree"] is None else [str(row["degree"]), str(row["r"])]
        cells = [*names, f"{row['gflops']:.3g}", f"{row['mean_iou']:.2f}"]
        if result["plugin"] is not None:
            cells.append(f"{row['mean_iou_with_plugin']:.2f}" if "mean_iou_with_plugin" in row else "")
        lines.append([*cells, f"{row['pixel_accuracy']:.2f}", f"{row['images_per_second']:.1f}"])
    height, width = result["img_size"]
    what = f"{result['model']}, {result['head']}, {result['images']} images, {height} x {width}, {result['device']}"
    return f"{what}\n{table(header, lines)}"
