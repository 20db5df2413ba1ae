"""tokcomp evaluate."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokcomp.cli import method_options, options
from tokcomp.cli.data import (
    add_data_options,
    add_strict_option,
    check_classes,
    data_config,
    data_root,
    marking,
    open_data,
    report_oddities,
    strict_error,
)
from tokcomp.cli.errors import UserError, check_output_file, save
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.table import table

if TYPE_CHECKING:
    import torch
    from torch.utils.data import Dataset

    from tokcomp.measure.evaluate import Evaluation
    from tokcomp.runs.distributed import World

DESCRIPTION = """\
Accuracy (top-1, top-5) and speed of a model, compressed or not, on labelled images.

DATA is a folder with one sub-folder per class (or one that contains such a folder named 'val' or 'validation'), or
--dataset names any of timm's data sets: torch/..., hfds/..., wds/... . '--dataset digits' is the set that comes with
tokcomp, for a first try with '--model tokcomp_digits_vit --pretrained'.
"""

EXAMPLES = """\
examples:
  tokcomp evaluate --dataset digits -m tokcomp_digits_vit --pretrained --method tome --r 8
      the bundled model on the bundled digits, no download
  tokcomp evaluate /data/imagenet -m deit_small_patch16_224 --pretrained
      the model as it is
  tokcomp evaluate /data/imagenet -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3
      the schedule that the DiffRate paper published for this model and budget
  tokcomp evaluate /data/imagenet -m deit_small_patch16_224 --pretrained --method tome --gflops 2.3 --amp
      ToMe with r chosen to cost 2.3 GFLOPs (1e9 multiply-adds) per image, in mixed precision
  tokcomp evaluate /data/imagenet -m deit_base_patch16_224 --checkpoint mine.safetensors \\
      --method diffrate --schedule mine.json --num-samples 5000 --results-file result.json
      your own weights and schedule, on 5000 images spread over the set
  tokcomp evaluate /data/imagenet -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3 \\
      --quantize int8 --device cpu
      compressed, and its linear layers in int8
  torchrun --nproc-per-node 8 -m tokcomp evaluate /data/imagenet -m deit_small_patch16_224 --pretrained
      on 8 GPUs, each evaluating every eighth image
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tokcomp evaluate DATA [-m NAME] [--method METHOD ...] [options]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=64)
    data.add_argument("--split", default="validation", help="part of the data set (default: %(default)s)")
    data.add_argument(
        "--num-samples", type=options.positive_int, metavar="N", help="evaluate N images spread evenly over the set"
    )
    add_strict_option(data)
    options.add_model_options(parser, default="deit_small_patch16_224")
    options.add_adapter_option(parser)
    method_options.add_method_options(parser)
    options.add_quantize_option(options.add_precision_options(parser), "compute the blocks' linear layers in int8")
    options.add_result_options(parser)


