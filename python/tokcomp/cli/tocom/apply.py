"""tokcomp tocom apply."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokcomp.cli import options
from tokcomp.cli.degrees import add_plugin_options, load_plugin
from tokcomp.cli.errors import UserError, blame, check_output_file
from tokcomp.cli.model_arguments import model_settings
from tokcomp.files import write_whole

DESCRIPTION = """\
Adapt the weights of a model trained at one compression degree to another. The result is an ordinary checkpoint, for
timm, for --checkpoint, or for tokcomp.compress; running it costs nothing extra.
"""

EXAMPLES = """\
examples:
  tokcomp tocom apply -m deit_base_patch16_224 --checkpoint mine.safetensors --plugin tocom.safetensors \\
      --source 0 --target 16 -o mine-at-16.safetensors
  tokcomp evaluate DATA -m deit_base_patch16_224 --checkpoint mine-at-16.safetensors --method tome --r 16
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    options.add_model_options(parser, default="deit_base_patch16_224")
    add_plugin_options(parser)
    degrees = parser.add_argument_group("degrees")
    for name, text in (("source", "at which the weights were trained"), ("target", "at which they are to run")):
        degrees.add_argument(f"--{name}", type=options.non_negative_int, required=True, metavar="D", help=text)
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the checkpoint, safetensors")


def run(args: argparse.Namespace) -> int:
    if not (args.pretrained or args.checkpoint):
        raise UserError("a plugin needs trained weights, got none; pass --checkpoint FILE or --pretrained")
    check_output_file("--output", args.output)
    _check_source(args)
    from tokcomp.reading import tensors_to_bytes

    model = options.build_model(args)
    plugin = load_plugin(args, model)
    with blame("--source and --target"):
        plugin.fold(model, args.source, args.target, args.scale)
    facts = {
        "model": args.model,
        "num_classes": model.num_classes,
        "model_settings": model_settings(args),
        "weights": options.describe_weights(args),
        "tocom": {"plugin": str(args.plugin), "source": args.source, "target": args.target, "scale": args.scale},
        "method": plugin.method,
    }
    try:
        write_whole(args.output, tensors_to_bytes(model.state_dict(), {"tokcomp": json.dumps(facts)}))
    except OSError as error:
        raise UserError(f"--output '{args.output}' could not be written ({error})") from error
    print(f"written: {args.output} (degree {args.source} to {args.target} at scale {args.scale:g})")
    return 0


def _check_source(args: argparse.Namespace) -> None:
    """Refuse a checkpoint that this command made for a degree other than --source."""
    from tokcomp.reading import parse_json, read_metadata

    if args.checkpoint is None:
        return
    try:
        degree = parse_json(read_metadata(args.checkpoint).get("tokcomp", "{}"))["tocom"]["target"]
    except (ValueError, KeyError, TypeError):
        return  # not such a checkpoint
    if degree != args.source:
        raise UserError(
            f"--source must be {degree}, the degree that a plugin in '{args.checkpoint}' made its weights for, got "
            f"{args.source}; start from the weights without a plugin, or pass --source {degree}"
        )
