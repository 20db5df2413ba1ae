"""tokcomp tocom ACTION."""

from __future__ import annotations

import argparse
from importlib import import_module

#: action -> (module, one line)
ACTIONS = {
    "train": ("tokcomp.cli.tocom.train", "train a plugin on a frozen model, by self-distillation"),
    "apply": ("tokcomp.cli.tocom.apply", "write a checkpoint with a plugin folded in"),
    "evaluate": ("tokcomp.cli.tocom.evaluate", "accuracy with and without a plugin, by source and target degree"),
}

DESCRIPTION = """\
Move a trained model between compression degrees without training (ToCom). A plugin is trained once for a backbone; it
then serves every model that was fine-tuned from it, at any degree: ToMe's tokens merged per block, EViT's tokens
dropped per block, or the position in a list of DiffRate schedules.
"""

EXAMPLES = """\
examples:
  tokcomp tocom train --dataset digits -m tokcomp_digits_vit --pretrained --max-degree 12 -b 64 --epochs 5 \\
      --mixup 0 --cutmix 0 -o plugin
      a plugin for the bundled model, no download
  tokcomp tocom evaluate --dataset digits -m tokcomp_digits_vit --pretrained --plugin plugin/tocom.safetensors
      its effect on the accuracy at each degree
  tokcomp tocom apply -m tokcomp_digits_vit --pretrained --plugin plugin/tocom.safetensors --source 0 --target 12 \\
      -o digits-at-12.safetensors
      weights to run at degree 12
  tokcomp tocom ACTION --help
      more examples, for large models
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (module, text) in ACTIONS.items():
        action = actions.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        import_module(module).add_arguments(action)


def run(args: argparse.Namespace) -> int | None:
    status: int | None = import_module(ACTIONS[args.action][0]).run(args)
    return status
