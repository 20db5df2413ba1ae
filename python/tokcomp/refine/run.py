"""A refinement from its starts to its result, by the real loss, one candidate after the other."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.api import compress, restore
from tokcomp.equal_cost import Ruler
from tokcomp.files import write_whole
from tokcomp.methods import Method
from tokcomp.reading import read_json
from tokcomp.refine.candidates import Candidate, Moves
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.steps import StopRequest, derived_seed
from tokcomp.schedule import CompressionSchedule
from tokcomp_kernels.product_types import autocast

#: Candidates from which the next moves start.
_PARENTS = 4
#: Share of the images on which a candidate that is clearly worse than the best is given up.
_EARLY = 0.3
#: So few images say nothing clearly.
_LEAST = 8
#: How many standard errors of the paired difference make it clear.
_CLEARLY = 3.0


@dataclass(frozen=True)
class RefineSettings:
    """What the result depends on besides model, images, budget and starts.

    Args:
        candidates: how many are tried, the starts included.
        seed: of the moves.
        loss: "labels", the cross entropy; or "answers", the cross entropy against the uncompressed model's
            probabilities, which needs no labels.
    """

    candidates: int = 200
    seed: int = 0
    loss: str = "labels"

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")
        if self.loss not in ("labels", "answers"):
            raise ValueError(f"loss must be labels or answers, got {self.loss!r}")


@dataclass(frozen=True)
class RefineResult:
    """What a refinement found.

    Attributes:
        schedule: the best candidate; :func:`tokcomp.methods.scheduled` makes its method.
        method: that method.
        loss: its mean loss on the calibration images, in nats.
        starts: name of each start -> its loss.
        cost: of the best candidate, by the ruler.
        tried: candidates whose loss was computed, in part at least.
        images: calibration images that were run through a compressed model, all candidates together.
        seconds: of the whole refinement.
        complete: False if it was stopped.
    """

    schedule: CompressionSchedule
    method: Method
    loss: float
    starts: dict[str, float]
    cost: float
    tried: int
    images: int
    seconds: float
    complete: bool


@dataclass
class _State:
    """All that the next candidate depends on."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0
    starts: dict[str, float] = field(default_factory=dict)
    best: list[tuple[float, Candidate]] = field(default_factory=list)  # the best first
    seen: set[str] = field(default_factory=set)

    def to_json(self) -> dict[str, Any]:
        best = [{"loss": loss, **one.to_json()} for loss, one in self.best]
        figures = {"step": self.step, "images": self.images, "seconds": self.seconds, "starts": self.starts}
        return {**figures, "best": best, "seen": sorted(self.seen)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> _State:
        best = [(one["loss"], Candidate.from_json(one)) for one in data["best"]]
        return cls(data["step"], data["images"], data["seconds"], dict(data["starts"]), best, set(data["seen"]))


class Refinement:
    """Tries candidates one after the other, and keeps the best.

    First the starts as they are, then the best start's counts under every method, then random moves of counts between
    blocks and between pruning and merging, of the method, and mixtures, each at the budget. Everything follows from the
    seed and the images. A candidate that is clearly worse than the best after some of the images is given up, which the
    starts never are.

    Args:
        model: plain, in evaluation mode; it is compressed while a candidate is tried, and left plain.
        batches: this process's calibration images [B, 3, H, W], every world.size-th of all, and labels [B]; passed over
            once for each candidate.
        ruler: of the model, with the cost that is limited.
        budget: what candidates may cost, by ``ruler``.
        starts: by name. The result is never worse on the calibration images than any of them.
        settings: see :class:`RefineSettings`.
        state: file for stopping and resuming, written whole; one of another refinement is refused.
        facts: JSON data that a resumed refinement must share, such as the model's and the images' names.
        amp_dtype: run under autocast.
        world: the processes that share the images.
        note: called with a line of text after each improvement.

    Raises:
        ValueError: there is no start, a process has no image, or the state is another refinement's.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Tensor, Tensor]],
        ruler: Ruler,
        budget: float,
        starts: Mapping[str, Method],
        settings: RefineSettings,
        *,
        state: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        amp_dtype: torch.dtype | None = None,
        world: World = ALONE,
        note: Callable[[int, str], None] | None = None,
    ) -> None:
        if not starts:
            raise ValueError("starts must hold at least one method, got none that reaches the budget")
        self.model, self.settings, self.world, self.note = model, settings, world, note
        self.moves = Moves(ruler, budget)
        self.starts = {name: self.moves.of(method) for name, method in starts.items()}
        parameter = next(model.parameters())
        self._device, self._amp_dtype = parameter.device, amp_dtype
        self._batches = [(images.to(parameter.device, parameter.dtype), labels) for images, labels in batches]
        own = sum(len(labels) for _, labels in self._batches)
        self._count, lacking = map(int, self._summed([own, not own]))
        if lacking:
            raise ValueError(
                f"the calibration images must be at least one for each process, got {self._count} for {world.size}; "
                "use more images or fewer processes"
            )
        # The first images of all, of which this process has every world.size-th: the same for any number of processes.
        self._early = math.ceil(_EARLY * self._count)
        self._own_early = len(range(world.rank, self._early, world.size))
        self._answers = self._uncompressed()
        self._path = state
        self._facts = {
            **(facts or {}),
            **asdict(settings),
            "budget": budget,
            "starts": {name: one.to_json() for name, one in self.starts.items()},
        }
        self._facts.pop("candidates")  # more of them continue what fewer began
        self.state = self.world.from_main(self._read)
        self._losses: Tensor | None = None  # of the best candidate, image by image

    def run(self, stop: StopRequest) -> RefineResult:
        """Try candidates up to the last, or until ``stop`` asks; what was tried is kept in the state file."""
        state, begun = self.state, time.perf_counter()
        before, images = state.seconds, state.images
        if state.best and state.step < self.settings.candidates:
            self._try(state.best[0][1], may_give_up=False)  # for its losses image by image, which no file has
            self._losses, state.images = self._tried, images
        queue = self._queue()
        while state.step < self.settings.candidates and not self._stops(stop):
            name, candidate = next(queue)
            if name is not None and candidate is not None:
                # A start counts by its own loss even if it equals another.
                loss = self._try(candidate, may_give_up=False)
                assert loss is not None
                state.starts[name] = loss
                self._enter(loss, candidate, f"start {name}")
            elif candidate is not None and candidate.key not in state.seen:
                loss = self._try(candidate, may_give_up=True)
                if loss is not None:
                    self._enter(loss, candidate, "moved")
            if candidate is not None:
                state.seen.add(candidate.key)
            state.step += 1
            state.seconds = before + time.perf_counter() - begun
            self._write()
        loss, best = state.best[0] if state.best else (float("nan"), next(iter(self.starts.values())))
        return RefineResult(
            self.moves.ruler.as_schedule(self.moves.method(best)),
            self.moves.method(best),
            loss,
            dict(state.starts),
            self.moves.cost(best),
            state.step,
            state.images,
            state.seconds,
            state.step >= self.settings.candidates,
        )

    def _queue(self) -> Iterator[tuple[str | None, Candidate | None]]:
        """The candidates from the state's step on; each is made when it is asked for."""
        names = list(self.starts)
        while True:
            step = self.state.step
            if step < len(names):
                yield names[step], self.starts[names[step]]
                continue
            step -= len(names)
            if step < len(self.moves.methods):
                # The best start stays what it is while every method has its turn.
                first = self.starts[min(self.state.starts, key=self.state.starts.__getitem__)]
                yield None, self.moves.at_budget(self.moves.methods[step], first.drops, first.pruned)
                continue
            draw = np.random.default_rng(derived_seed(self.settings.seed, step))
            yield None, self.moves.step([one for _, one in self.state.best], draw)

    def _enter(self, loss: float, candidate: Candidate, how: str) -> None:
        state = self.state
        improved = not state.best or loss < state.best[0][0]
        if all(one.key != candidate.key for _, one in state.best):
            # Of equals, the one that came first stays ahead: sorting is stable.
            state.best = sorted([*state.best, (loss, candidate)], key=lambda pair: pair[0])[:_PARENTS]
        if improved:
            self._losses = self._tried
            if self.note is not None:
                self.note(state.step + 1, f"{how}: loss {loss:.4f}, {self.moves.text(candidate)}")

    @torch.inference_mode()
    def _try(self, candidate: Candidate, *, may_give_up: bool) -> float | None:
        """Mean loss over all processes' images; None if the candidate does not fit the model, or was given up."""
        try:
            method = self.moves.method(candidate)
            find_adapter(self.model).validate(self.model, method)
            compress(self.model, method)
        except ValueError:
            if not may_give_up:
                raise
            return None
        try:
            losses = torch.zeros(0, dtype=torch.float64, device=self._device)
            compares = may_give_up and self._losses is not None and self._early >= _LEAST
            for (images, labels), answers in zip(self._batches, self._answers, strict=True):
                losses = torch.cat([losses, self._loss(self._logits(images), labels, answers)])
                if compares and len(losses) >= self._own_early:
                    compares = False  # once for each candidate, in every process
                    if self._is_clearly_worse(losses):
                        return None
        finally:
            restore(self.model)
        self._tried = losses
        self.state.images += self._count
        (total,) = self._summed([float(losses.sum())])
        mean = total / self._count
        return mean if np.isfinite(mean) else float("inf")

    def _is_clearly_worse(self, losses: Tensor) -> bool:
        """By the first images of all processes, as the paired difference from the best candidate's losses tells."""
        assert self._losses is not None
        difference = (losses - self._losses[: len(losses)])[: self._own_early]
        total, squares, seen = self._summed([float(difference.sum()), float(difference.square().sum()), len(losses)])
        mean = total / self._early
        variance = max(0.0, squares / self._early - mean**2) * self._early / (self._early - 1)
        if mean < _CLEARLY * (variance / self._early) ** 0.5:
            return False  # never where a loss is not a number
        self.state.images += int(seen)
        return True

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(self._device.type, self._amp_dtype):
            return self.model(images).double()

    def _loss(self, logits: Tensor, labels: Tensor, answers: Tensor) -> Tensor:
        """Per image [B], float64."""
        if self.settings.loss == "answers":
            return -(answers * logits.log_softmax(-1)).sum(-1)
        return F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    @torch.inference_mode()
    def _uncompressed(self) -> list[Tensor]:
        """The plain model's probabilities, where they are what a candidate is held to."""
        if self.settings.loss == "labels":
            return [labels for _, labels in self._batches]
        return [self._logits(images).softmax(-1) for images, _ in self._batches]

    def _stops(self, stop: StopRequest) -> bool:
        return self._summed([stop.wanted])[0] > 0

    def _summed(self, figures: Iterable[float]) -> list[float]:
        """Sums over the processes; the same in each."""
        if self.world.size == 1:
            return list(map(float, figures))
        found = torch.tensor(list(map(float, figures)), dtype=torch.float64, device=self._device)
        return self.world.sum_(found).tolist()

    def _read(self) -> _State:
        if self._path is None or not self._path.is_file():
            return _State()
        data = read_json(self._path)
        if not isinstance(data, dict) or data.get("facts") != json.loads(json.dumps(self._facts)):
            raise ValueError(
                f"'{self._path}' must be this refinement's state, got that of one with other settings, starts or data; "
                "remove it, or choose another output folder"
            )
        return _State.from_json(data)

    def _write(self) -> None:
        if self._path is not None and self.world.is_main:
            write_whole(self._path, json.dumps({"facts": self._facts, **self.state.to_json()}, indent=1) + "\n")


def refine(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    gflops: float,
    starts: Mapping[str, Method],
    settings: RefineSettings | None = None,
    **options: Any,
) -> RefineResult:
    """Refine at a number of multiply-adds: :class:`Refinement`, whose other arguments ``options`` are, to its end."""
    told = settings or RefineSettings()
    return Refinement(model, batches, Ruler(model), gflops * 1e9, starts, told, **options).run(StopRequest())
