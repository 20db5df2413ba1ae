"""Recipes: the settings of an optimization, with the papers' values as defaults, and timm's parts made from them.

The command line's help states their defaults, so nothing slow is imported until a part is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """Optimizer, learning rate, augmentation and regularization; names and meanings are timm's.

    ``drop_path`` belongs to the model: ``timm.create_model(..., drop_path_rate=recipe.drop_path)``.
    ``backbone_lr_scale`` is what the rates of the model's own weights are multiplied by, while the parts that a method
    has learned are trained at the full ones (DynamicViT and SPViT: 0.01). In the first ``frozen_epochs`` they are 0, so
    that only those parts learn (DynamicViT and SPViT: 5).
    """

    lr: float
    min_lr: float
    weight_decay: float
    epochs: float
    batch_size: int = 1024  # over all processes
    opt: str = "adamw"
    sched: str = "cosine"
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    clip_grad: float | None = None
    aa: str | None = "rand-m9-mstd0.5-inc1"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.3  # used if aa is None
    train_interpolation: str = "bicubic"
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    drop_path: float = 0.1
    repeated_aug: int = 1  # copies of an image in one pass, each augmented separately
    model_ema_decay: float | None = None
    backbone_lr_scale: float = 1.0
    frozen_epochs: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "repeated_aug"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        for name in ("min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "frozen_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number, 0 or more, got {getattr(self, name)}")
        if not 0 < self.backbone_lr_scale <= 1:
            raise ValueError(f"backbone_lr_scale must be above 0 and at most 1, got {self.backbone_lr_scale}")
        for name in ("smoothing", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other, which requires an even number of them."""
        return self.mixup > 0 or self.cutmix > 0

    def describe(self) -> dict[str, Any]:
        """The settings as JSON data."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


#: DiffRate, Table 5: the search of a schedule.
SEARCH_RECIPE = Recipe(lr=1e-2, min_lr=1e-3, weight_decay=0.0, epochs=3)
#: DiffRate, Table 6: fine-tuning at a fixed schedule.
FINETUNE_RECIPE = Recipe(lr=2e-5, min_lr=1e-6, weight_decay=0.05, epochs=30)
#: DeiT's training from scratch, which DiffRate's Table 11 repeats with token dropping.
SCRATCH_RECIPE = Recipe(
    lr=1e-3,
    min_lr=1e-5,
    weight_decay=0.05,
    epochs=300,
    warmup_epochs=5,
    reprob=0.25,
    repeated_aug=3,
    model_ema_decay=0.99996,
)

#: ToCom, Table 13, VTAB-1k: AdaptFormer's branches and the classifier. Images are not augmented.
ADAPTFORMER_RECIPE = Recipe(
    lr=1e-3,
    min_lr=1e-5,
    weight_decay=1e-4,
    epochs=100,
    aa=None,
    scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    hflip=0.0,
    color_jitter=0.0,
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
)

#: ToCom, Table 13: the plugin's self-distillation. Smoothed labels are for its ablation.
TOCOM_RECIPE = Recipe(lr=1e-3, min_lr=1e-5, weight_decay=0.05, epochs=10, reprob=0.25, repeated_aug=3)

#: Segmenters: AdamW from scratch; nothing is mixed, and masks are augmented with their images.
DENSE_RECIPE = Recipe(
    lr=2e-3,
    min_lr=1e-5,
    weight_decay=0.05,
    epochs=1,
    batch_size=16,
    clip_grad=1.0,
    aa=None,
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    drop_path=0.0,
)


def make_optimizer(
    recipe: Recipe, parameters: nn.Module | Iterable[nn.Parameter], parts: Collection[str] = ()
) -> torch.optim.Optimizer:
    """timm's optimizer of that name; if given a module, biases and norms get no weight decay.

    Args:
        recipe: names the optimizer, and gives its settings.
        parameters: a module, or what it would have.
        parts: names of a module's parameters that are trained at the full rate where the recipe scales that of the
            others; they come first.

    Raises:
        ValueError: timm knows no optimizer of that name.
    """
    from timm.optim import create_optimizer_v2
    from torch import nn

    what: Any = parameters if isinstance(parameters, nn.Module) else list(parameters)
    if isinstance(parameters, nn.Module) and (recipe.backbone_lr_scale < 1 or recipe.frozen_epochs):
        what = _scaled_groups(recipe, parameters, parts)
    try:
        return create_optimizer_v2(what, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"opt must be an optimizer that timm knows, got {recipe.opt!r} ({error})") from error


def _scaled_groups(recipe: Recipe, module: nn.Module, parts: Collection[str]) -> list[dict[str, Any]]:
    """Parameter groups whose ``lr_scale`` timm's schedulers multiply their rate by."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    for name, one in sorted(named, key=lambda item: item[0] not in parts):
        decay = 0.0 if one.ndim <= 1 or name.endswith(".bias") else recipe.weight_decay
        groups.setdefault((name not in parts, decay), []).append(one)
    scales = {False: 1.0, True: recipe.backbone_lr_scale}
    return [
        {
            "params": own,
            "lr_scale": scales[is_backbone],
            "is_backbone": is_backbone,
            "weight_decay": decay,
            "lr": recipe.lr if recipe.sched != "none" else recipe.lr * scales[is_backbone],
        }
        for (is_backbone, decay), own in groups.items()
    ]


