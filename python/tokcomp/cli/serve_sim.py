"""tokcomp serve-sim."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.data import add_data_options, data_root, scored_images
from tokcomp.cli.degrees import add_degree_options, add_plugin_options, build_degrees, load_plugin
from tokcomp.cli.errors import UserError, blame, check_output_folder, save
from tokcomp.cli.table import table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tokcomp import Switchable
    from tokcomp.runs.data import Part
    from tokcomp.serve.load import Profile
    from tokcomp.serve.policy import Policy
    from tokcomp.serve.report import Run
    from tokcomp.serve.server import Server

DIGITS_MODEL = "tokcomp_digits_vit"
DEGREES = (0, 8, 12, 16, 20)
#: What a run writes into its folder.
RESULTS, TABLE, PICTURE, REQUESTS = "results.json", "table.txt", "serve-sim.png", "requests.csv"

DESCRIPTION = """\
Serve a load that rises and falls, switching the degree of compression by the length of the queue.

Requests, one image each, arrive at random (a Poisson process) at a rate that climbs from --base to --peak, stays there
and comes down again; both are in units of the model's capacity at the first of --degrees, which is measured first.
One thread sends them when they are due, another takes them from the queue in batches of up to --batch-size. The same
requests are served once at each fixed degree, and once by the queue's length: --up and --down say how many waiting
requests raise the degree by one step, and how few lower it. Latency is measured from when a request was due to when its
batch was done; images are decoded beforehand.

Without DATA it serves the held-out digits with the bundled digits model, without a download, in under a minute.
"""

EXAMPLES = """\
examples:
  tokcomp serve-sim
  tokcomp serve-sim --plugin plugin/tocom.safetensors --degrees 0,8,16 --seconds 20 -o served
      with a plugin from 'tokcomp tocom train' for the bundled model
  tokcomp serve-sim /data/imagenet -m deit_small_patch16_224 --pretrained --plugin tocom.safetensors \\
      --degrees 0,4,8,12,16 -b 4 --seconds 60
  tokcomp serve-sim /data/imagenet -m deit_small_patch16_224 --pretrained --method evit --degrees 0,8,16 --rate 400
      a load of 1 means 400 images per second

It writes results.json, table.txt, serve-sim.png and requests.csv, which has every request of every run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=16, batch_help="most images in a batch; ")
    data.add_argument("--split", default="validation", help="part of the data set (default: %(default)s)")
    data.add_argument(
        "--num-samples",
        type=options.positive_int,
        default=360,
        metavar="N",
        help="images to hold in memory and serve, spread over the classes (default: %(default)s)",
    )
    options.add_model_options(parser, default=DIGITS_MODEL)
    options.add_adapter_option(parser)
    add_plugin_options(parser, required=False)
    add_degree_options(parser)
    serving = parser.add_argument_group("serving")
    serving.add_argument(
        "--degrees",
        type=options.list_of(options.non_negative_int),
        metavar="D,D,...",
        help="degrees to switch between, ascending (default: 0,8,12,16,20, as far as plugin and model allow; "
        "diffrate: all of --schedules)",
    )
    serving.add_argument(
        "--source",
        type=options.non_negative_int,
        default=0,
        metavar="D",
        help="degree at which the weights were trained (default: %(default)s)",
    )
    serving.add_argument(
        "--max-wait-ms",
        type=options.non_negative_float,
        default=2.0,
        metavar="MS",
        help="longest time that the first image of a batch waits for others (default: %(default)s)",
    )
    serving.add_argument(
        "--up",
        type=options.list_of(options.positive_int),
        metavar="N,N,...",
        help="waiting requests, the batch's own included, that raise each degree to the next (default: 2, 3, 4 "
        "... full batches)",
    )
    serving.add_argument(
        "--down",
        type=options.list_of(options.positive_int),
        metavar="N,N,...",
        help="waiting requests that undo each such step, below --up (default: 1/2, 1, 3/2 ... full batches)",
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--seconds", type=options.positive_float, default=7.0, metavar="S", help="run length (default: %(default)s)"
    )
    load.add_argument(
        "--peak", type=options.positive_float, default=1.5, metavar="X", help="highest load (default: %(default)s)"
    )
    load.add_argument(
        "--base",
        type=options.non_negative_float,
        default=0.2,
        metavar="X",
        help="load at both ends (default: %(default)s)",
    )
    load.add_argument(
        "--rate",
        type=options.positive_float,
        metavar="N",
        help="images per second for a load of 1 (default: as measured at the first degree)",
    )
    load.add_argument("--seed", type=options.non_negative_int, default=0, metavar="N", help="default: %(default)s")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--model-dtype", choices=("float32", "float16", "bfloat16"), help="convert the weights (default: as they are)"
    )
    output.add_argument(
        "-o", "--output", type=Path, default=Path("serve-sim-output"), metavar="DIR", help="default: %(default)s"
    )
    output.add_argument("--json", action="store_true", help="print the result as JSON rather than as a table")


