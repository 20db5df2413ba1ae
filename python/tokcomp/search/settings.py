"""A search's settings, its result, and its failure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tokcomp.runs.recipe import SEARCH_RECIPE, Recipe
from tokcomp.runs.steps import DivergedError
from tokcomp.schedule import CompressionSchedule

#: The paper's smallest model, uncompressed.
DEIT_T_GFLOPS = 1.2538


@dataclass(frozen=True)
class SearchSettings:
    """Everything that a search's result depends on besides model, images and budgets; the defaults are the paper's.

    Args:
        recipe: optimizer and augmentation. Augmenting single images is left to the data, and drop path to the model;
            the search uses the mixing and the learning rate.
        steps: length of the search; by default ``recipe.epochs`` of the batches' epochs.
        granularity, metric, pipeline, match_inference: as for :class:`DiffRateSearch`. The published code's granularity
            is 4.
        seed: seeds the mixing, drop path and the ``random`` metric.
        budget_warmup_epochs: epochs at the start that learn only from the images, without the budget.
        amp: autocast to bfloat16.
        log_interval: steps between two rows of the log. On a GPU nothing waits for the device in between.
        eval_interval: steps between two evaluations on the held-out images; None: ten over the run; 0: only at its end.
        checkpoint_interval: steps between two checkpoints.
    """

    recipe: Recipe = SEARCH_RECIPE
    steps: int | None = None
    granularity: int = 4
    metric: str | None = None
    pipeline: str | None = None
    match_inference: bool = False
    seed: int = 0
    budget_warmup_epochs: float = 0.0
    amp: bool = False
    log_interval: int = 10
    eval_interval: int | None = None
    checkpoint_interval: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "log_interval", "checkpoint_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("eval_interval", "budget_warmup_epochs"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")

    def describe(self) -> dict[str, Any]:
        """The settings as flat JSON data, leaving out those that cannot change the result."""
        data = asdict(self)
        data.update(self.recipe.describe())
        return {name: value for name, value in data.items() if name not in ("recipe", "checkpoint_interval", "epochs")}


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one target."""

    schedule: CompressionSchedule
    gflops: float  # of the schedule, 1e9 multiply-adds per image
    uncompressed_gflops: float
    costs: dict[str, float]  # by budget, in its unit
    top1: float | None  # on the held-out images, per cent; None if there are none
    uncompressed_top1: float | None
    steps: int
    complete: bool  # False if it was stopped before its last step
    log: list[dict[str, float]] = field(repr=False, default_factory=list)  # its rows, as in the CSV


def diverged(step: int, target: str, kept: str) -> DivergedError:
    """What to raise when a search's loss is not finite: ``kept`` says what was saved."""
    return DivergedError(
        f"the loss or its gradient is not finite at step {step}{target and f' of target {target}'}; {kept}. "
        "Lower --lr or the budget's weight, leave --amp out, or look for broken images or weights",
        step,
    )


def flops_weight(uncompressed_gflops: float) -> float:
    """The weight of a multiply-adds budget: the paper's 5 for models of DeiT-T's size or larger, as in the paper.

    The loss is in GFLOPs squared, so 5 has no effect on a smaller model: there the weight is scaled so that it pulls as
    strongly, relative to the model's cost, as 5 does on DeiT-T.
    """
    return 5.0 * max(1.0, DEIT_T_GFLOPS / uncompressed_gflops) ** 2
