"""tokcomp bench: how fast a model is with a method, against the published pipeline and against timm."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, check_output_folder
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.schedules import add_rescale_option, fitted, load_schedule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tokcomp.bench.entries import Entry
    from tokcomp.methods import Method

DESCRIPTION = """\
Times a timm vision transformer on random images: the method's published pipeline in eager PyTorch, the uncompressed
model in timm, ONNX Runtime and OpenVINO (pip install 'tokcomp[bench]'), and tokcomp, on a CPU in int8 as well; with
--torchcompile PyTorch's compiled too, and on a GPU tokcomp as a CUDA graph. All take turns in one process; a figure is
the median over the rounds with the least and the most beside it. Nothing is timed unless the logits agree and two runs
of tokcomp give the same bits. The first lines say how fast tokcomp is over the best uncompressed rival, whoever that is
here."""

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
    """The options, named as in timm's benchmark.py."""
    from tokcomp.bench.models import PRECISIONS
    from tokcomp.measure.timing import MIN_ROUNDS

    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    options.add_model_options(parser, default="deit_small_patch16_224")
    group = parser.add_argument_group("compression")
    group.add_argument(
        "--method", choices=("diffrate", "tome", "evit"), default="diffrate", help="default: %(default)s"
    )
    group.add_argument("--gflops", type=float, help="DiffRate: published budget of the model (default: the smallest)")
    group.add_argument("--schedule", type=Path, metavar="FILE", help="DiffRate: schedule as JSON")
    add_rescale_option(group)
    group.add_argument("--r", type=int, default=13, help="ToMe: tokens merged per block (default: %(default)s)")
    group.add_argument("--keep-rate", type=float, default=0.7, help="EViT: share of tokens kept (default: %(default)s)")
    group = parser.add_argument_group("measurement")
    group.add_argument("--batch-size", "-b", type=int, nargs="+", default=[1, 16], metavar="N", help="default: 1 16")
    group.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="default: %(default)s")
    group.add_argument("--torchcompile", action="store_true", help="also time each of them under torch.compile")
    group.add_argument("--no-rivals", action="store_true", help="time only timm among the uncompressed rivals")
    group.add_argument("--stock", action="store_true", help="also time tokcomp with the model's own attention")
    group.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="turns per competitor (default: %(default)s)")
    group.add_argument("--results", type=Path, metavar="DIR", help="add a JSON record and a picture to this folder")


def run(args: argparse.Namespace) -> int:
    device = options.chosen_device(args.device)
    if args.results is not None:
        check_output_folder("--results", args.results)
        if find_spec("matplotlib") is None:
            raise UserError("--results draws a picture with matplotlib; pip install 'tokcomp[demo]' or leave it out")
    import torch

    torch.manual_seed(0)  # for random weights
    model = options.build_model(args)
    try:
        return _run(args, model, device)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _run(args: argparse.Namespace, model: Any, device: torch.device) -> int:
    """Run the comparison; prints the table and returns the exit status."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from tokcomp.adapters import find_adapter
    from tokcomp.bench.models import compare_models
    from tokcomp.bench.report import draw, headline, table
    from tokcomp.measure.provenance import device_name, provenance, save_record

    if min(args.batch_size) < 1 or args.rounds < 1:
        raise ValueError("--batch-size and --rounds must be at least 1")
    geometry = find_adapter(model).geometry(model)
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"--model must be a timm VisionTransformer, which the published pipeline runs on, got {args.model}; "
            "tokcomp evaluate measures other families"
        )
    method = _method(args, model, geometry.depth)
    entries = _entries(args, method, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    title = f"{args.model}, {_method_name(args)}, {args.precision}, {device_name(device)}{threads}"
    print(title)
    rows, not_measured = compare_models(
        model,
        entries,
        batch_sizes=args.batch_size,
        precision=args.precision,
        device=device,
        rounds=args.rounds,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(headline(rows))
    print(table(rows))
    for missing in not_measured:
        print(f"not measured: {missing.name}, batch {missing.batch}: {missing.reason}")
    if args.results is not None:
        record: dict[str, Any] = {
            "provenance": provenance(device),
            "command": "bench",
            "model": args.model,
            "model_settings": model_settings(args),
            "method": repr(method),
            "rows": [row.to_json() for row in rows],
            "not_measured": [missing.to_json() for missing in not_measured],
        }
        path = save_record(args.results, record)
        draw(rows, title, path.with_suffix(".png"))
        print(f"saved {path} and {path.with_suffix('.png').name}")
    return 0


def _entries(args: argparse.Namespace, method: Method, device: torch.device) -> dict[str, Entry]:
    """Who runs, in the order of the table."""
    from tokcomp.bench.entries import FLOAT32, Entry, uncompressed_rivals

    entries = {"published": Entry("published", method)}
    if device.type == "cpu" and args.precision != "float32":
        # On a CPU the published pipeline may be the faster in float32, which its users would then choose.
        entries[f"published{FLOAT32}"] = Entry("published", method, precision="float32")
    if args.torchcompile:
        entries["published-compiled"] = Entry("published-compiled", method)
    compiled: bool = args.torchcompile
    entries |= uncompressed_rivals(
        device, args.precision, compiled=compiled, autotuned=compiled, others=not args.no_rivals
    )
    stacks = ["tokcomp", *(["tokcomp-compiled"] if args.torchcompile else [])]
    stacks += ["tokcomp-stock"] if args.stock else []
    stacks += ["tokcomp-int8"] if device.type == "cpu" and args.precision == "float32" else []
    if device.type == "cpu" and args.precision == "float32" and not args.no_rivals:
        stacks += ["tokcomp-onnx", "tokcomp-onnx-int8"]
    stacks += ["tokcomp-graph"] if args.torchcompile and device.type == "cuda" else []
    return entries | {name: Entry(name, method) for name in stacks}


def _method(args: argparse.Namespace, model: nn.Module, depth: int) -> Method:
    """The method that the arguments name, for a model of this many blocks."""
    import tokcomp
    from tokcomp.equal_cost import evit_blocks

    if args.method == "tome":
        return tokcomp.ToMe(args.r)
    if args.method == "evit":
        return tokcomp.EViT(args.keep_rate, evit_blocks(depth))
    if args.schedule is not None:
        schedule = load_schedule(args.schedule, "--schedule", model=args.model, gflops=args.gflops)
    else:
        gflops = _smallest_budget(args.model) if args.gflops is None else args.gflops
        schedule = tokcomp.DiffRate.published(args.model, gflops).schedule
    return tokcomp.DiffRate(fitted(schedule, model, args.model, rescale=args.rescale))


def _smallest_budget(model: str) -> float:
    """The smallest published budget of a model.

    Raises:
        ValueError: no schedule was published for it.
    """
    from tokcomp.schedule import published_budgets

    budgets = published_budgets()
    known = model if model in budgets else model.split(".", 1)[0]
    if known not in budgets:
        raise ValueError(f"--schedule is needed: no schedule was published for {model}, only for {', '.join(budgets)}")
    return min(budgets[known])


def _method_name(args: argparse.Namespace) -> str:
    """The method and its setting in a few words."""
    if args.method == "tome":
        return f"ToMe r = {args.r}"
    if args.method == "evit":
        return f"EViT keep rate {args.keep_rate:g}"
    if args.schedule is not None:
        return f"DiffRate {args.schedule.name}"
    return f"DiffRate {_smallest_budget(args.model) if args.gflops is None else args.gflops:g} GFLOPs"