def run(args: argparse.Namespace) -> int:
    check_output_folder("--output", args.output)
    if find_spec("matplotlib") is None:
        raise UserError("serve-sim needs matplotlib for its picture; pip install 'tokcomp[demo]'")
    if args.data is None and args.data_dir is None and not args.dataset:
        args.dataset = "digits"
    if args.model == DIGITS_MODEL and args.checkpoint is None:
        args.pretrained = True
    if args.base > args.peak:
        raise UserError(f"--base must not be above --peak, got {args.base:g} and {args.peak:g}")
    root = data_root(args)
    device = options.chosen_device(args.device)
    import torch

    from tokcomp.measure.info import machine, package_versions
    from tokcomp.serve import report

    started = time.perf_counter()
    plain = options.build_model(args)
    part = scored_images(args, root, args.split, plain)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else next(plain.parameters()).dtype
    model = _switchable(args, plain, device, dtype)
    policies = _policies(args, model.degrees)
    images, labels = _load(args, part, device, dtype)
    weights = options.describe_weights(args)
    _say(f"{args.model} ({weights}), {len(labels)} images of {args.dataset or root}, on {device}")
    if weights == "random weights":
        _say("The weights are random, so the accuracy is chance: pass --pretrained or --checkpoint FILE.")
    capacities = _capacities(args, model, images, device)
    profile = _profile(args, capacities[model.degrees[0]])
    runs = _serve(args, model, policies, images, labels, profile, device)
    summaries = [report.summary(one) for one in runs]
    result = {
        "model": args.model,
        "weights": weights,
        "data": args.dataset or str(root),
        "plugin": None if args.plugin is None else str(args.plugin),
        "scale": args.scale,
        "source": args.source,
        "methods": {str(degree): repr(model.method(degree)) for degree in model.degrees},
        "max_batch": args.batch_size,
        "max_wait_ms": args.max_wait_ms,
        "thresholds": {"up": list(policies[-1].up), "down": list(policies[-1].down)},
        "images_per_second": {str(degree): round(rate, 2) for degree, rate in capacities.items()},
        "load": {"seed": args.seed, "points": [[round(number, 4) for number in point] for point in profile.points]},
        "policies": summaries,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "machine": machine(),
        "versions": package_versions(),
    }
    _write(args, result, runs, profile)
    if not args.json:
        print(f"{time.perf_counter() - started:.0f} seconds.")
    return 0


def _switchable(args: argparse.Namespace, plain: Any, device: torch.device, dtype: torch.dtype) -> Switchable:
    from tokcomp import Switchable, ToCom, UnsupportedModelError

    plugin = None if args.plugin is None else load_plugin(args, plain)
    try:
        methods, highest = build_degrees(args, plain)
    except UnsupportedModelError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    if plugin is not None and highest is not None and highest != plugin.max_degree:
        raise UserError(f"--schedules must be {plugin.max_degree}, one per degree of the plugin above 0, got {highest}")
    limit = plugin.max_degree if plugin is not None else highest
    degrees = args.degrees
    if degrees is None and highest is not None:
        degrees = list(range(highest + 1))
    elif degrees is None:
        degrees = [degree for degree in DEGREES if limit is None or degree <= limit]
        degrees = degrees if len(degrees) > 1 else [0, limit]
    if len(degrees) < 2 or any(first >= second for first, second in pairwise(degrees)):
        raise UserError(f"--degrees must be two or more, rising, got {','.join(map(str, degrees))}")
    for option, degree in (("--degrees", degrees[-1]), ("--source", args.source)):
        if limit is not None and degree > limit:
            whose = "the plugin's" if plugin is not None else "those of --schedules"
            raise UserError(f"{option} must be from 0 to {limit}, as {whose} are, got {degree}")
    plain.to(device, dtype)
    with blame(f"--degrees for {args.model}"):
        try:
            # An untrained plugin adds nothing, so every degree has the model's own weights.
            tocom = plugin or ToCom(plain, rank=1, max_degree=max(degrees[-1], args.source, 1))
            return Switchable(plain, tocom.to(device), args.source, degrees, methods, args.scale)
        except UnsupportedModelError as error:
            raise UserError(f"--model '{args.model}': {error}") from error


