"""tokcomp dense visualize."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tokcomp.cli import dense, options
from tokcomp.cli.dense.evaluate import add_plugin_options, check_degrees, open_plugin
from tokcomp.cli.errors import blame, check_output_file, save
from tokcomp.cli.pictures import check_overwrites, png_bytes

DESCRIPTION = """\
Draw some held-out images, their masks, and a segmenter's predictions at some degrees of compression: one row per image.
Class 0 is dark, every other class has its own colour, and unlabelled pixels are grey.
"""

EXAMPLES = """\
examples:
  tokcomp dense visualize segmenter.safetensors --degrees 0,64,128 --num-samples 4 -o drawn.png
  tokcomp dense visualize segmenter.safetensors --plugin tocom.safetensors --tokens-per-degree 16 --degrees 0,8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    dense.add_segmenter_options(parser)
    dense.add_data_options(parser, batch_size=1, train=False, held_out=True)
    parser.set_defaults(num_samples=4)
    group = dense.add_degree_options(parser)
    dense.add_method_option(group)
    group.add_argument(
        "--degrees", type=options.list_of(options.non_negative_int), default=[0], metavar="D,D,...", help="default: 0"
    )
    add_plugin_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("tokcomp-dense.png"), metavar="FILE", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    check_overwrites("--output", [check_output_file("--output", args.output)])
    device = options.chosen_device(args.device)
    from PIL import Image

    from tokcomp.dense.picture import paint_mask
    from tokcomp.visualize import join_columns, join_rows

    segmenter, settings, size = dense.open_segmenter(args)
    encoder: Any = segmenter.to(device).encoder
    plugin = open_plugin(args, encoder)
    check_degrees(args, args.degrees, plugin)
    data = dense.open_data(args, settings, size, train=False)
    columns: list[list[tuple[str, Image.Image]]] = []
    for index in range(len(data)):
        picture, mask = data.pair(index)
        columns.append([("image", picture), ("truth", paint_mask(mask, len(settings.classes)))])
    for degree in args.degrees:
        dense.compress_encoder(args, segmenter, degree)
        if plugin is not None:
            with blame("--plugin"):
                plugin.fold(encoder, args.source, degree, args.scale)
        for index, row in enumerate(columns):
            predicted = segmenter.predict(data[index][0][None].to(device))[0].cpu().numpy()
            title = f"r = {degree * args.tokens_per_degree}" + (" with plugin" if plugin is not None else "")
            row.append((title, paint_mask(predicted, len(settings.classes))))
    drawing = join_rows([join_columns(row) for row in columns])
    save("--output", args.output, png_bytes(drawing))
    print(f"written: {args.output}")
    return 0
