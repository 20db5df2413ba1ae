"""What the commands of this folder share: their options, the backbone with a head at one size, a record in a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokcomp.cli.errors import UserError
from tokcomp.compare.probe import attach_head, features_of, fit_head
from tokcomp.files import write_whole
from tokcomp.measure.info import machine, package_versions

from benchmarks.reproduce.pretrained.images import DEBIAN
from benchmarks.reproduce.pretrained.plan import QUICK, Settings
from benchmarks.reproduce.pretrained.study import CPU, Sources, passes_for

SIZE = 112
SETTINGS = Settings(shares=(0.75, 0.55), head=1500, test=500)


def parser_of(module: str, text: str | None, output: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="vit_s_focus.onnx")
    parser.add_argument("--data", type=Path, default=DEBIAN, metavar="DIR", help="IDX files (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=output, metavar="PATH", help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="all of it in miniature: random weights, pictures of noise"
    )
    return parser


def sources_of(args: argparse.Namespace) -> Sources:
    if args.quick:
        return Sources(None, None)
    if args.weights is None or not args.weights.is_file():
        raise UserError(f"--weights must be the file vit_s_focus.onnx, got '{args.weights}'; see --help")
    return Sources(args.weights, args.data)


def with_head(sources: Sources, settings: Settings, size: int, **more: Any) -> tuple[Any, Callable[[], Any]]:
    """The backbone, its attributes set to ``more``, with a head fitted on it; and what begins a pass to measure on."""
    training, testing = sources.images(settings)
    model: Any = sources.backbone(size, settings)
    for name, value in more.items():
        setattr(model, name, value)
    _, batches = passes_for(model, size)
    weight, bias, _ = fit_head(*features_of(model, batches(training, settings.head, 0)(), CPU))
    attach_head(model, weight, bias)
    return model, batches(testing, settings.test, 0)


def record_of(sources: Sources, settings: Settings, size: int, **found: Any) -> dict[str, Any]:
    facts = {**sources.describe(), "img_size": size, "head_images": settings.head, "images": settings.test}
    return {"facts": facts, "machine": machine(), "versions": package_versions(), **found}


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[Sources, Settings, int], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    argv: Sequence[str] | None,
    settings: Settings = SETTINGS,
) -> int:
    """Writes the record of ``run`` into the file --output, and prints its ``text``."""
    args = parser.parse_args(argv)
    try:
        sources = sources_of(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record = run(sources, QUICK, QUICK.sizes[0]) if args.quick else run(sources, settings, SIZE)
    write_whole(args.output, json.dumps(record, indent=1) + "\n")
    print(text(record))
    return 0
