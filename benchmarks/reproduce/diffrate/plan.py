"""What a run consists of: models, searches, comparisons. Every size of an experiment is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tools.assets.choose_schedule import FLOPS_WEIGHT, LEARNING_RATE

#: The model that comes with the package: trained longer than those of a run, and not by it.
BUNDLED = "bundled"
#: name -> what differs from the bundled model.
SHAPES: Mapping[str, Mapping[str, int]] = {
    BUNDLED: {},
    "base": {},
    "narrow": {"embed_dim": 32, "num_heads": 1},
    "wide": {"embed_dim": 96, "num_heads": 3},
}
METRICS = ("cls_attn", "image_attn", "cls_attn_v", "random")
PIPELINES = ("prune_merge", "merge_prune", "prune", "merge")


@dataclass(frozen=True)
class SearchSettings:
    """One search. ``share`` is the target as a share of the uncompressed model's multiply-adds."""

    share: float
    metric: str = "cls_attn"
    pipeline: str = "prune_merge"
    match_inference: bool = False
    epochs: float = 3.0
    images: int = 0  # distinct pictures; 0: every training digit, drawn anew each time
    batch_size: int = 32
    lr: float = LEARNING_RATE
    flops_weight: float = FLOPS_WEIGHT

    @property
    def name(self) -> str:
        parts = [f"{self.share:g}", self.pipeline, self.metric, f"{self.epochs:g}ep", f"{self.images or 'all'}img"]
        return "-".join([*parts, *["match"] * self.match_inference])


@dataclass(frozen=True)
class Settings:
    """A whole run. The default takes some 25 minutes on two cores."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    train_epochs: int = 50
    shares: tuple[float, ...] = (0.5, 0.4, 0.33)
    ablation_share: float = 0.4
    epochs: tuple[float, ...] = (1.0, 3.0, 10.0)
    images: tuple[int, ...] = (16, 64, 256)
    held_out: int = 1800  # pictures: each held-out digit five times
    random_schedules: int = 30
    selection_pictures: int = 360
    transfer_shapes: tuple[str, ...] = ("narrow", "wide")
    search: SearchSettings = field(default_factory=lambda: SearchSettings(share=0.5))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


QUICK = Settings(
    seeds=(0, 1),
    train_epochs=1,
    shares=(0.5,),
    ablation_share=0.5,
    epochs=(0.02, 0.05),
    images=(16,),
    held_out=60,
    random_schedules=2,
    selection_pictures=60,
    transfer_shapes=("narrow",),
    search=SearchSettings(share=0.5, epochs=0.05, batch_size=16),
)


@dataclass(frozen=True)
class Model:
    """A model of the run; its name is its file's."""

    shape: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.seed}"


def base_models(settings: Settings) -> list[Model]:
    return [Model("base", seed) for seed in settings.seeds]


def other_models(settings: Settings) -> list[Model]:
    """One model of every other width, whose schedules go to the base models (Fig. 6)."""
    return [Model(shape, settings.seeds[0]) for shape in settings.transfer_shapes]


def all_models(settings: Settings) -> list[Model]:
    return [*other_models(settings), *base_models(settings), Model(BUNDLED, 0)]


def searches(settings: Settings, model: Model) -> dict[str, SearchSettings]:
    """Every search on a model, by name."""
    default = settings.search
    ablation = replace(default, share=settings.ablation_share)
    wanted = [replace(default, share=share) for share in settings.shares]
    if model.shape == "base":
        wanted += [replace(default, share=share, match_inference=True) for share in settings.shares]
        wanted += [replace(ablation, metric=metric) for metric in METRICS]
        wanted += [replace(ablation, pipeline=pipeline) for pipeline in PIPELINES]
        wanted += [replace(ablation, images=images) for images in settings.images]
        wanted += [replace(ablation, epochs=epochs) for epochs in settings.epochs]
    return {one.name: one for one in wanted}
