"""A whole search: from a frozen model, images and budgets to schedules (DiffRate, Alg. 1 and Eq. 13)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.api import compress, restore
from tokcomp.budgets import Budget
from tokcomp.cost import flops
from tokcomp.measure.evaluate import evaluate
from tokcomp.runs.batches import Batches, check_batch_size
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.log import RunLog, read_log
from tokcomp.runs.loop import CHECKPOINT, Run
from tokcomp.runs.recipe import LearningRate, Targets, soft_cross_entropy
from tokcomp.runs.steps import MODEL, DivergedError, StopRequest, kept_generators, seed_all
from tokcomp.search.folder import TRACES, SearchFolder
from tokcomp.search.model import DiffRateSearch
from tokcomp.search.settings import SearchResult, SearchSettings, diverged
from tokcomp.search.target import Target
from tokcomp_kernels.product_types import autocast

#: Starts a pass over held-out images: normalized [b, 3, H, W] and labels [b].
HeldOut = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def run_search(
    model: nn.Module, batches: Batches, budgets: Budget | Sequence[Budget], settings: SearchSettings, **options: Any
) -> SearchResult:
    """Search one schedule: :func:`run_searches` with one target."""
    wanted = [budgets] if isinstance(budgets, Budget) else list(budgets)
    return run_searches(model, batches, {"": wanted}, settings, **options)[0]


def run_searches(
    model: nn.Module,
    batches: Batches,
    targets: Mapping[str, Sequence[Budget]],
    settings: SearchSettings,
    *,
    held_out: HeldOut | None = None,
    output: Path | None = None,
    resume: bool = False,
    facts: Mapping[str, Any] | None = None,
    command: str | None = None,
    world: World = ALONE,
    stop: StopRequest | None = None,
    show_progress: bool = False,
) -> list[SearchResult]:
    """Search one schedule per target, all on the same batches. Each result is as if it had been searched for
    separately.

    Args:
        model: a plain timm model, pre-trained, on the device to use. It is frozen (``requires_grad``) and stays plain.
        batches: training images as the model takes them, and labels.
        targets: name -> its budgets, which are summed. A single target may have the name "".
        settings: see :class:`SearchSettings`.
        held_out: starts a pass over images (this process's share) for monitoring accuracy, with the current schedule
            and tokens really dropped; it does not influence the search.
        output: folder for schedules, logs, plots and checkpoints; without one nothing is written.
        resume: continue from the folder's checkpoint, if it has one.
        facts: what the schedule's provenance says about model, weights and data; a resumed run must have the same.
        command: the command line, for the provenance.
        world: this process among those of the run; all must pass the same arguments.
        stop: once its ``wanted`` is true, the run ends after the current step, with a checkpoint.
        show_progress: whether to show a progress line on stderr.

    Returns:
        One result per target, in order.

    Raises:
        ValueError: the settings do not fit the batches or model; the folder holds another run, or the run to be resumed
            has other settings.
        DivergedError: a loss was not finite; the last checkpoint is from before that.
        OSError: the folder cannot be written, or another run is writing into it, found before the first step.
    """
    with kept_generators():
        run = SearchRun(
            model,
            batches,
            targets,
            settings,
            held_out=held_out,
            output=output,
            facts=facts,
            command=command,
            world=world,
            show_progress=show_progress,
        )
        run.train(stop or StopRequest(), resumed=resume)
        return run.results


class SearchRun(Run):
    """The run of :func:`run_searches`, which documents the arguments and errors. It draws random numbers."""

    kind = label = "search"
    traces = TRACES

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        targets: Mapping[str, Sequence[Budget]],
        settings: SearchSettings,
        *,
        held_out: HeldOut | None = None,
        output: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        command: str | None = None,
        world: World = ALONE,
        show_progress: bool = True,
    ) -> None:
        if not targets or not all(targets.values()):
            raise ValueError(f"targets must have at least one budget each, got {dict(targets)!r}")
        check_batch_size(batches.batch_size, world.size, batches.pieces, settings.recipe.mixes)
        self.model, self.told, self.held_out = model, settings, held_out
        self.folder = None if output is None else SearchFolder(output, list(targets), command)
        recipe = settings.recipe
        device, self.dtype = _place_of(model)
        steps = settings.steps or max(1, round(recipe.epochs * batches.steps_per_epoch))
        self.warmup_steps = round(settings.budget_warmup_epochs * batches.steps_per_epoch)
        if self.warmup_steps >= steps:
            raise ValueError(
                f"budget_warmup_epochs must leave steps for the budget, got {self.warmup_steps} of {steps} steps"
            )
        self.targets = []
        for name, budgets in targets.items():
            search = DiffRateSearch(
                model,
                settings.granularity,
                metric=settings.metric,
                pipeline=settings.pipeline,
                match_inference=settings.match_inference,
                seed=settings.seed,
            )
            self.targets.append(Target(name, search, budgets, recipe))
        self.rates = [LearningRate(recipe, target.optimizer, steps, batches.steps_per_epoch) for target in self.targets]
        num_classes = int(getattr(model, "num_classes", 0))
        if num_classes < 1:
            raise ValueError("the model must have a classifier, got num_classes = 0")
        self.mix = Targets(recipe, num_classes, settings.seed)
        self.uncompressed_gflops = flops(model) / 1e9
        self.uncompressed_top1: float | None = None
        self._step = 0
        # Taken before the first step: a budget that learns changes its own description.
        described = {target.name: [budget.describe() for budget in target.budgets] for target in self.targets}
        shared = {
            **settings.describe(),
            "metric": self.targets[0].search.metric,
            "pipeline": self.targets[0].search.pipeline,
            "steps": steps,
            "batch_size": batches.batch_size,
            "pieces": batches.pieces,
            "data_seed": batches.seed,
            "num_images": batches.num_images,
            "targets": json.loads(json.dumps(described)),
            "processes": world.size,
            "device": device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            **(facts or {}),
        }
        interval = max(1, steps // 10) if settings.eval_interval is None else settings.eval_interval
        super().__init__(
            batches,
            output,
            settings=shared,
            device=device,
            world=world,
            total_steps=steps,
            checkpoint_steps=settings.checkpoint_interval,
            log_steps=settings.log_interval,
            evaluate_steps=None if held_out is None else interval,
            show_progress=show_progress,
        )

    @property
    def step_number(self) -> int:
        return self._step

    def begin(self) -> Sequence[Mapping[str, float]]:
        if self.held_out is not None:
            self.uncompressed_top1 = self._accuracy(None)
        return []

    @contextmanager
    def running(self) -> Iterator[None]:
        for target in self.targets:
            target.search.train()
        try:
            yield
        finally:
            self.model.eval()

    def read(self) -> dict[str, Any] | None:
        """As in :class:`Run`, but a search that was killed before its first checkpoint starts anew."""
        return super().read() if (self._folder / CHECKPOINT).is_file() else None

    def state(self) -> dict[str, Any]:
        targets = [target.state() for target in self.targets]
        return {"step": self._step, "targets": targets, "uncompressed_top1": self.uncompressed_top1}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._step, self.uncompressed_top1 = state["step"], state["uncompressed_top1"]
        for target, saved in zip(self.targets, state["targets"], strict=True):
            target.load_state(saved)

    def log_files(self) -> Sequence[tuple[Path, Sequence[str], Path]]:
        folder = self.folder
        if folder is None:
            return []
        return [(folder.log(one.name), one.columns(), folder.board(one.name)) for one in self.targets]

    def open_logs(self, resume_step: int | None) -> list[RunLog]:
        logs = super().open_logs(resume_step)
        for target, log in zip(self.targets, logs, strict=False):
            target.rows = read_log(log.path)
        return logs

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update of every target; their losses [targets] over all processes, NaN where a gradient is not finite."""
        step = self._step
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        size = len(labels) // self.batches.pieces
        pieces = [
            self.mix(some.to(self.dtype), answers, step)
            for some, answers in zip(images.split(size), labels.split(size), strict=True)
        ]
        losses = [
            self._update(target, rate, pieces, step) for target, rate in zip(self.targets, self.rates, strict=True)
        ]
        self._step += 1
        return torch.stack(losses)

    def _update(self, target: Target, rate: LearningRate, pieces: Sequence[tuple[Tensor, Tensor]], step: int) -> Tensor:
        rate.set(step)
        target.optimizer.zero_grad()
        entropy = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece, (mixed, answers) in enumerate(pieces):
            seed_all(self.told.seed, step, MODEL, self.world.rank, piece)
            with self._autocast():
                logits, _ = target.search(mixed)
            loss = soft_cross_entropy(logits, answers) / len(pieces)
            loss.backward()
            entropy += loss.detach()
        over = self._budget_loss(target, step)
        flat = target.flat_gradient(entropy)
        if self.world.size > 1:
            self.world.mean_(flat)
            target.take_gradient(flat)
        entropy = flat[-1].double()
        target.sums += torch.stack([entropy + over, entropy, torch.ones_like(entropy)])
        if self.told.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(target.parameters, self.told.recipe.clip_grad)
        target.optimizer.step()
        if step >= self.warmup_steps:
            target.budgets_learn(step)
        return torch.where(torch.isfinite(flat).all(), entropy + over, torch.nan)

    def _budget_loss(self, target: Target, step: int) -> Tensor:
        """Adds the budgets' gradients, which are the same in every process, and returns their loss."""
        if step < self.warmup_steps:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        counts = target.search.counts()
        terms = [budget.weight * budget.loss(counts) for budget in target.budgets]
        loss = torch.stack([term.double() for term in terms]).sum()
        loss.backward()
        return loss.detach()

    def diverged(self, step: int, number: int, loss: float) -> DivergedError:
        kept = "nothing was written" if self.folder is None else f"the last good checkpoint is {self.folder.checkpoint}"
        return diverged(step, self.targets[number].name, kept)

    def rows(self, step: int, evaluates: bool) -> Sequence[Mapping[str, float]]:
        rows = []
        for number, (target, rate) in enumerate(zip(self.targets, self.rates, strict=True)):
            top1 = self._accuracy(target) if evaluates else None
            rows.append(self._row(target, rate.set(step - 1), top1))
            target.rows.append({"step": step, **rows[-1]})
            text = _status(target, rows[-1], len(self.targets))
            if evaluates:
                self.progress.note(step, text)
            if number == step // self.log_steps % len(self.targets):
                self.progress.status(text)
        return rows

    def _row(self, target: Target, rate: float, top1: float | None) -> dict[str, float]:
        loss, entropy, steps = target.sums.tolist()
        target.sums.zero_()
        row = {"loss": loss / steps, "cross_entropy": entropy / steps, "lr": rate, **target.values()}
        return row if top1 is None else {**row, "top1": top1}

    def _accuracy(self, target: Target | None) -> float:
        """Top-1 on the held-out images, per cent: with tokens really dropped, or for the plain model."""
        if target is not None:
            compress(self.model, target.search.method())
        try:
            return self.accuracy_now()
        finally:
            restore(self.model)

    def accuracy_now(self) -> float:
        """Top-1 of the model as it is now, on the held-out images, per cent."""
        assert self.held_out is not None
        training = self.model.training
        try:
            found = evaluate(
                self.model.eval(),
                self.held_out(),
                device=self.device,
                dtype=self.dtype,
                amp_dtype=torch.bfloat16 if self.told.amp else None,
                world=self.world,
            )
        finally:
            self.model.train(training)
        return found.top1

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device.type, torch.bfloat16 if self.told.amp else None)

    def finish(self) -> None:
        if self.folder is not None:
            self.folder.write_results(self.results, [target.budgets for target in self.targets], self.settings)

    @cached_property
    def results(self) -> list[SearchResult]:
        """One per target, once the run has ended."""
        return [self._result(target) for target in self.targets]

    def _result(self, target: Target) -> SearchResult:
        schedule = target.search.schedule()
        try:
            gflops = flops(compress(self.model, target.search.method())) / 1e9
        finally:
            restore(self.model)
        with torch.no_grad():
            costs = target.costs_of(target.search.counts())
        seen = [row["top1"] for row in target.rows if row["step"] == self._step and "top1" in row]
        return SearchResult(
            schedule=schedule,
            gflops=gflops,
            uncompressed_gflops=self.uncompressed_gflops,
            costs=costs,
            top1=seen[0] if seen else None,
            uncompressed_top1=self.uncompressed_top1,
            steps=self._step,
            complete=self._step == self.total_steps,
            log=target.rows,
        )


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def _status(target: Target, row: Mapping[str, float], targets: int) -> str:
    kept = " ".join(str(int(row[f"kept_{block}"])) for block in range(len(target.search.prune)))
    text = f"loss {row['loss']:.4g}, {row['gflops']:.4g} GFLOPs, kept {kept}"
    if "top1" in row:
        text = f"top-1 {row['top1']:.2f} %, {text}"
    return f"{target.name}: {text}" if targets > 1 else text
