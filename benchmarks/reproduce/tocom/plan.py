"""What a run consists of: halves of the digits, models, plugins. Every size of an experiment is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from tokcomp.methods import ToMe
from tokcomp.runs.recipe import Recipe

#: A half of the digits' classes. What is pre-trained on one half has the other one as its task.
HALVES: Mapping[str, tuple[int, ...]] = {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}
OTHER: Mapping[str, str] = {"low": "high", "high": "low"}
CLASSES = 5

#: What all trainings here share. Digits are drawn anew every time they are asked for; nothing else is varied.
_PLAIN = Recipe(
    lr=1e-3,
    min_lr=1e-5,
    weight_decay=0.05,
    epochs=1,
    batch_size=32,
    warmup_epochs=3,
    warmup_lr=1e-5,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.05,
    drop_path=0.05,
)


@dataclass(frozen=True)
class PluginSettings:
    """How one plugin is trained: the paper's way, and what an ablation changes."""

    arithmetic: str = "steps"
    loss: str = "distillation"
    rank: int = 2
    scale: float = 0.1
    epochs: float = 20.0
    lr: float = 3e-3

    @property
    def name(self) -> str:
        return f"{self.arithmetic}-{self.loss}-h{self.rank}-s{self.scale:g}"


@dataclass(frozen=True)
class Settings:
    """A whole run. The default takes some 15 minutes on two cores."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    halves: tuple[str, ...] = ("low",)  # to pre-train on
    max_degree: int = 16
    tokens_per_degree: int = 2
    sources: tuple[int, ...] = (0, 16)
    targets: tuple[int, ...] = (0, 4, 8, 12, 16)
    pretrain: Recipe = field(default_factory=lambda: replace(_PLAIN, epochs=40))
    finetune: Recipe = field(default_factory=lambda: replace(_PLAIN, epochs=30))
    task_digits: int = 300  # of the task's 720 training digits; the others choose the scale
    plugin: PluginSettings = field(default_factory=PluginSettings)
    plugin_recipe: Recipe = field(default_factory=lambda: replace(_PLAIN, warmup_epochs=0, smoothing=0.0))
    scales: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15)  # of the default plugin, in use
    ranks: tuple[int, ...] = (1, 4)
    training_scales: tuple[float, ...] = (0.01, 1.0)
    ablation_halves: tuple[str, ...] = ("low",)
    held_out: int = 540  # pictures: the 179 or 181 held-out digits of the task three times
    validation: int = 400  # pictures

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Run(NamedTuple):
    """One pre-trained model and everything that is made of it."""

    half: str
    seed: int

    def __str__(self) -> str:
        return f"{self.half}-{self.seed}"


def runs(settings: Settings) -> list[Run]:
    return [Run(half, seed) for seed in settings.seeds for half in settings.halves]


def method_of(degree: int, tokens_per_degree: int) -> ToMe:
    """What a degree means here."""
    return ToMe(degree * tokens_per_degree)


def ablations(settings: Settings) -> dict[str, PluginSettings]:
    """Every other plugin that is trained, on the models of ``ablation_halves``."""
    default = settings.plugin
    found = {
        "shared LoRA": replace(default, arithmetic="shared"),
        "classification loss": replace(default, loss="labels"),
        "no inversion": replace(default, arithmetic="two_way"),
    }
    found |= {f"h = {rank}": replace(default, rank=rank) for rank in settings.ranks}
    found |= {f"s = {scale:g}": replace(default, scale=scale) for scale in settings.training_scales}
    return found | {"shared LoRA, by distance": replace(default, arithmetic="shared_by_distance")}


QUICK = Settings(
    seeds=(0, 1),
    max_degree=2,
    tokens_per_degree=8,
    sources=(0, 2),
    targets=(0, 1, 2),
    pretrain=replace(_PLAIN, epochs=0.1),
    finetune=replace(_PLAIN, epochs=0.2),
    task_digits=50,
    plugin=PluginSettings(epochs=0.1),
    scales=(0.05, 0.1),
    ranks=(1,),
    training_scales=(1.0,),
    ablation_halves=("low",),
    held_out=20,
    validation=20,
)