def _policies(args: argparse.Namespace, degrees: list[int]) -> list[Any]:
    """Every fixed degree, then the policy that follows the queue."""
    from tokcomp.serve.policy import Fixed, QueueLength

    usual = QueueLength.by_batches(degrees, args.batch_size)
    with blame("--up and --down"):
        adaptive = QueueLength(degrees, args.up or usual.up, args.down or usual.down)
    return [*map(Fixed, degrees), adaptive]


def _load(args: argparse.Namespace, part: Part, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images [n, 3, H, W], normalized, and labels [n], in memory."""
    import torch

    from tokcomp.runs.batches import held_out_batches

    workers = 0 if args.dataset == "digits" else args.workers
    with blame("DATA"):
        batches = list(held_out_batches(part, 64, workers=workers)())
    if not batches:
        raise UserError("DATA must hold at least one image, got none")
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    images = images.to(dtype)
    return images.pin_memory() if device.type == "cuda" else images, labels


def _server(args: argparse.Namespace, model: Switchable, policy: Policy, device: torch.device | None) -> Server:
    from tokcomp.serve.server import Server

    return Server(model, policy, max_batch=args.batch_size, max_wait_ms=args.max_wait_ms, device=device)


def _capacities(args: argparse.Namespace, model: Switchable, images: Tensor, device: torch.device) -> dict[int, float]:
    """Images per second at each degree, with a queue that never runs dry."""
    from tokcomp.serve.load import capacity
    from tokcomp.serve.policy import Fixed

    model.prepare(images[: args.batch_size].to(device))
    found = {}
    for degree in model.degrees:
        with _server(args, model, Fixed(degree), device) as server:
            found[degree] = capacity(server, images)
    _say("images/s with a full queue: " + ", ".join(f"{rate:.0f} at degree {degree}" for degree, rate in found.items()))
    return found


def _profile(args: argparse.Namespace, measured: float) -> Profile:
    from tokcomp.serve.load import Profile

    unit = args.rate or measured
    profile = Profile.hill(args.seconds, args.base * unit, args.peak * unit)
    count = profile.expected()
    if count < 10:
        raise UserError(f"--seconds must be long enough for 10 requests or more, got {count:.1f} on average; raise it")
    rates = f"{args.base * unit:.0f} to {args.peak * unit:.0f} requests/s"
    _say(f"load: {rates}, {args.seconds:g} s, about {count:.0f} requests")
    return profile


def _serve(
    args: argparse.Namespace,
    model: Switchable,
    policies: list[Any],
    images: Tensor,
    labels: Tensor,
    profile: Profile,
    device: torch.device,
) -> list[Run]:
    """The same requests under each policy."""
    from tqdm import tqdm

    from tokcomp.serve.load import choose_images, send
    from tokcomp.serve.report import collect, summary

    arrivals = profile.arrivals(args.seed)
    chosen = choose_images(len(labels), len(arrivals), args.seed)
    runs = []
    for number, policy in enumerate(policies, start=1):
        label = f"{number}/{len(policies)} {policy.name}"
        bar = tqdm(total=len(arrivals), desc=label, unit=" requests", leave=False, disable=None, file=sys.stderr)
        with bar, _server(args, model, policy, device) as server:

            def show(sent: int, _: float, bar: Any = bar, server: Server = server) -> None:
                bar.set_postfix_str(f"{server.waiting} waiting, degree {server.degree}", refresh=False)
                bar.update(sent - bar.n)

            start, answers = send(server, images, arrivals, chosen, on_progress=show)
        runs.append(collect(policy.name, start, answers, chosen, labels))
        one = summary(runs[-1])
        _say(f"{label}: p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms, top-1 {one['top1']:.2f} %")
    return runs


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(args: argparse.Namespace, result: dict[str, Any], runs: list[Run], profile: Profile) -> None:
    from tokcomp.serve import report
    from tokcomp.serve.plot import draw

    text = table(*report.table_of(result["policies"]))
    title = f"{args.model}, {args.method}, batches of up to {args.batch_size}, on {result['device']}"
    files: dict[str, str | bytes] = {
        PICTURE: draw(runs, result["policies"], profile, title=title),
        REQUESTS: report.as_csv(runs),
        TABLE: text + "\n",
        RESULTS: json.dumps(result, indent=2) + "\n",
    }
    for name, content in files.items():
        save("--output", args.output / name, content)
    print(json.dumps(result, indent=2) if args.json else text)
    if not args.json:
        print("\n".join(f"written: {args.output / name}" for name in files))
