"""A whole search: from a frozen model, images and budgets to schedules (DiffRate, Alg. 1 and Eq. 13)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.api import compress, restore
from tokcomp.budgets import Budget
from tokcomp.cost import flops
from tokcomp.files import sole_writer
from tokcomp.measure.evaluate import evaluate
from tokcomp.runs.batches import Batches, check_batch_size
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.recipe import LearningRate, Targets, soft_cross_entropy
from tokcomp.runs.steps import MODEL, Progress, StopRequest, kept_generators, seed_all
from tokcomp.search.folder import SearchFolder
from tokcomp.search.model import DiffRateSearch
from tokcomp.search.settings import SearchResult, SearchSettings, diverged
from tokcomp.search.target import Target

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
    """Search one schedule per target, all on the same batches. Each is found as if it had been searched alone.

    Args:
        model: a plain timm model, pre-trained, on the device to use. It is frozen (``requires_grad``) and left plain.
        batches: training images as the model takes them, and labels.
        targets: name -> its budgets, which are summed. A single target may have the name "".
        settings: see there.
        held_out: starts a pass over images (this process's share) on which accuracy is watched, under the schedule so
            far and with tokens really dropped; nothing is chosen by it.
        output: folder for schedules, logs, plots and checkpoints; without one nothing is written.
        resume: go on from the folder's checkpoint, where it has one.
        facts: what to say of model, weights and data in the schedule's provenance; a resumed run must have the same.
        command: the command line, for the provenance.
        world: this process among those of the run; all must pass the same arguments.
        stop: where its ``wanted`` becomes true the run ends after the step, with a checkpoint.
        show_progress: a progress line on stderr.

    Returns:
        One result per target, in their order.

    Raises:
        ValueError: the settings do not fit the batches or model, the folder holds another run, or one of other
            settings that was to be resumed.
        DivergedError: a loss was not finite; the last checkpoint is older than that.
        OSError: the folder cannot be written, or another run is writing into it, found before the first step.
    """
    if not targets or not all(targets.values()):
        raise ValueError(f"targets must have at least one budget each, got {dict(targets)!r}")
    check_batch_size(batches.batch_size, world.size, batches.pieces, settings.recipe.mixes)
    with kept_generators():
        run = _Run(model, batches, targets, settings, held_out, world, dict(facts or {}))
        folder = None if output is None else SearchFolder(output, list(targets), command)
        with ExitStack() as held:
            step = 0 if folder is None else run.open(folder, resume, held)
            return run.go(step, folder, stop or StopRequest(), show_progress)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        targets: Mapping[str, Sequence[Budget]],
        settings: SearchSettings,
        held_out: HeldOut | None,
        world: World,
        facts: dict[str, Any],
    ) -> None:
        self.model, self.batches, self.settings, self.held_out = model, batches, settings, held_out
        self.world, self.facts = world, facts
        recipe = settings.recipe
        self.device, self.dtype = _place_of(model)
        self.steps_per_epoch = batches.steps_per_epoch
        self.steps = settings.steps or max(1, round(recipe.epochs * self.steps_per_epoch))
        self.warmup_steps = round(settings.budget_warmup_epochs * self.steps_per_epoch)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"budget_warmup_epochs must leave steps for the budget, got {self.warmup_steps} of {self.steps} steps"
            )
        self.eval_interval = settings.eval_interval
        if self.eval_interval is None:
            self.eval_interval = max(1, self.steps // 10)
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
        # As they begin: one may learn, and then describes itself otherwise.
        described = {target.name: [budget.describe() for budget in target.budgets] for target in self.targets}
        self._budgets = json.loads(json.dumps(described))
        self.rates = [
            LearningRate(recipe, target.optimizer, self.steps, self.steps_per_epoch) for target in self.targets
        ]
        num_classes = int(getattr(model, "num_classes", 0))
        if num_classes < 1:
            raise ValueError("the model must have a classifier, got num_classes = 0")
        self.mix = Targets(recipe, num_classes, settings.seed)
        self.uncompressed_gflops = flops(model) / 1e9
        self.uncompressed_top1: float | None = None

    def describe(self) -> dict[str, Any]:
        """What a resumed run must share with its beginning."""
        return {
            **self.settings.describe(),
            "metric": self.targets[0].search.metric,
            "pipeline": self.targets[0].search.pipeline,
            "steps": self.steps,
            "batch_size": self.batches.batch_size,
            "pieces": self.batches.pieces,
            "data_seed": self.batches.seed,
            "num_images": self.batches.num_images,
            "targets": self._budgets,
            "processes": self.world.size,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.facts,
        }

    def go(self, step: int, folder: SearchFolder | None, stop: StopRequest, show: bool) -> list[SearchResult]:
        if step == 0 and self.held_out is not None:
            self.uncompressed_top1 = self._accuracy(None)
        if folder is not None and step == 0:
            self._save(folder, 0)
        progress = Progress(self.steps, step, label="search", show=show and self.world.is_main)
        stopping = _Agreement(self.world, self.device)
        batches = iter(self.batches.iterate(step, self.steps))
        for target in self.targets:
            target.search.train()
        try:
            while step < self.steps:
                flag = self._step(step, next(batches), stop.wanted)
                step += 1
                progress.advance()
                stopped = stopping(stop.wanted, flag)
                self._after_step(step, folder, progress)
                if stopped:
                    break
            if folder is not None:
                self._check_finite(folder)
                self._save(folder, step)
        finally:
            progress.close()
            del batches  # ends the loader's processes
            for target in self.targets:
                if target.log is not None:
                    target.log.close()
            self.model.eval()
        results = [self._result(target, step) for target in self.targets]
        if folder is not None and step == self.steps and self.world.is_main:
            folder.write_results(results, [target.budgets for target in self.targets], self.describe())
        self.world.barrier()
        return results

    def open(self, folder: SearchFolder, resume: bool, held: ExitStack) -> int:
        """The step to begin with; ``held`` holds the folder against other runs."""

        def read() -> dict[str, Any] | None:
            held.enter_context(sole_writer(folder.path))
            return folder.open(self.describe(), resume)

        state = self.world.from_main(read)
        step = 0
        if state is not None:
            step, self.uncompressed_top1 = state["step"], state["uncompressed_top1"]
            for target, saved in zip(self.targets, state["targets"], strict=True):
                target.load_state(saved)
        if self.world.is_main:
            for target in self.targets:
                target.log = folder.open_log(target.name, target.columns(), None if state is None else step)
                target.rows = folder.rows(target.name)
        return step

    def _step(self, step: int, batch: tuple[Tensor, Tensor], stop: bool) -> Tensor:
        """One update of every target; returns a number above 0 where some process wants to stop."""
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        size = len(labels) // self.batches.pieces
        pieces = [
            self.mix(some.to(self.dtype), answers, step)
            for some, answers in zip(images.split(size), labels.split(size), strict=True)
        ]
        flag = torch.zeros((), device=self.device)
        for target, rate in zip(self.targets, self.rates, strict=True):
            rate.set(step)
            target.optimizer.zero_grad()
            entropy = torch.zeros((), dtype=torch.float64, device=self.device)
            for piece, (mixed, answers) in enumerate(pieces):
                seed_all(self.settings.seed, step, MODEL, self.world.rank, piece)
                with self._autocast():
                    logits, _ = target.search(mixed)
                loss = soft_cross_entropy(logits, answers) / len(pieces)
                loss.backward()
                entropy += loss.detach()
            over = self._budget_loss(target, step)
            flat = target.flat_gradient(entropy, flag + float(stop))
            if self.world.size > 1:
                self.world.mean_(flat)
                target.take_gradient(flat)
            flag = flat[-1]
            entropy = flat[-2].double()
            finite = torch.isfinite(flat).all() & torch.isfinite(over)
            target.diverged_at = torch.where((target.diverged_at < 0) & ~finite, step + 1, target.diverged_at)
            target.sums += torch.stack([entropy + over, entropy, torch.ones_like(entropy)])
            if self.settings.recipe.clip_grad is not None:
                nn.utils.clip_grad_norm_(target.parameters, self.settings.recipe.clip_grad)
            target.optimizer.step()
            if step >= self.warmup_steps:
                target.budgets_learn(step)
        return flag

    def _budget_loss(self, target: Target, step: int) -> Tensor:
        """Adds the budgets' gradients, which are the same in every process, and returns their loss."""
        if step < self.warmup_steps:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        counts = target.search.counts()
        terms = [budget.weight * budget.loss(counts) for budget in target.budgets]
        loss = torch.stack([term.double() for term in terms]).sum()
        loss.backward()
        return loss.detach()

    def _after_step(self, step: int, folder: SearchFolder | None, progress: Progress) -> None:
        last = step == self.steps
        evaluates = self.held_out is not None and (last or (self.eval_interval and step % self.eval_interval == 0))
        if self.device.type == "cpu" or last or evaluates or step % self.settings.log_interval == 0:
            self._check_finite(folder)
        if last or evaluates or step % self.settings.log_interval == 0:
            for number, (target, rate) in enumerate(zip(self.targets, self.rates, strict=True)):
                top1 = self._accuracy(target) if evaluates else None
                row = self._row(target, rate.set(step - 1), top1)
                target.rows.append({"step": step, **row})
                if target.log is not None:
                    target.log.write(step, row)
                text = _status(target, row, len(self.targets))
                if evaluates:
                    progress.note(step, text)
                if number == step // self.settings.log_interval % len(self.targets):
                    progress.status(text)
        if folder is not None and step % self.settings.checkpoint_interval == 0 and not last:
            self._check_finite(folder)
            self._save(folder, step)

    def _row(self, target: Target, rate: float, top1: float | None) -> dict[str, float]:
        loss, entropy, steps = target.sums.tolist()
        target.sums.zero_()
        row = {"loss": loss / steps, "cross_entropy": entropy / steps, "lr": rate, **target.values()}
        return row if top1 is None else {**row, "top1": top1}

    def _check_finite(self, folder: SearchFolder | None) -> None:
        for target in self.targets:
            step = int(target.diverged_at)
            if step >= 0:
                kept = "nothing was written" if folder is None else f"the last good checkpoint is {folder.checkpoint}"
                raise diverged(step, target.name, kept)

    def _save(self, folder: SearchFolder, step: int) -> None:
        if self.world.is_main:
            targets = [target.state() for target in self.targets]
            folder.save(
                {
                    "settings": self.describe(),
                    "step": step,
                    "targets": targets,
                    "uncompressed_top1": self.uncompressed_top1,
                }
            )

    def _accuracy(self, target: Target | None) -> float:
        """Top-1 on the held-out images, per cent: with tokens really dropped, or of the plain model."""
        assert self.held_out is not None
        training = self.model.training
        if target is not None:
            compress(self.model, target.search.method())
        try:
            amp_dtype = torch.bfloat16 if self.settings.amp else None
            found = evaluate(
                self.model.eval(),
                self.held_out(),
                device=self.device,
                dtype=self.dtype,
                amp_dtype=amp_dtype,
                world=self.world,
            )
        finally:
            restore(self.model)
            self.model.train(training)
        return found.top1

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.settings.amp else nullcontext()

    def _result(self, target: Target, step: int) -> SearchResult:
        schedule = target.search.schedule()
        try:
            gflops = flops(compress(self.model, target.search.method())) / 1e9
        finally:
            restore(self.model)
        with torch.no_grad():
            costs = target.costs_of(target.search.counts())
        seen = [row["top1"] for row in target.rows if row["step"] == step and "top1" in row]
        return SearchResult(
            schedule=schedule,
            gflops=gflops,
            uncompressed_gflops=self.uncompressed_gflops,
            costs=costs,
            top1=seen[0] if seen else None,
            uncompressed_top1=self.uncompressed_top1,
            steps=step,
            complete=step == self.steps,
            log=target.rows,
        )


class _Agreement:
    """Whether to stop, the same after the same step in every process.

    On GPUs the answer is read one step late, so that no process waits for the step that it has just started.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device = world, device
        self._last: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, wanted: bool, flag: Tensor) -> bool:
        if self._world.size == 1:
            return wanted
        if self._device.type != "cuda":
            return bool(flag > 0)
        before, event = self._last, torch.cuda.Event()
        copy = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
        event.record()
        self._last = copy, event
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)


def _place_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def _status(target: Target, row: Mapping[str, float], targets: int) -> str:
    kept = " ".join(str(int(row[f"kept_{block}"])) for block in range(len(target.search.prune)))
    text = f"loss {row['loss']:.4g}, {row['gflops']:.4g} GFLOPs, kept {kept}"
    if "top1" in row:
        text = f"top-1 {row['top1']:.2f} %, {text}"
    return f"{target.name}: {text}" if targets > 1 else text
