"""tokcomp compare."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokcomp.cli import options, training
from tokcomp.cli.compare.parts import calibration_images, fit_probe, make_model, make_refiner, make_searches
from tokcomp.cli.data import add_data_options, data_config, data_root, scored_images
from tokcomp.cli.errors import RunFailed, UserError, blame, check_output_folder, save
from tokcomp.cli.model_arguments import model_settings
from tokcomp.cli.refine import add_refine_options
from tokcomp.cli.table import table
from tokcomp.runs.recipe import SEARCH_RECIPE

if TYPE_CHECKING:
    import torch

    from tokcomp.compare.entries import Entry
    from tokcomp.compare.run import Comparison
    from tokcomp.methods import Method
    from tokcomp.runs.distributed import World
    from tokcomp.runs.steps import StopRequest

DESCRIPTION = """\
Every method at every budget, at equal cost, on your model and your images: the tables of the papers in one command.

  diffrate    the schedule published for this model and budget if there is one, otherwise a searched one
  search      a searched schedule (the DiffRate paper's gradient search on --search-images of the training images)
  refine      the best of a search, ToMe, EViT, uniform and published schedules, moved on by the loss with tokens really
              dropped, on --refine-images of the training images: never worse than these there
  published   the published schedule that is nearest in cost, rescaled to the model's tokens; for a model that has none,
              of any model with as many blocks
  tome, pitome  with the r that meets the budget
  evit, visionzip, divprune, cdpruner  with the keep rate in three blocks that meets it
  dtome, ats  with thresholds, or a number of samples, whose mean cost on 256 training images meets it: images keep
              different numbers of tokens
  dynamicvit, spvit, evovit  with the keep rate that meets it; the checkpoint must have the first two's trained parts
  avit        with the halting threshold whose mean cost meets it; the checkpoint must be one that was trained with it
  uniform     each block but the first drops the same share of its tokens, half by pruning and half by merging
  random:N    N random schedules; the other methods' rows say how many of them they beat
  tome/merge  another method's numbers of tokens under DiffRate's merging, or pruning (evit/prune, diffrate/merge, ...):
              what the numbers alone do

Searched schedules are fitted to the very budget, and all are kept in the output folder for 'tokcomp evaluate'. Each
row has top-1, its difference from the best with a paired 95 % interval, the share of images that get the uncompressed
model's answer, cross entropy, and images per second measured on this device in turns with the uncompressed model.
Recommended at a budget is the fastest of the methods that the images cannot tell from the best.

DATA is a folder that contains 'train' and 'val' with one sub-folder per class, or --dataset names any of timm's data
sets. The output folder gets results.json, written after each cell, compare.html, and explore.html, which steps through
what each method does to the first images. Ctrl-C, SIGTERM and --minutes stop cleanly; the same command goes on from
there, and one with more methods or budgets computes only what is new.
"""

EXAMPLES = """\
examples:
  tokcomp compare --dataset digits -m tokcomp_digits_vit --pretrained --methods tome evit uniform --gflops 0.012 0.009
      the bundled model on the bundled digits, no download
  tokcomp compare /data/imagenet -m deit_small_patch16_224 --pretrained --gflops 3.4 2.9 2.3 --images 5000 \\
      --methods diffrate tome evit uniform random:30
      DiffRate's Tables 1 and 2 and Figure 4 for DeiT-S
  tokcomp compare /data/imagenet -m deit_small_patch16_224 --pretrained --methods search --gflops 2.9 \\
      --metrics cls_attn image_attn random --pipelines prune merge --search-images 1000 4000 --epochs 3 10
      its Table 4: searches that differ in one thing each
  tokcomp compare /data/pets -m vit_small_patch14_dinov2 --checkpoint backbone.safetensors --img-size 224 \\
      --probe 3000 --methods published tome evit --gflops 3
      a backbone without a classifier gets one, fitted on 3000 training images
  tokcomp compare /data/imagenet -m deit_base_patch16_224 --pretrained --methods search --gflops 8.7 \\
      --schedule-of deit-small-compare
      its Figure 6: schedules found for another model
  torchrun --nproc-per-node 8 -m tokcomp compare /data/imagenet -m deit_base_patch16_224 --pretrained --gflops 11.5
      on 8 GPUs, which share the images
"""

#: Fields of the search's recipe that have an option here; epochs have their own.
_RECIPE_FIELDS = ("lr", "aa", "hflip", "smoothing", "mixup", "cutmix", "drop_path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tokcomp compare DATA [-m NAME] [--methods METHOD ...] --gflops G ... [-o DIR] [options]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = add_data_options(parser, batch_size=64)
    data.add_argument("--split", default="validation", help="part of the data set to measure on (default: %(default)s)")
    data.add_argument(
        "--images",
        dest="num_samples",
        type=options.positive_int,
        metavar="N",
        help="measure on N images, spread over the classes (default: all)",
    )
    data.add_argument("--train-split", default="train", help="part to search and probe on (default: %(default)s)")
    options.add_model_options(parser, default="deit_small_patch16_224")
    parser.add_argument(
        "--probe",
        type=options.positive_int,
        metavar="N",
        help="fit a linear classifier on N training images, for a model without one",
    )
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--methods",
        nargs="+",
        default=["diffrate", "tome", "evit", "uniform"],
        metavar="METHOD",
        help="see above (default: diffrate tome evit uniform)",
    )
    what.add_argument(
        "--gflops",
        nargs="+",
        type=options.positive_float,
        required=True,
        metavar="G",
        help="budgets, 1e9 multiply-adds per image",
    )
    what.add_argument(
        "--schedule-of",
        nargs="+",
        type=Path,
        default=[],
        metavar="OTHER",
        help="schedules of other models, rescaled and fitted: a file, or the output folder of another comparison, of "
        "whose searched schedules the one that is nearest in cost is taken",
    )
    what.add_argument(
        "--seeds", type=options.positive_int, default=1, metavar="N", help="searches per budget (default: 1)"
    )
    _add_search_options(parser)
    speed = parser.add_argument_group("precision and speed")
    speed.add_argument("--amp", action="store_true", help="automatic mixed precision in bfloat16")
    speed.add_argument("--model-dtype", choices=("float32", "float16", "bfloat16"), help="convert the weights")
    speed.add_argument(
        "--speed-batch",
        type=options.non_negative_int,
        default=16,
        metavar="N",
        help="images in a batch when speed is measured; 0: do not measure it (default: %(default)s)",
    )
    options.add_quantize_option(speed, "measure every method but random schedules with int8 products as well")
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", type=Path, default=Path("tokcomp-compare"), metavar="DIR", help="default: %(default)s"
    )
    output.add_argument(
        "--pictures",
        type=options.non_negative_int,
        default=2,
        metavar="N",
        help="images on the page to show what is kept (default: %(default)s)",
    )
    output.add_argument(
        "--minutes", type=options.positive_float, metavar="M", help="stop cleanly after the cell in hand at that time"
    )
    output.add_argument("--json", action="store_true", help="print results.json rather than tables")


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "searches (of several values the first is what every search uses; the others make one more row each)"
    )
    group.add_argument(
        "--search-images",
        nargs="+",
        type=options.positive_int,
        default=[1000],
        metavar="N",
        help="training images to search on (default: 1000)",
    )
    group.add_argument(
        "--epochs",
        nargs="+",
        type=options.positive_float,
        metavar="E",
        help=f"passes over the whole training set's number of images (default: {SEARCH_RECIPE.epochs})",
    )
    group.add_argument(
        "--steps", type=options.positive_int, metavar="N", help="length of a search, instead of --epochs"
    )
    group.add_argument("--metrics", nargs="+", metavar="M", help="what ranks tokens: cls_attn, image_attn, ...")
    group.add_argument("--pipelines", nargs="+", metavar="P", help="prune_merge, merge_prune, prune, merge")
    group.add_argument("--match-inference", action="store_true", help="as for tokcomp search")
    group.add_argument("--granularity", type=options.positive_int, default=4, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--search-batch-size", type=options.positive_int, default=1024, metavar="N", help="default: %(default)s"
    )
    group.add_argument(
        "--grad-accum-steps", type=options.positive_int, default=1, metavar="N", help="as for tokcomp search"
    )
    training.add_recipe_options(group, _RECIPE_FIELDS, SEARCH_RECIPE)
    add_refine_options(group, switch=False)


def run(args: argparse.Namespace) -> int:
    from tokcomp.runs.steps import DivergedError, StopRequest

    check_output_folder("--output", args.output)
    root = data_root(args)
    entries = _entries(args)
    with options.joined(args) as (device, world), StopRequest() as stop:
        comparison = _prepare(args, root, entries, device, world, stop)
        try:
            finished = comparison.run(stop)
        except DivergedError as error:
            raise RunFailed(str(error)) from error
        except OSError as error:
            raise UserError(
                f"--output must be writable, got '{args.output}' ({error}); choose another folder"
            ) from error
        shown = sorted(set(args.gflops)) if finished and args.pictures else []
        methods = {gflops: comparison.methods_at(gflops) for gflops in shown}
        if world.is_main and comparison.done:
            _report(args, comparison, methods, finished)
        return 0 if finished else stop.exit_status or 1


def _entries(args: argparse.Namespace) -> list[Entry]:
    from tokcomp.compare.entries import Entry, Variant, parse_methods, sweep, with_seeds

    if args.steps is not None and args.epochs is not None:
        raise UserError("--steps and --epochs both set the length of the searches, got both; keep one")
    lists = {"metrics": args.metrics, "pipelines": args.pipelines, "images": args.search_images, "epochs": args.epochs}
    first = {name: None if not values else values[0] for name, values in lists.items()}
    variant = Variant(first["metrics"], first["pipelines"], first["images"], first["epochs"], args.seed)
    with blame("--methods"):
        entries = with_seeds(parse_methods(args.methods, variant), args.seeds)
    try:
        entries += sweep(variant, **{name: values[1:] for name, values in lists.items() if values})
        sweep(variant, metrics=(args.metrics or [])[:1], pipelines=(args.pipelines or [])[:1])
    except ValueError as error:
        raise UserError(f"--{error}") from error
    entries += [Entry(f"schedule of {other.stem}", "file", file=other) for other in args.schedule_of]
    for other in args.schedule_of:
        if not other.exists():
            raise UserError(f"--schedule-of must be a file or a folder, got '{other}', which does not exist")
    return entries


def _prepare(
    args: argparse.Namespace,
    root: Path | None,
    entries: list[Entry],
    device: torch.device,
    world: World,
    stop: StopRequest,
) -> Comparison:
    import torch

    from tokcomp.compare.build import Builder
    from tokcomp.compare.cells import weights_digest
    from tokcomp.compare.run import Comparison, Images, Plan
    from tokcomp.runs.batches import held_out_batches
    from tokcomp.runs.steps import seed_all

    seed_all(args.seed)  # for random weights
    dtype = getattr(torch, args.model_dtype or "float32")
    head = fit_probe(args, root, device, world) if args.probe else None
    model = make_model(args, head, device).to(dtype)
    options.check_quantize(args, model)
    dataset = scored_images(args, root, args.split, model, "mark")
    start = held_out_batches(
        dataset, args.batch_size, workers=args.workers, pin_memory=device.type == "cuda", world=world
    )
    facts = {
        "model": args.model,
        "model_settings": model_settings(args),
        "weights": options.describe_weights(args) + (f", head fitted on {args.probe} images" if args.probe else ""),
        "weights_digest": weights_digest(model),
        "data": args.dataset or str(root),
        "split": args.split,
        "img_size": data_config(args, model)["input_size"][-1],
    }
    searches = make_searches(args, root, head, facts, device, world, stop)
    refiner = make_refiner(args, root, model, facts, world, stop)
    try:
        builder = Builder(
            model, args.model, searches.find, refiner.find, partial(calibration_images, args, root, model)
        )
    except TypeError as error:
        raise UserError(f"--model '{args.model}': {error}") from error
    dense = builder.ruler.flops(None) / 1e9
    for gflops in args.gflops:
        if gflops >= dense:
            raise UserError(f"--gflops must be below the uncompressed model's {dense:.4g}, got {gflops:g}")
    plan = Plan(
        entries,
        args.gflops,
        facts,
        dtype=dtype,
        amp_dtype=torch.bfloat16 if args.amp else None,
        speed_batch=args.speed_batch,
        int8=args.quantize == "int8",
        minutes=args.minutes,
        command=shlex.join(["tokcomp", *sys.argv[1:]]),
    )
    images = Images(start, len(dataset))
    return Comparison(model, images, builder, plan, args.output, device=device, world=world, show_progress=True)


def _report(
    args: argparse.Namespace, comparison: Comparison, methods: dict[float, dict[str, Method]], finished: bool
) -> None:
    from tokcomp.cli.explorer import page_of_comparison
    from tokcomp.compare.page import draw_kept, render
    from tokcomp.compare.recommend import overall_sentence, sentence
    from tokcomp.compare.run import RESULTS
    from tokcomp.compare.summary import header, table_of

    path = args.output / RESULTS
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    title = f"tokcomp compare: {args.model}"
    pictures: list[bytes] = []
    explorer = None
    if any(methods.values()):
        config = data_config(args, comparison.model)
        images = comparison.images.first(args.pictures).to(comparison.device, comparison.plan.dtype)
        pictures = draw_kept(comparison.model, methods[min(methods)], images, config["mean"], config["std"])
        explorer = "explore.html"
        page = page_of_comparison(comparison, record, methods, config, args.pictures)
        save("--output", args.output / explorer, page)
    save("--output", args.output / "compare.html", render(record, title, pictures, explorer))
    if args.json:
        print(text, end="")
    else:
        columns = header(record)
        for budget in record["budgets"]:
            print(f"At {budget['target']:g} GFLOPs, {record['num_images']} images")
            print(table(columns, table_of(record, budget)))
            if budget["recommended"]:
                print(sentence(budget["recommended"]))
            print()
        if record["recommended"]:
            print(overall_sentence(record["recommended"]))
        print(f"written: {path}, {args.output / 'compare.html'}")
    if not finished:
        print(
            f"stopped after {len(comparison.done)} of {len(comparison.plan.cells)} cells; the same command goes on "
            "from here",
            file=sys.stderr,
        )
