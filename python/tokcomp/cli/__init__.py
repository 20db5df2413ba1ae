"""The command line: ``tokcomp COMMAND ...``, one module per command.

A command's module provides ``add_arguments(parser)``, which also gives the parser its description and examples, and
``run(args) -> int | None``. It is imported only when its command is used, so ``tokcomp --help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from tokcomp.cli.errors import UserError

#: command -> (module, one line for the overview)
COMMANDS = {
    "demo": ("tokcomp.cli.demo", "see it work, without a download: accuracy, speed and pictures in one report"),
    "info": ("tokcomp.cli.info", "versions, what was built, devices, and which backend each operator would use"),
    "search": ("tokcomp.cli.search", "find a model's compression schedule for a budget (DiffRate)"),
    "evaluate": ("tokcomp.cli.evaluate", "accuracy and images per second on a folder of images or a timm data set"),
    "compare": ("tokcomp.cli.compare", "every method at every budget at equal cost, on your model and images"),
    "finetune": ("tokcomp.cli.finetune", "train a compressed model: fine-tuning, or from scratch"),
    "tocom": ("tokcomp.cli.tocom", "move a trained model between compression degrees (ToCom)"),
    "dense": ("tokcomp.cli.dense", "segmentation with tokens merged for each MLP: train, compensate, score, draw"),
    "serve-sim": ("tokcomp.cli.serve_sim", "serve a load that rises and falls, at the degree that the queue calls for"),
    "export": ("tokcomp.cli.export", "compile a model into one file for Python and C++ programs"),
    "visualize": ("tokcomp.cli.visualize", "draw which patches a method merges and prunes, block by block"),
    "bench": ("tokcomp.cli.bench", "time a compressed model against timm and the published pipeline"),
}

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one or two lines rather than a page of options."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")


def _overview() -> str:
    lines = ["usage: tokcomp COMMAND [options]", "", "Token compression for timm vision transformers.", "", "commands:"]
    lines += [f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items()]
    lines += [
        "",
        "'tokcomp COMMAND --help' explains a command with examples; 'tokcomp --version' prints the version.",
        "Start with 'tokcomp demo'.",
    ]
    return "\n".join(lines)


def build_parser(command: str) -> Parser:
    """The parser of one command."""
    module = import_module(COMMANDS[command][0])
    parser = Parser(prog=f"tokcomp {command}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    module.add_arguments(parser)
    return parser


def _refuse_command(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see 'tokcomp --help'"
    print(f"tokcomp: error: COMMAND must be one of {', '.join(COMMANDS)}, got '{name}'; {hint}", file=sys.stderr)
    return EXIT_USAGE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] in ("-V", "--version"):
        # Imported here because the version comes with the kernels, and they import torch.
        from tokcomp import __version__

        print(f"tokcomp {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _refuse_command(command)
    try:
        args = build_parser(command).parse_args(rest)
        return import_module(COMMANDS[command][0]).run(args) or 0
    except UserError as error:
        # All processes of a run make the same mistake; only one reports it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"tokcomp {command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\ntokcomp {command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has finished; closing stdout keeps Python from complaining at exit.
        sys.stderr.close()
        return 0
