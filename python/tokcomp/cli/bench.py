"""tokcomp bench: the command-line side of :mod:`tokcomp.bench`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, check_output_folder

EXAMPLES = """\
examples:
  tokcomp bench
      DeiT-S at the smallest published budget, batches 1 and 16, float32
  tokcomp bench -m deit_base_patch16_224 --gflops 8.7 -b 1024 --precision float16 --device cuda --torchcompile
      a row of the DiffRate paper's Table 1, with torch.compile as well
  tokcomp bench --method tome --r 13 -b 16 --precision bfloat16 --results timings
      ToMe; adds a JSON record and a picture to the folder 'timings'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from tokcomp.bench.cli import add_arguments as add_bench_arguments

    add_bench_arguments(parser)
    parser.epilog = EXAMPLES


def run(args: argparse.Namespace) -> int:
    import tokcomp.assets  # noqa: F401  registers the digits model with timm
    from tokcomp.bench.cli import run as run_bench

    options.chosen_device(args.device)
    options.check_model_name(args.model)
    if args.schedule is not None and not args.schedule.is_file():
        raise UserError(f"--schedule must be a JSON file, got '{args.schedule}', which is not there")
    if args.results is not None:
        check_output_folder("--results", args.results)
        if find_spec("matplotlib") is None:
            raise UserError("--results draws a picture with matplotlib; pip install 'tokcomp[demo]' or leave it out")
    try:
        return run_bench(args)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
