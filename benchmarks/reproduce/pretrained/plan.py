"""What the study consists of. Every size of an experiment is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokcomp.compare.entries import Entry, Variant, parse_methods, sweep


@dataclass(frozen=True)
class ToComSettings:
    """Plugins: degrees 0 to ``max_degree`` merge as many tokens in every block; ``steps`` updates of ``batch`` of
    ``images`` pictures, once for each seed."""

    max_degree: int = 5
    images: int = 4000
    steps: int = 300
    batch: int = 32
    lr: float = 1e-3
    scale: float = 0.1
    seeds: int = 3


@dataclass(frozen=True)
class TrainedSettings:
    """Methods that are trained, each for ``steps`` updates of ``batch`` of ``images`` pictures, at one budget.

    Args:
        share: the budget, as a share of the uncompressed multiply-adds.
        lr, parts_lr: of the weights that there were before, and of a method's own parts.
        calibration: pictures by which A-ViT's cost is measured.
        seed: of everything random.
    """

    share: float = 0.55
    images: int = 2000
    steps: int = 100
    batch: int = 16
    lr: float = 2e-5
    parts_lr: float = 1e-3
    calibration: int = 64
    seed: int = 0


@dataclass(frozen=True)
class LatencySettings:
    """Schedules for a time on this CPU beside those for multiply-adds.

    Args:
        batches: images in a batch, for each of which schedules are made and everything is timed.
        candidates, images: of every refinement.
        alphas: weights of the time in the staircase rule.
        grid_step, grid_images: numbers of tokens between which that rule chooses, and pictures by which.
        spacing: of the counts in a table of times.
        rounds: of every measurement of time.
    """

    batches: tuple[int, ...] = (1, 16)
    candidates: int = 100
    images: int = 300
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75)
    grid_step: int = 4
    grid_images: int = 500
    spacing: int = 8
    rounds: int = 7


@dataclass(frozen=True)
class Settings:
    """A whole run: the most telling cells first, so that one that is stopped has those.

    Args:
        sizes: of the images; the first has every experiment, the others have fewer.
        shares: budgets, as shares of the uncompressed multiply-adds.
        head, search, refine, test: images that the head is fitted on, that a search and a refinement use, and that
            everything is measured on.
        steps, batch, lr: of a search.
        candidates: of a refinement.
        random: schedules at each budget.
        seeds: of search and refinement.
        swept_images, swept_steps: for Table 4, c and d.
        speed_batch: images in a batch when speed is measured; 0: it is not.
        width: of the model; None: as published.
        tocom: plugins on the backbone.
        trained: methods that are trained.
        latency: schedules for a time.
    """

    sizes: tuple[int, ...] = (112, 224)
    shares: tuple[float, ...] = (0.75, 0.55, 0.4)
    head: int = 3000
    search: int = 1000
    refine: int = 400
    test: int = 2000
    steps: int = 200
    batch: int = 32
    lr: float = 0.1
    candidates: int = 150
    random: int = 100
    seeds: int = 3
    swept_images: tuple[int, ...] = (100, 4000)
    swept_steps: tuple[int, ...] = (50, 800)
    speed_batch: int = 16
    width: int | None = None
    tocom: ToComSettings = ToComSettings()
    trained: TrainedSettings = TrainedSettings()
    latency: LatencySettings = LatencySettings()

    @property
    def variant(self) -> Variant:
        return Variant(images=self.search)


QUICK = Settings(
    sizes=(84, 70),
    head=40,
    search=16,
    refine=10,
    test=20,
    shares=(0.75, 0.6),
    steps=1,
    batch=4,
    candidates=7,
    random=2,
    seeds=2,
    swept_images=(8,),
    swept_steps=(2,),
    speed_batch=0,
    width=48,
    tocom=ToComSettings(max_degree=2, images=16, steps=2, batch=4, seeds=2),
    trained=TrainedSettings(share=0.7, images=16, steps=2, batch=4, calibration=4),
    latency=LatencySettings((1, 2), candidates=6, images=8, alphas=(0.5,), grid_step=12, grid_images=8, rounds=1),
)


def entries_for(settings: Settings, place: int, budgets: Sequence[float], folders: Sequence[Path]) -> list[Entry]:
    """The rows at the image size of that place, the most telling first; ``folders`` are those of each size."""
    variant, middle = settings.variant, (budgets[len(budgets) // 2],)
    entries = parse_methods(["tome", "evit", "uniform", "published", "tome/merge", "evit/prune"], variant)
    stages = parse_methods(["search", "refine"], variant)
    if place > 0:
        other = Entry(f"search at {settings.sizes[0]} px", "file", file=folders[0])
        return [*entries, other, *stages]
    entries += stages
    entries += parse_methods([f"random:{settings.random}", "search/merge"], variant)
    for seed in range(1, settings.seeds):
        entries += [
            replace(one, name=f"{one.name}, seed {seed}", variant=replace(variant, seed=seed)) for one in stages
        ]
    matching = Entry("search, match_inference", "search", replace(variant, match_inference=True))
    ablations = sweep(
        variant,
        metrics=["image_attn", "cls_attn_v", "random"],
        pipelines=["merge_prune", "prune", "merge"],
        images=settings.swept_images,
        # A step is an update: the study's epochs are as many as the updates divided by those of an epoch.
        epochs=[float(steps) for steps in settings.swept_steps],
    )
    named = [replace(one, name=one.name.replace(" epochs", " updates")) for one in ablations]
    return [*entries, *(replace(one, only=middle) for one in [matching, *named])]
