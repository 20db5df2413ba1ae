"""What ``tokcomp demo`` measures and draws; the command itself only prints and writes."""

from __future__ import annotations

import copy
import io
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from tokcomp.api import compress, restore, trace
from tokcomp.assets import DIGITS_MODEL, DIGITS_SCHEDULE
from tokcomp.cost import flops
from tokcomp.data import DigitsDataset
from tokcomp.equal_cost import evit_for_budget, tome_for_budget
from tokcomp.measure.evaluate import evaluate
from tokcomp.measure.timing import now
from tokcomp.methods import DiffRate, Method
from tokcomp.schedule import CompressionSchedule
from tokcomp.visualize import draw_blocks, join_rows

PHOTO_MODEL = "deit_small_patch16_224"
PHOTO_GFLOPS = 2.3
UNCOMPRESSED = "uncompressed"
_DIGIT_BLOCKS = (1, 2, 3, 4)
_PHOTO_BLOCKS = (2, 4, 6, 9)


@dataclass(frozen=True)
class DigitsRow:
    """One way of running the digits model. Accuracy in per cent, cost in 1e6 multiply-adds per image."""

    method: str
    settings: str
    mflops: float
    top1: float
    agreement: float
    tokens: list[int]


@dataclass(frozen=True)
class SpeedRow:
    """Speed of a model in one precision: medians over interleaved rounds, in images per second."""

    dtype: str
    batch_size: int
    rounds: int
    uncompressed: float
    compressed: float
    speed_up: float


def digits_methods(model: nn.Module) -> dict[str, Method | None]:
    """The uncompressed model, DiffRate with the schedule in the package, and ToMe and EViT at that schedule's cost."""
    diffrate = DiffRate(CompressionSchedule.load(DIGITS_SCHEDULE))
    budget = flops(compress(model, diffrate))
    restore(model)
    return {
        UNCOMPRESSED: None,
        "DiffRate": diffrate,
        "ToMe": tome_for_budget(model, budget),
        "EViT": evit_for_budget(model, budget),
    }


def digits_batches(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The held-out digits, in batches of 60."""
    dataset = DigitsDataset()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(image) for image in dataset.images])
    labels = torch.tensor(dataset.labels)
    return list(zip(images.split(60), labels.split(60), strict=True))


@torch.inference_mode()
def evaluate_digits(model: nn.Module, device: torch.device) -> list[DigitsRow]:
    """The digits model on the held-out digits under each method."""
    batches = digits_batches(model)
    methods = digits_methods(model)
    model.to(device)
    rows: list[DigitsRow] = []
    expected: Tensor | None = None
    for name, method in methods.items():
        if method is not None:
            compress(model, method)
        found = evaluate(model, batches, device=device)
        answers = torch.cat([model(images.to(device)).argmax(-1) for images, _ in batches])
        expected = answers if expected is None else expected
        agreement = 100.0 * float((answers == expected).float().mean())
        sources = trace(model, batches[0][0][:1].to(device))
        tokens = [sources[0].shape[1], *(len(source[source >= 0].unique()) for source in sources)]
        settings = "" if method is None else repr(method)
        rows.append(DigitsRow(name, settings, flops(model) / 1e6, found.top1, agreement, tokens))
        restore(model)
    return rows


def draw_digits(model: nn.Module, device: torch.device, indices: tuple[int, ...] = (0, 22)) -> dict[str, bytes]:
    """For a few held-out digits, one picture each: a row per method."""
    dataset = DigitsDataset()
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    model.to(device)
    pictures = {}
    for index in indices:
        rows = []
        for name, method in digits_methods(model).items():
            if method is None:
                continue
            compress(model, method)
            rows.append(_draw(model, dataset.images[index], transform, config, device, name, _DIGIT_BLOCKS, cell=28))
            restore(model)
        pictures[f"digit-{index}"] = _png(join_rows(rows))
    return pictures


def photo_model(pretrained: bool) -> nn.Module:
    """DeiT-S, with timm's weights or random ones (seeded, so that pictures repeat)."""
    torch.manual_seed(0)
    return timm.create_model(PHOTO_MODEL, pretrained=pretrained).eval()


def photo_methods(model: nn.Module, pretrained: bool) -> dict[str, Method]:
    """The methods to draw photographs with. Random weights know similarity, not importance: DiffRate only merges."""
    schedule = DiffRate.published(PHOTO_MODEL, PHOTO_GFLOPS).schedule
    tome = tome_for_budget(model, PHOTO_GFLOPS * 1e9)
    if not pretrained:
        return {"ToMe": tome, "DiffRate, merging only": DiffRate(schedule, pipeline="merge")}
    return {"DiffRate": DiffRate(schedule), "ToMe": tome, "EViT": evit_for_budget(model, PHOTO_GFLOPS * 1e9)}


def draw_photos(model: nn.Module, pretrained: bool, device: torch.device) -> dict[str, bytes]:
    """scikit-learn's two photographs, one picture each: a row per method."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    methods = photo_methods(model, pretrained)
    model.to(device)
    pictures = {}
    for path, pixels in zip(samples.filenames, samples.images, strict=True):
        rows = []
        for name, method in methods.items():
            compress(model, method)
            rows.append(_draw(model, Image.fromarray(pixels), transform, config, device, name, _PHOTO_BLOCKS, cell=20))
            restore(model)
        pictures[str(path).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".jpg")] = _png(join_rows(rows))
    return pictures


def _draw(
    model: nn.Module,
    image: Image.Image,
    transform: Any,
    config: dict[str, Any],
    device: torch.device,
    label: str,
    blocks: tuple[int, ...],
    cell: int,
) -> Image.Image:
    inputs = transform(image)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return draw_blocks(model, inputs.to(device), inputs * std + mean, blocks=blocks, cell=cell, label=label)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


@torch.inference_mode()
def time_speed_up(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *, batch_size: int = 4, rounds: int = 5
) -> SpeedRow:
    """DeiT-S with the published schedule against timm's own forward, in alternating rounds."""
    plain = copy.deepcopy(model).to(device, dtype)
    compressed = compress(copy.deepcopy(plain), DiffRate.published(PHOTO_MODEL, PHOTO_GFLOPS))
    images = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    runs = {UNCOMPRESSED: partial(plain, images), "compressed": partial(compressed, images)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for warm_up in (True, *[False] * rounds):
        for name, forward in runs.items():
            start = now(device)
            forward()
            if not warm_up:
                seconds[name].append(now(device) - start)
    ratios = [a / b for a, b in zip(seconds[UNCOMPRESSED], seconds["compressed"], strict=True)]
    speeds = {name: batch_size / statistics.median(times) for name, times in seconds.items()}
    return SpeedRow(
        str(dtype).removeprefix("torch."),
        batch_size,
        rounds,
        speeds[UNCOMPRESSED],
        speeds["compressed"],
        statistics.median(ratios),
    )


def digits_model() -> nn.Module:
    """The model that this project trained on scikit-learn's digits."""
    return timm.create_model(DIGITS_MODEL, pretrained=True).eval()


def as_data(rows: list[DigitsRow] | list[SpeedRow]) -> list[dict[str, Any]]:
    """Rows as JSON data."""
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()}
        for row in rows
    ]
