"""`tokcomp bench`: how fast a model is under a method, against the published pipeline and against timm."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

import tokcomp
from tokcomp.adapters import find_adapter
from tokcomp.bench.models import PRECISIONS, Entry, compare_models, create_model
from tokcomp.bench.report import draw, table
from tokcomp.equal_cost import evit_blocks
from tokcomp.measure.provenance import device_name, find_device, provenance, save_record
from tokcomp.measure.timing import MIN_ROUNDS
from tokcomp.methods import Method
from tokcomp.schedule import published_budgets

#: Who runs, in the order of the table; compiled ones where asked for.
EAGER = ("published", "timm", "tokcomp")
COMPILED = ("published-compiled", "timm-compiled", "tokcomp-compiled")

DESCRIPTION = """\
Times a timm vision transformer on random images: the method's published pipeline in eager PyTorch, timm as it is, and
tokcomp; with --torchcompile each of them compiled as well, and on a GPU tokcomp as a CUDA graph. All take turns in one
process; a figure is the median over the rounds with the least and the most beside it. Nothing is timed unless the
logits agree and two runs give the same bits."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments, named as timm's benchmark.py names them."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", "-m", default="deit_small_patch16_224", help="timm model name (default: %(default)s)"
    )
    parser.add_argument("--pretrained", action="store_true", help="pretrained weights (default: random; same speed)")
    parser.add_argument(
        "--method", choices=("diffrate", "tome", "evit"), default="diffrate", help="default: %(default)s"
    )
    parser.add_argument("--gflops", type=float, help="DiffRate: published budget of the model (default: the smallest)")
    parser.add_argument("--schedule", type=Path, metavar="FILE", help="DiffRate: schedule as JSON, instead of --gflops")
    parser.add_argument("--r", type=int, default=13, help="ToMe: tokens merged per block (default: %(default)s)")
    parser.add_argument(
        "--keep-rate", type=float, default=0.7, help="EViT: share of tokens kept (default: %(default)s)"
    )
    parser.add_argument("--batch-size", "-b", type=int, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--torchcompile", action="store_true", help="time each of them under torch.compile as well")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="turns per competitor (default: %(default)s)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="add a JSON record and a picture to this folder")


def run(args: argparse.Namespace) -> int:
    """Run the comparison; prints the table and returns the exit status."""
    device = find_device(args.device)
    if min(args.batch_size) < 1 or args.rounds < 1:
        raise ValueError("--batch-size and --rounds must be at least 1")
    model = create_model(args.model, pretrained=args.pretrained)
    geometry = find_adapter(model).geometry(model)
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"--model must be a timm VisionTransformer, which the published pipeline runs on, got {args.model}; "
            "tokcomp evaluate measures other families"
        )
    method = build_method(args, geometry.depth)
    competitors: tuple[str, ...] = EAGER
    if args.torchcompile:
        competitors += (*COMPILED, "tokcomp-graph") if device.type == "cuda" else COMPILED
    entries = {name: Entry(name, None if name.startswith("timm") else method) for name in competitors}
    baseline = "published"
    if device.type == "cpu" and args.precision != "float32":
        # Half precision is a choice of ours here: the published pipeline's best on CPU may be float32.
        baseline = "published-float32"
        entries = {baseline: Entry("published", method, precision="float32"), **entries}
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    title = f"{args.model}, {method_name(args)}, {args.precision}, {device_name(device)}{threads}"
    print(title)
    rows, not_measured = compare_models(
        model,
        entries,
        batch_sizes=args.batch_size,
        precision=args.precision,
        device=device,
        baseline=baseline,
        rounds=args.rounds,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(table(rows))
    for missing in not_measured:
        print(f"not measured: {missing.name}, batch {missing.batch}: {missing.reason}")
    if args.results is not None:
        record: dict[str, Any] = {
            "provenance": provenance(device),
            "command": "bench",
            "model": args.model,
            "method": repr(method),
            "rows": [row.to_json() for row in rows],
            "not_measured": [missing.to_json() for missing in not_measured],
        }
        path = save_record(args.results, record)
        draw(rows, title, path.with_suffix(".png"))
        print(f"saved {path} and {path.with_suffix('.png').name}")
    return 0


def build_method(args: argparse.Namespace, depth: int) -> Method:
    """The method that the arguments name, for a model of this many blocks."""
    if args.method == "tome":
        return tokcomp.ToMe(args.r)
    if args.method == "evit":
        return tokcomp.EViT(args.keep_rate, evit_blocks(depth))
    if args.schedule is not None:
        return tokcomp.DiffRate(tokcomp.CompressionSchedule.load(args.schedule))
    return tokcomp.DiffRate.published(args.model, smallest_budget(args.model) if args.gflops is None else args.gflops)


def smallest_budget(model: str) -> float:
    """The smallest published budget of a model.

    Raises:
        ValueError: no schedule was published for it.
    """
    budgets = published_budgets()
    known = model if model in budgets else model.split(".", 1)[0]
    if known not in budgets:
        raise ValueError(f"--schedule is needed: no schedule was published for {model}, only for {', '.join(budgets)}")
    return min(budgets[known])


def method_name(args: argparse.Namespace) -> str:
    """The method and its setting in a few words."""
    if args.method == "tome":
        return f"ToMe r = {args.r}"
    if args.method == "evit":
        return f"EViT keep rate {args.keep_rate:g}"
    if args.schedule is not None:
        return f"DiffRate {args.schedule.name}"
    return f"DiffRate {smallest_budget(args.model) if args.gflops is None else args.gflops:g} GFLOPs"


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m tokcomp.bench.cli``: the command on its own."""
    parser = argparse.ArgumentParser(prog="tokcomp bench")
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
