"""Units of the dense experiment: train a segmenter, train plugins for it, score it. All follow from their arguments."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import tokcomp
import torch
from tokcomp.dense.data import InMemory, Prepared
from tokcomp.dense.evaluate import evaluate_segmenter
from tokcomp.dense.files import SegmenterSettings, load_segmenter, save_segmenter
from tokcomp.dense.segmenter import Segmenter
from tokcomp.dense.shapes import CLASSES, ShapesDataset
from tokcomp.dense.train import SegmenterTuner
from tokcomp.equal_cost import tome_for_budget
from tokcomp.methods import Method
from tokcomp.runs.batches import LoaderBatches
from tokcomp.runs.recipe import DENSE_RECIPE, TOCOM_RECIPE
from tokcomp.runs.steps import seed_all
from tokcomp.tocom.distill import Distiller
from torch.utils.data import DataLoader

from benchmarks.reproduce.runner import Unit

CPU = torch.device("cpu")
_HERE = "benchmarks.reproduce.dense_units"
_MEAN = _STD = (0.5, 0.5, 0.5)
MAX_DEGREE = 8  # half of the tokens, an eighth of that per degree
DEGREES = (0, 2, 4, 6, 8)


@dataclass(frozen=True)
class DenseSettings:
    """What the experiment is made of."""

    seeds: int = 3
    heads: tuple[str, ...] = ("linear", "mask_transformer")
    side: int = 128
    large_side: int = 256
    width: int = 96
    depth: int = 4
    train_images: int = 2000
    held_out: int = 200
    large_held_out: int = 50
    batch_size: int = 16
    steps: int = 800
    plugin_steps: int = 150
    speed_model: str = "deit_small_patch16_224"
    speed_side: int = 512

    def build(self, head: str) -> SegmenterSettings:
        kwargs = {"embed_dim": self.width, "depth": self.depth, "num_heads": self.width // 32}
        return SegmenterSettings(
            "vit_tiny_patch16_224", (self.side, self.side), head, CLASSES, _MEAN, _STD, model_kwargs=kwargs
        )


QUICK = DenseSettings(
    seeds=1, side=64, large_side=96, width=32, depth=2, train_images=8, held_out=4, large_held_out=2, steps=3,
    batch_size=4, plugin_steps=2, speed_model="vit_tiny_patch16_224", speed_side=64,
)  # fmt: skip


def all_units(settings: DenseSettings) -> list[Unit]:
    speed = {"model": settings.speed_model, "side": settings.speed_side}
    units = [Unit("speed", f"{_HERE}:speed", speed, weight=30)]
    facts = asdict(replace(settings, seeds=0, heads=()))
    for name in ("speed_model", "speed_side"):
        del facts[name]
    for seed in range(settings.seeds):
        for head in settings.heads:
            arguments = {"seed": seed, "head": head, "settings": facts}
            train, score = f"train-{head}-{seed}", f"score-{head}-{seed}"
            units.append(Unit(train, f"{_HERE}:train", arguments, weight=60))
            plugins = []
            for loss in ("kl", "features"):
                plugins.append(f"plugin-{loss}-{head}-{seed}")
                units.append(Unit(plugins[-1], f"{_HERE}:plugin", {**arguments, "loss": loss}, [train], weight=12))
            units.append(Unit(score, f"{_HERE}:score", arguments, [train, *plugins], weight=12))
            units.append(Unit(f"merged-{head}-{seed}", f"{_HERE}:score_merged", arguments, [train], weight=40))
    return units


def _settings(facts: dict[str, Any]) -> DenseSettings:
    return DenseSettings(**{**facts, "heads": tuple(facts["heads"])})


@lru_cache(maxsize=1)
def _training_images(settings: DenseSettings) -> InMemory:
    return InMemory(ShapesDataset((settings.side, settings.side), settings.train_images, train=True))


def _batches(settings: DenseSettings, seed: int) -> LoaderBatches:
    data = Prepared(_training_images(replace(settings, seeds=0)), (settings.side, settings.side), _MEAN, _STD)
    return LoaderBatches(data, settings.batch_size, seed)


def train(folder: Path, seed: int, head: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a segmenter from scratch and keep its weights."""
    found = _settings(settings)
    seed_all(seed)
    segmenter = found.build(head).build()
    batches = _batches(found, seed)
    tuner = SegmenterTuner(
        segmenter,
        replace(DENSE_RECIPE, batch_size=found.batch_size, warmup_epochs=found.steps / 10 / batches.steps_per_epoch),
        num_classes=len(CLASSES),
        total_steps=found.steps,
        steps_per_epoch=batches.steps_per_epoch,
        device=CPU,
        seed=seed,
    )
    losses = [tuner.step(images, masks).item() for images, masks in batches.iterate(0, found.steps)]
    save_segmenter(_weights(folder, head, seed), segmenter.eval(), found.build(head))
    tail = losses[-max(1, len(losses) // 10) :]
    return {"loss": sum(tail) / len(tail)}


def plugin(folder: Path, seed: int, head: str, settings: dict[str, Any], loss: str) -> dict[str, Any]:
    """Train a plugin by self-distillation: KL of the patches' classes, or L1 of the tokens."""
    found = _settings(settings)
    return {"loss": _train_plugin(folder, seed, head, found, loss, loss, found.plugin_steps, merge_residual=False)}


def _train_plugin(
    folder: Path, seed: int, head: str, found: DenseSettings, name: str, loss: str, steps: int, *, merge_residual: bool
) -> float:
    """The mean loss of the last steps."""
    segmenter, _ = load_segmenter(_weights(folder, head, seed))
    segmenter.requires_grad_(False)
    seed_all(seed)
    compensator = tokcomp.ToCom(segmenter.encoder, max_degree=MAX_DEGREE)
    compensator.method = tokcomp.ToMeMLP.name
    batches = _batches(found, seed + 1)
    distiller = Distiller(
        segmenter.encoder,
        compensator,
        lambda degree: tokcomp.ToMeMLP(tokens(found.side, degree), merge_residual=merge_residual),
        replace(TOCOM_RECIPE, lr=3e-3, mixup=0.0, cutmix=0.0, drop_path=0.0, batch_size=found.batch_size),
        total_steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        device=CPU,
        seed=seed,
        read=segmenter.patch_answers if loss == "kl" else None,
    )
    losses = [distiller.step(images).item() for images, _ in batches.iterate(0, steps)]
    compensator.save(_plugin(folder, name, head, seed))
    return sum(losses[-20:]) / len(losses[-20:])


def tokens(side: int, degree: int) -> int:
    """Tokens that a degree merges of images of this side."""
    return (side // 16) ** 2 // 2 * degree // MAX_DEGREE


def score(folder: Path, seed: int, head: str, settings: dict[str, Any]) -> dict[str, Any]:
    """mIoU and pixel accuracy by degree and method; multiply-adds of the encoder; images per second of one core."""
    found = _settings(settings)
    segmenter, _ = load_segmenter(_weights(folder, head, seed))
    encoder = segmenter.encoder
    result: dict[str, Any] = {"own size": {}, "large": {}}
    held_out = _held_out(found.side, found.held_out)
    costs = {}
    for degree in DEGREES:
        r = tokens(found.side, degree)
        costs[degree] = tokcomp.flops(tokcomp.compress(encoder, tokcomp.ToMeMLP(r)))
        tokcomp.restore(encoder)
        methods: dict[str, Method] = {
            "tome_mlp": tokcomp.ToMeMLP(r),
            "merged residual": tokcomp.ToMeMLP(r, merge_residual=True),
            "ToMe": tome_for_budget(encoder, costs[degree]),
        }
        rows = {name: _scored(segmenter, method, held_out) for name, method in methods.items()}
        for loss in ("kl", "features"):
            compensator = tokcomp.ToCom.load(_plugin(folder, loss, head, seed), encoder)
            compensator.fold(encoder, 0, degree)
            rows[f"plugin, {loss}"] = _scored(segmenter, methods["tome_mlp"], held_out)
            compensator.unfold(encoder)
        result["own size"][degree] = {"flops": costs[degree], "rows": rows}
    speeds = _speeds(
        segmenter,
        {degree: tokcomp.ToMeMLP(tokens(found.side, degree)) for degree in DEGREES},
        next(iter(held_out()))[0],
    )
    result["images_per_core_second"] = speeds
    large, _ = load_segmenter(_weights(folder, head, seed), img_size=(found.large_side, found.large_side))
    held_out = _held_out(found.large_side, found.large_held_out)
    for degree in DEGREES:
        method = tokcomp.ToMeMLP(tokens(found.large_side, degree))
        result["large"][degree] = _scored(large, method, held_out)
    return result


def score_merged(folder: Path, seed: int, head: str, settings: dict[str, Any]) -> dict[str, Any]:
    """mIoU by degree where the residual is merged too, which loses more, and with a plugin trained for that."""
    found = _settings(settings)
    steps = 2 * found.plugin_steps
    loss = _train_plugin(folder, seed, head, found, "merged", "kl", steps, merge_residual=True)
    segmenter, _ = load_segmenter(_weights(folder, head, seed))
    compensator = tokcomp.ToCom.load(_plugin(folder, "merged", head, seed), segmenter.encoder)
    held_out = _held_out(found.side, found.held_out)
    result: dict[str, Any] = {"loss": loss, "own size": {}}
    for degree in DEGREES:
        method = tokcomp.ToMeMLP(tokens(found.side, degree), merge_residual=True)
        compensator.fold(segmenter.encoder, 0, degree)
        result["own size"][degree] = _scored(segmenter, method, held_out)
        compensator.unfold(segmenter.encoder)
    return result


def speed(folder: Path, model: str, side: int) -> dict[str, Any]:
    """A whole segmenter of timm's, its weights random: multiply-adds of the encoder, images per second of one core."""
    encoder = timm.create_model(model, img_size=side, num_classes=0).eval()
    methods = {degree: tokcomp.ToMeMLP(tokens(side, degree)) for degree in DEGREES}
    costs = {degree: tokcomp.flops(tokcomp.compress(encoder, method)) for degree, method in methods.items()}
    tokcomp.restore(encoder)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    found = _speeds(Segmenter(encoder, len(CLASSES), "linear").eval(), methods, images, rounds=3)
    return {"flops": costs, "images_per_core_second": found}


def _held_out(side: int, count: int) -> Callable[[], DataLoader]:
    data = Prepared(InMemory(ShapesDataset((side, side), count)), (side, side), _MEAN, _STD)
    return lambda: DataLoader(data, batch_size=8)


def _scored(segmenter: Segmenter, method: Method, batches: Callable[[], DataLoader]) -> dict[str, float]:
    tokcomp.compress(segmenter.encoder, method)
    scores = evaluate_segmenter(segmenter, batches(), device=CPU).scores
    tokcomp.restore(segmenter.encoder)
    return {"mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy}


@torch.inference_mode()
def _speeds(
    segmenter: Segmenter, methods: dict[int, Method], images: torch.Tensor, rounds: int = 8
) -> dict[int, float]:
    """By CPU time, the methods taking turns: the best of the rounds, of which the first does not count."""
    seconds: dict[int, list[float]] = {degree: [] for degree in methods}
    for _ in range(rounds):
        for degree, method in methods.items():
            tokcomp.compress(segmenter.encoder, method)
            segmenter.encoder(images[:1])  # packs the weights
            start = time.process_time()
            segmenter.predict(images)
            seconds[degree].append(time.process_time() - start)
            tokcomp.restore(segmenter.encoder)
    return {degree: len(images) / min(found[1:]) for degree, found in seconds.items()}


def _weights(folder: Path, head: str, seed: int) -> Path:
    return folder / "models" / f"{head}-{seed}.safetensors"


def _plugin(folder: Path, loss: str, head: str, seed: int) -> Path:
    return folder / "plugins" / f"{loss}-{head}-{seed}.safetensors"
