"""A comparison from its first cell to its last: what is not yet done is done, and every cell is kept at once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.api import compress, quantize, restore
from tokcomp.compare.answers import Answers, Stopped, answer, images_per_second, packed, unpacked
from tokcomp.compare.build import Builder
from tokcomp.compare.cells import Cells, key_of
from tokcomp.compare.entries import UNCOMPRESSED, Entry
from tokcomp.compare.summary import summarize
from tokcomp.files import remove_drafts, sole_writer, write_whole
from tokcomp.measure.info import machine, package_versions
from tokcomp.methods import Method
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.steps import Progress, StopRequest

RESULTS, SCHEDULES = "results.json", "schedules"


class Images:
    """Labelled images that are passed over again and again: kept in memory after the first pass if they fit.

    Args:
        start: begins a pass over this process's share: batches of images [B, 3, H, W] and labels [B].
        count: images of the whole set.
        most_bytes: how much may be kept.
    """

    def __init__(
        self, start: Callable[[], Iterable[tuple[Tensor, Tensor]]], count: int, most_bytes: int = 4 << 30
    ) -> None:
        self._start, self.count, self._most = start, count, most_bytes
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def __iter__(self) -> Any:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Tensor, Tensor]] | None = []
        size = 0
        for images, labels in self._start():
            size += images.numel() * images.element_size()
            if kept is not None:
                kept.append((images, labels))
                kept = kept if size <= self._most else None
            yield images, labels
        self._kept = kept

    def first(self, count: int) -> Tensor:
        """The first images of a pass, at most ``count``: [n, 3, H, W]."""
        found: list[Tensor] = []
        for images, _ in self:
            found.append(images[: count - sum(map(len, found))])
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)


@dataclass(frozen=True)
class Plan:
    """What is compared, and how it is measured.

    Args:
        entries: the methods.
        gflops: the budgets, 1e9 multiply-adds per image.
        dtype, amp_dtype: as for :func:`tokcomp.compare.answers.answer`.
        speed_batch: images in a batch when speed is measured; 0: it is not. Random schedules are never timed.
        int8: whether all but random schedules are measured with their products in int8 too.
        facts: everything else that the results follow from: model, weights, data.
        minutes: stop cleanly after so long; None: at the end.
    """

    entries: Sequence[Entry]
    gflops: Sequence[float]
    facts: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    amp_dtype: torch.dtype | None = None
    speed_batch: int = 16
    int8: bool = False
    minutes: float | None = None
    command: str | None = field(default=None, compare=False)

    @property
    def cells(self) -> list[tuple[Entry, float]]:
        """All of them, in order: the uncompressed model, then each method at every budget."""
        pairs = [(entry, gflops) for entry in self.entries for gflops in self.gflops]
        return [(UNCOMPRESSED, 0.0), *((one, gflops) for one, gflops in pairs if not one.only or gflops in one.only)]


class Comparison:
    """Runs a plan's cells, and writes ``results.json`` and the schedules into a folder.

    Args:
        model: plain, in evaluation mode, on ``device``; it is left plain.
        images: to measure accuracy on.
        builder: makes the methods.
        plan: what to do.
        folder: of the comparison; one that holds finished cells of the same facts is continued.
        device: where the model is.
        world: the processes of the run, which share the images.
        show_progress: whether to show progress on stderr.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        builder: Builder,
        plan: Plan,
        folder: Path,
        *,
        device: torch.device,
        world: World = ALONE,
        show_progress: bool = False,
    ) -> None:
        self.model, self.images, self.builder, self.plan = model, images, builder, plan
        self.folder, self.device, self.world = folder, device, world
        self._cells, self._show = Cells(folder), show_progress and world.is_main
        self._plain: nn.Module | None = None
        self.done: dict[tuple[str, float], dict[str, Any]] = {}
        self._dtype = str(plan.dtype).removeprefix("torch.")
        self._facts = {
            **plan.facts,
            "dtype": self._dtype,
            "amp": None if plan.amp_dtype is None else str(plan.amp_dtype).removeprefix("torch."),
            "speed_batch": plan.speed_batch,
            "device": device.type,
            "num_images": images.count,
        }

    def run(self, stop: StopRequest) -> bool:
        """Do what is not done; returns whether everything is. What is finished when ``stop`` asks is kept.

        Raises:
            OSError: the folder cannot be written, or another comparison is writing into it.
        """
        if not self.world.is_main:
            return self._run(stop)
        with sole_writer(self.folder):
            for folder in (self.folder, self._cells.folder, self.folder / SCHEDULES):
                remove_drafts(folder)
            return self._run(stop)

    def methods_at(self, gflops: float, most: int = 6) -> dict[str, Method]:
        """The first methods that were compared at a budget, by name, random ones aside. Called in every process."""
        found: dict[str, Method] = {}
        for entry in self.plan.entries:
            cell = self.done.get((entry.name, gflops), {"impossible": ""})
            if entry.kind != "random" and "impossible" not in cell and len(found) < most:
                found[entry.name] = self.builder.build(entry, gflops)
        return found

    def _run(self, stop: StopRequest) -> bool:
        cells = self.plan.cells
        progress = Progress(len(cells), label="compare", show=self._show)
        begun = time.monotonic()
        try:
            for number, (entry, gflops) in enumerate(cells, 1):
                facts = {**self._facts, "entry": entry.describe(), "gflops": gflops}
                key = key_of(facts)
                cell = self.world.from_main(lambda key=key: self._cells.load(key))  # type: ignore[misc]
                if cell is None:
                    self._check(stop, begun)
                    cell = self._measure(entry, gflops, stop)
                    if self.world.is_main:
                        self._cells.store(key, facts, cell)
                    progress.note(number, _line(entry, gflops, cell))
                if self.plan.int8 and entry.kind != "random" and not cell.keys() & {"int8", "impossible"}:
                    self._check(stop, begun)
                    cell["int8"] = self._measure_int8(entry, gflops, cell, stop)
                    if self.world.is_main:
                        self._cells.store(key, facts, cell)
                    progress.note(number, f"{_place(entry, gflops)} in int8: top-1 {cell['int8']['top1']:.2f} %")
                self.done[entry.name, gflops] = {"entry": entry.name, "kind": entry.kind, "target": gflops, **cell}
                progress.advance()
                if self.world.is_main:
                    self._write()
        except Stopped:  # a search or a refinement, if not the cell in hand, goes on from its own file
            return False
        finally:
            progress.close()
        return True

    def _check(self, stop: StopRequest, begun: float) -> None:
        """Stop if any process was asked to, or the time is up."""
        late = self.plan.minutes is not None and time.monotonic() - begun > 60 * self.plan.minutes
        wanted = torch.tensor([float(stop.wanted or late)], device=self.device)
        if self.world.sum_(wanted).item() > 0:
            raise Stopped

    def _measure(self, entry: Entry, gflops: float, stop: StopRequest) -> dict[str, Any]:
        method: Method | None = None
        if entry.kind != "none":
            try:
                method = self.builder.build(entry, gflops)
            except ValueError as error:
                return {"impossible": str(error)}
            compress(self.model, method)
        try:
            found = self._answer(stop)
            cell = self._facts_of(method, found)
            if self.plan.speed_batch and entry.kind != "random" and self.world.is_main:
                cell |= self._speed(method)
        finally:
            restore(self.model)
        if method is None:
            cell["labels"] = packed(found.labels)
        elif self.world.is_main:
            cell |= self._keep_schedule(entry, gflops, method)
        return cell

    def _measure_int8(
        self, entry: Entry, gflops: float, cell: Mapping[str, Any], stop: StopRequest
    ) -> dict[str, float]:
        """The cell again with its products in int8: top-1, the answers that are the cell's in %, and the speed."""
        if entry.kind != "none":
            compress(self.model, self.builder.build(entry, gflops))
        try:
            exact = copy.deepcopy(self.model)
            quantize(self.model)
            found = self._answer(stop)
            result = {"top1": found.top1, "same": found.share(found.classes == unpacked(cell["answers"]))}
            if self.plan.speed_batch and self.world.is_main:
                images = self.images.first(self.plan.speed_batch).to(self.device, self.plan.dtype)
                rate, _, ratio = images_per_second(self.model, exact, images)
                result |= {"images_per_second": rate, "over_float32": ratio}
        finally:
            restore(self.model)
        return result

    def _answer(self, stop: StopRequest) -> Answers:
        def on_batch(seen: int) -> None:
            # Several processes agree on stopping between cells alone: one that left would keep the others waiting.
            if stop.wanted and self.world.size == 1:
                raise Stopped

        return answer(
            self.model,
            self.images,
            self.images.count,
            device=self.device,
            dtype=self.plan.dtype,
            amp_dtype=self.plan.amp_dtype,
            world=self.world,
            on_batch=on_batch,
        )

    def _facts_of(self, method: Method | None, found: Answers) -> dict[str, Any]:
        dense = self.done.get((UNCOMPRESSED.name, 0.0))
        same = found.classes == unpacked(dense["answers"]) if dense is not None else found.counted
        return {
            "gflops": self.builder.flops(method) / 1e9,
            "top1": found.top1,
            "same": found.share(same),
            "cross_entropy": found.cross_entropy,
            "num_images": int(found.counted.sum()),
            "answers": packed(found.classes),
        }

    def _speed(self, method: Method | None) -> dict[str, float]:
        """The compressed model's speed, in turns with the plain one's."""
        images = self.images.first(self.plan.speed_batch).to(self.device, self.plan.dtype)
        if self._plain is None:
            # Copied plain: what a compressed model has packed is not to be shared.
            restore(self.model)
            self._plain = copy.deepcopy(self.model)
            if method is not None:
                compress(self.model, method)
        found = images_per_second(self.model, self._plain, images, amp_dtype=self.plan.amp_dtype)
        return dict(zip(("images_per_second", "uncompressed_images_per_second", "speedup"), found, strict=True))

    def _keep_schedule(self, entry: Entry, gflops: float, method: Method) -> dict[str, Any]:
        """The counts, and the schedule as a file where the method follows one."""
        if method.varies:
            return {"method": repr(method), "kept": self.builder.measured.kept(method)}
        counts = self.builder.ruler.counts(method)
        kept: dict[str, Any] = {"method": repr(method), "kept": counts.kept, "before_merge": counts.before_merge}
        if entry.kind != "random" and self.builder.ruler.has_schedule(method):
            name = "".join(letter if letter.isalnum() else "-" for letter in entry.name)
            path = self.folder / SCHEDULES / f"{name}-{gflops:g}.json"
            schedule = self.builder.ruler.as_schedule(method)
            schedule.provenance = {"source": f"tokcomp compare, {entry.name}", **self._facts}
            schedule.save(path)
            kept["schedule"] = str(path.relative_to(self.folder))
        return kept

    def _write(self) -> None:
        record = {
            "facts": self._facts,
            "command": self.plan.command,
            "machine": machine(),
            "versions": package_versions(),
            "finished": len(self.done) == len(self.plan.cells),
            **summarize(list(self.done.values())),
        }
        write_whole(self.folder / RESULTS, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _place(entry: Entry, gflops: float) -> str:
    return entry.name if entry.kind == "none" else f"{entry.name} at {gflops:g} G"


def _line(entry: Entry, gflops: float, cell: Mapping[str, Any]) -> str:
    where = _place(entry, gflops)
    if "impossible" in cell:
        return f"{where}: left out, {cell['impossible']}"
    speed = f", {cell['images_per_second']:.1f} images/s" if "images_per_second" in cell else ""
    return f"{where}: top-1 {cell['top1']:.2f} %, {cell['gflops']:.4g} GFLOPs{speed}"