@dataclass(frozen=True)
class _Job:
    """The command's options, where the images are, and this process's place among those that evaluate."""

    args: argparse.Namespace
    root: Path | None
    device: torch.device
    world: World

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and images."""
        import torch

        name = self.args.model_dtype or "float32"
        found: torch.dtype = getattr(torch, name)
        return found

    @property
    def amp_dtype(self) -> torch.dtype | None:
        import torch

        if not self.args.amp:
            return None
        name = self.args.amp_dtype or ("float16" if self.device.type == "cuda" else "bfloat16")
        found: torch.dtype = getattr(torch, name)
        return found

    def dataset(self) -> Dataset[Any]:
        """This process's share of the images; the whole of a stream."""
        from torch.utils.data import IterableDataset

        from tokcomp.data import EveryNth, SpreadSubset

        dataset = open_data(self.args, self.root, self.args.split, marking(self.args))
        if isinstance(dataset, IterableDataset):
            return dataset
        if self.args.num_samples is not None:
            dataset = SpreadSubset(dataset, self.args.num_samples)
        return dataset if self.world.size == 1 else EveryNth(dataset, self.world.rank, self.world.size)

    def batches(self, dataset: Dataset[Any], config: dict[str, Any]) -> tuple[Iterator[Any], int | None]:
        """Batches of images and labels, and how many images they hold if that is known."""
        from timm.data import create_loader
        from torch.utils.data import IterableDataset

        from tokcomp.data import num_images

        transform = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        loader = create_loader(
            cast(Any, dataset),
            batch_size=self.args.batch_size,
            use_prefetcher=False,
            num_workers=self.args.workers,
            persistent_workers=False,
            pin_memory=self.device.type == "cuda",
            device=self.device,
            **{name: config[name] for name in transform},
        )
        if not isinstance(dataset, IterableDataset):
            return iter(loader), num_images(dataset)
        wanted = self.args.num_samples
        return islice(loader, None if wanted is None else -(-wanted // self.args.batch_size)), wanted

    def evaluate(self, model: Any, dataset: Dataset[Any], config: dict[str, Any]) -> Evaluation:
        """Evaluate ``model`` with a progress bar on stderr, and say errors in the command's words."""
        from tqdm import tqdm

        from tokcomp.data import UnreadableImageError
        from tokcomp.measure.evaluate import evaluate

        batches, total = self.batches(dataset, config)
        hidden = None if self.world.is_main else True
        with tqdm(total=total, unit=" images", leave=False, disable=hidden, file=sys.stderr) as bar:

            def advance(seen: int, top1: float) -> None:
                bar.set_postfix_str(f"top-1 {top1:.2f} %", refresh=False)
                bar.update(seen - bar.n)

            place: dict[str, Any] = {"device": self.device, "dtype": self.dtype, "world": self.world}
            try:
                return evaluate(model, batches, amp_dtype=self.amp_dtype, on_batch=advance, **place)
            except UnreadableImageError as error:
                raise strict_error(error) from error
            except ValueError as error:
                raise UserError(
                    f"the data set does not fit the model: {error}; check --num-classes and --class-map"
                ) from error
            except KeyboardInterrupt:
                bar.close()
                print(f"stopped after {bar.n} images; nothing was written", file=sys.stderr)
                raise


def run(args: argparse.Namespace) -> int:
    if args.results_file is not None:
        check_output_file("--results-file", args.results_file)
    root = data_root(args)
    with options.joined(args) as (device, world):
        return _run(_Job(args, root, device, world))


def _run(job: _Job) -> int:
    import torch

    from tokcomp import quantize

    args = job.args
    model = options.build_model(args)
    dataset = job.dataset()
    check_classes(args, dataset, model.num_classes)
    method = method_options.build_method(args, model)
    method_options.compress_by(args, model, method)
    cost = options.gflops(model)
    model.to(job.device, job.dtype)
    options.check_quantize(args, model)
    if args.quantize is not None:
        quantize(model, args.quantize)
    runner = torch.compile(model) if args.torchcompile else model
    config = data_config(args, model)
    first_batch: list[torch.Tensor] = []  # whose cost is shown where it depends on the images
    if method is not None and method.varies:
        model.register_forward_pre_hook(lambda _, given: None if first_batch else first_batch.append(given[0]))
    found = job.evaluate(runner, dataset, config)
    if first_batch and cost is not None:
        cost = options.gflops(model, first_batch[0])
    if job.world.is_main or found.unreadable:
        report_oddities(dataset, found, model.num_classes)
    result = {
        "model": args.model,
        "model_settings": model_settings(args),
        "weights": options.describe_weights(args),
        "method": args.method,
        "method_settings": repr(method) if method is not None else None,
        "gflops": cost,
        "data": args.dataset or str(job.root),
        "num_images": found.num_images,
        "num_unreadable": found.num_unreadable,
        "num_not_finite": found.num_not_finite,
        "top1": round(found.top1, 4),
        "top5": round(found.top5, 4),
        "images_per_second": round(found.images_per_second, 2),
        "batch_size": args.batch_size,
        "img_size": config["input_size"][-1],
        "device": str(job.device),
        "processes": job.world.size,
        "dtype": str(job.dtype).removeprefix("torch."),
        "amp": args.amp,
        "quantize": args.quantize,
        "torch": torch.__version__,
    }
    if job.world.is_main:
        _report(args, result)
    return 0


def _report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Shown before it is saved: a disk that is full takes only the file."""
    text = json.dumps(result, indent=2)
    if args.json:
        print(text)
    else:
        _show(result)
    if args.results_file is not None:
        save("--results-file", args.results_file, text + "\n")
        if not args.json:
            print(f"written: {args.results_file}")


def _show(result: dict[str, Any]) -> None:
    settings = result["method_settings"] or "uncompressed"
    print(f"{result['model']} ({result['weights']}), {settings}")
    row = [
        f"{result['top1']:.2f} %",
        f"{result['top5']:.2f} %",
        "-" if result["gflops"] is None else f"{result['gflops']:.4g}",
        f"{result['images_per_second']:.1f}",
        f"{result['num_images']}",
        ", ".join([result["device"], result["quantize"] or result["dtype"], *(["amp"] if result["amp"] else [])]),
    ]
    print(table(["top-1", "top-5", "GFLOPs", "images/s", "images", "on"], [row]))
    if result["weights"] == "random weights":
        print("The weights are random, so the accuracy is chance: pass --pretrained or --checkpoint FILE.")
