"""What ``tokcomp compare`` works on: the model with its head, the images to search on, the searches."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options, training
from tokcomp.cli.data import data_config, open_data
from tokcomp.cli.errors import UserError, blame
from tokcomp.runs.recipe import SEARCH_RECIPE

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

    from tokcomp.compare.refining import Refiner
    from tokcomp.compare.searches import Searches, SearchImages
    from tokcomp.runs.distributed import World
    from tokcomp.runs.steps import StopRequest


def make_model(args: argparse.Namespace, head: Any, device: torch.device, **more: Any) -> nn.Module:
    from tokcomp.compare.probe import attach_head

    model = options.build_model(args, **more)
    if head is not None:
        with blame("--probe"):
            attach_head(model, *head)
    if model.num_classes < 1:
        raise UserError(f"{args.model} must have a classifier, got a model without one; add --probe N")
    return model.eval().to(device)


def fit_probe(args: argparse.Namespace, root: Path | None, device: torch.device, world: World) -> Any:
    """Weight and bias of a head for the headless model that the options describe, from its training images."""
    from tokcomp.compare.cells import weights_digest
    from tokcomp.compare.probe import check_headless, features_of, fit_head, kept_head
    from tokcomp.runs.batches import held_out_batches
    from tokcomp.runs.data import Part, spread_sample
    from tokcomp.runs.recipe import plain_transform

    if args.num_classes is not None:
        raise UserError("--probe and --num-classes exclude each other, got both; the images say how many classes it is")
    model = options.build_model(args, num_classes=0).to(device)
    with blame("--probe"):
        check_headless(model)
    dataset = open_data(args, root, args.train_split)
    part = Part(dataset, spread_sample(dataset, args.probe, args.seed), plain_transform(data_config(args, model)))

    def fit() -> Any:
        print(f"fitting a head on {len(part)} images", file=sys.stderr)
        features, labels = features_of(model, held_out_batches(part, args.batch_size, workers=args.workers)(), device)
        return fit_head(features, labels)

    facts = {
        "weights": weights_digest(model),
        "data": [args.dataset or str(root), args.train_split, args.probe, args.seed],
        "img_size": data_config(args, model)["input_size"][-1],
    }
    with blame("--probe"):
        return world.from_main(lambda: kept_head(args.output / "probe.safetensors", facts, fit))


def make_searches(
    args: argparse.Namespace,
    root: Path | None,
    head: Any,
    facts: dict[str, Any],
    device: torch.device,
    world: World,
    stop: StopRequest,
) -> Searches:
    from tokcomp.compare.searches import Searches
    from tokcomp.search.settings import SearchSettings

    given = argparse.Namespace(**{**vars(args), "epochs": None, "batch_size": args.search_batch_size})
    settings = SearchSettings(
        recipe=training.read_recipe(given, SEARCH_RECIPE),
        steps=args.steps,
        granularity=args.granularity,
        match_inference=args.match_inference,
        amp=args.amp,
    )
    described = {**facts, "data": [facts["data"], args.train_split]}
    return Searches(
        partial(make_model, args, head, device, drop_path_rate=settings.recipe.drop_path),
        partial(_search_images, args, root, settings.recipe),
        settings,
        args.output,
        facts=described,
        world=world,
        stop=stop,
        show_progress=True,
    )


def _search_images(args: argparse.Namespace, root: Path | None, recipe: Any, model: Any) -> SearchImages:
    from tokcomp.compare.searches import SearchImages
    from tokcomp.data import num_images
    from tokcomp.runs.data import check_labels, spread_sample, training_part

    dataset = open_data(args, root, args.train_split)
    with blame("--train-split"):
        check_labels(dataset, model.num_classes)
    config = data_config(args, model)

    def part(count: int | None) -> Dataset[Any]:
        indices = None if count is None else spread_sample(dataset, count, args.seed)
        return training_part(dataset, indices, recipe, config)

    return SearchImages(part, num_images(dataset), workers=args.workers, pieces=args.grad_accum_steps)


def make_refiner(
    args: argparse.Namespace, root: Path | None, model: Any, facts: dict[str, Any], world: World, stop: StopRequest
) -> Refiner:
    import torch

    from tokcomp.cli.refine import noting, refine_settings
    from tokcomp.compare.refining import Refiner
    from tokcomp.runs.batches import held_out_batches
    from tokcomp.runs.data import Part, check_labels, spread_sample
    from tokcomp.runs.recipe import plain_transform

    def batches() -> Any:
        dataset = open_data(args, root, args.train_split)
        with blame("--train-split"):
            check_labels(dataset, model.num_classes)
        chosen = spread_sample(dataset, args.refine_images, args.seed)
        part = Part(dataset, chosen, plain_transform(data_config(args, model)))
        return held_out_batches(part, args.batch_size, workers=args.workers, world=world)()

    return Refiner(
        model,
        batches,
        refine_settings(args, args.seed),
        args.output,
        facts={**facts, "data": [facts["data"], args.train_split], "images": args.refine_images},
        amp_dtype=torch.bfloat16 if args.amp else None,
        world=world,
        stop=stop,
        note=noting(world.is_main, "refine", args.refine),
    )


#: Training images on which thresholds and the mean cost of methods with differing counts are found.
_CALIBRATION_IMAGES = 256


def calibration_images(args: argparse.Namespace, root: Path | None, model: Any) -> list[torch.Tensor]:
    """Batches of training images, spread over the classes, in the model's type on its device; the same everywhere."""
    from tokcomp.runs.batches import held_out_batches
    from tokcomp.runs.data import Part, spread_sample
    from tokcomp.runs.recipe import plain_transform

    dataset = open_data(args, root, args.train_split)
    chosen = spread_sample(dataset, _CALIBRATION_IMAGES, args.seed)
    part = Part(dataset, chosen, plain_transform(data_config(args, model)))
    first = next(model.parameters())
    batches = held_out_batches(part, args.batch_size, workers=args.workers)()
    return [images.to(first.device, first.dtype) for images, _ in batches]