class LearningRate:
    """timm's scheduler, stepped by updates over a run of ``total`` steps: the rate depends only on the step.

    Args:
        recipe: names the scheduler, and gives its ``warmup_epochs`` and ``frozen_epochs``.
        optimizer: the one whose groups' rates are set.
        total: steps in the run.
        steps_per_epoch: to turn epochs into steps.
    """

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer, total: int, steps_per_epoch: int) -> None:
        from timm.scheduler import create_scheduler_v2

        warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total)
        try:
            self._scheduler, _ = create_scheduler_v2(
                optimizer,
                sched=recipe.sched,
                num_epochs=max(total, 2),  # timm warns about a cosine of one step
                min_lr=recipe.min_lr,
                warmup_lr=recipe.warmup_lr,
                warmup_epochs=warmup,
                step_on_epochs=False,
                updates_per_epoch=1,
            )
        except (ValueError, AssertionError) as error:
            raise ValueError(f"sched must be a scheduler that timm knows, got {recipe.sched!r} ({error})") from error
        if self._scheduler is None and recipe.sched != "none":  # older timm says nothing
            raise ValueError(f"sched must be a scheduler that timm knows, got {recipe.sched!r}")
        self._optimizer = optimizer
        self._constant = [float(group["lr"]) for group in optimizer.param_groups]  # without a scheduler
        self._frozen = round(recipe.frozen_epochs * steps_per_epoch)

    def set(self, step: int) -> float:
        """Set the rate for the step about to be taken, counted from 0, and return it."""
        if self._scheduler is not None:
            self._scheduler.step_update(step)
        for group, constant in zip(self._optimizer.param_groups, self._constant, strict=True):
            if group.get("is_backbone") and step < self._frozen:
                group["lr"] = 0.0
            elif self._scheduler is None:
                group["lr"] = constant
        return float(self._optimizer.param_groups[0]["lr"])


class Targets:
    """Mixes a batch by mixup or cutmix and makes soft targets, with label smoothing: timm's Mixup, seeded by step.

    What is drawn depends only on (seed, step). Image i is mixed with image B - 1 - i, so parts of a batch that hold
    whole pairs (:func:`tokcomp.runs.batches.part_of_batch`) are mixed as the whole batch would be.
    """

    def __init__(self, recipe: Recipe, num_classes: int, seed: int) -> None:
        from timm.data import Mixup

        self._smoothing, self._num_classes, self._seed = recipe.smoothing, num_classes, seed
        self._mixup = None
        if recipe.mixes:
            self._mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                mode=recipe.mixup_mode,
                label_smoothing=recipe.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """images [b, 3, H, W] (overwritten) and labels [b] -> mixed images and targets [b, classes] of their type."""
        from timm.data.mixup import mixup_target

        from tokcomp.runs.steps import MIXING, seeded

        if self._mixup is None:
            targets = mixup_target(labels, self._num_classes, 1.0, self._smoothing)
        else:
            with seeded(self._seed, step, MIXING):
                images, targets = self._mixup(images, labels)
        return images, targets.to(images.dtype)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [b, classes] under soft targets [b, classes], in float32 or better."""
    import torch
    import torch.nn.functional as F

    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets.to(wide))


def train_transform(recipe: Recipe, config: dict[str, Any]) -> Any:
    """timm's training transform, PIL image -> normalized [3, H, W], for a model's data config.

    Raises:
        ValueError: timm does not understand ``aa``.
    """
    from timm.data import create_transform

    try:
        return create_transform(
            config["input_size"],
            is_training=True,
            auto_augment=recipe.aa,
            scale=recipe.scale,
            ratio=recipe.ratio,
            hflip=recipe.hflip,
            color_jitter=recipe.color_jitter,
            interpolation=recipe.train_interpolation,
            re_prob=recipe.reprob,
            re_mode=recipe.remode,
            re_count=recipe.recount,
            mean=config["mean"],
            std=config["std"],
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"aa must be an augmentation policy that timm knows, got {recipe.aa!r} ({error})") from error


def plain_transform(config: dict[str, Any]) -> Any:
    """timm's evaluation transform, PIL image -> normalized [3, H, W], for a model's data config."""
    from timm.data import create_transform

    return create_transform(
        config["input_size"],
        is_training=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode"),
    )
