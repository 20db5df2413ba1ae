"""Time against multiply-adds as the budget, on the pretrained backbone: images a second at equal accuracy on this CPU.

Schedules are refined twice from starts of the same kinds: for multiply-adds, and at each batch size for the time which
those take by a table measured here. Beside them ToMe at the same multiply-adds, and the staircase rule of "Pruning One
More Token is Enough", which has no budget but a weight of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import tokcomp
from tokcomp.bench.models import keep_everything
from tokcomp.budgets import LatencyTable, MeasurementStopped, find_latency_table
from tokcomp.compare.answers import answer
from tokcomp.compare.cells import key_of
from tokcomp.compare.run import Images
from tokcomp.equal_cost import Ruler, tome_for_budget
from tokcomp.measure.timing import interleave, stopwatch
from tokcomp.methods import Method
from tokcomp.refine import Refinement, RefineSettings, starts_for
from torch import Tensor

from benchmarks.reproduce.pretrained.one_more_token import AtRandom, OneMoreToken, tokens_of_most_use
from benchmarks.reproduce.pretrained.study import CPU, Work, keep, prepare, resumed
from benchmarks.reproduce.pretrained.weights import MODEL

FOLDER, RESULTS = "latency", "results.json"


class _Stopped(Exception):
    """It was asked to stop, or the time is up; what is finished is kept."""


@dataclass(frozen=True)
class Cell:
    """A method: by which rule, by which share of the multiply-adds or weight of the time, and for which batch size.

    ``batch`` is None for a rule that knows of none.
    """

    rule: str
    setting: float
    batch: int | None

    @property
    def name(self) -> str:
        return f"{self.rule} {self.setting:g}" + ("" if self.batch is None else f", batch {self.batch}")


def run_latency(work: Work) -> bool:
    """Every method's answers, and then the speeds."""

    def check() -> None:
        if work.over:
            raise _Stopped

    settings, own, path = work.settings, work.settings.latency, work.folder / FOLDER / RESULTS
    prepared = prepare(work, 0)
    facts = {**prepared.facts, "shares": list(settings.shares), "test": settings.test, "settings": repr(own)}
    facts |= {"candidates": own.candidates, "refine_images": own.images}
    record = resumed(path, facts, grid={}, rows={}, speeds={})
    training, testing = work.sources.images(settings)
    images = Images(prepared.batches(testing, settings.test, 0), settings.test)
    judges = prepared.batches(training, own.images, 2)
    try:
        check()
        methods = _Methods(prepared.model, judges, work, facts)
        for tokens in methods.grid:
            if str(tokens) not in record["grid"]:
                check()
                pictures = prepared.batches(training, own.grid_images, 6)()
                record["grid"][str(tokens)] = answer(
                    AtRandom(prepared.model, tokens), pictures, own.grid_images, device=CPU
                ).top1
                keep(path, record)
        methods.top1 = {int(tokens): top1 for tokens, top1 in record["grid"].items()}
        for cell in methods.cells():
            if cell.name not in record["rows"]:
                check()
                record["rows"][cell.name] = _row(methods, cell, images)
                keep(path, record)
                methods.say(f"{cell.name}: {record['rows'][cell.name]['top1']:.2f} %")
        for batch in own.batches:
            if str(batch) not in record["speeds"]:
                check()
                record["speeds"][str(batch)] = _speeds(methods, batch, images.first(batch), own.rounds)
                keep(path, record)
    except (_Stopped, MeasurementStopped):
        return False
    return True


def _row(methods: _Methods, cell: Cell, images: Images) -> dict[str, Any]:
    method = methods.of(cell)
    found = answer(tokcomp.compress(copy.deepcopy(methods.model), method), images, images.count, device=CPU)
    return {
        "rule": cell.rule,
        "setting": cell.setting,
        "batch": cell.batch,
        "method": repr(method),
        "gflops": methods.ruler.flops(method) / 1e9,
        "table_ms": {str(batch): ruler.cost(method) for batch, ruler in methods.by_time.items()},
        "top1": found.top1,
        "cross_entropy": found.cross_entropy,
        "right": "".join(str(int(one)) for one in found.right),
    }


def _speeds(methods: _Methods, batch: int, images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Images a second, median, least and most of the rounds, of all that a batch size is for, in turns."""
    models = {
        cell.name: tokcomp.compress(copy.deepcopy(methods.model), methods.of(cell))
        for cell in methods.cells()
        if cell.batch in (None, batch)
    }
    calls = {name: partial(model, images) for name, model in models.items()}
    samples = interleave(calls, stopwatch(CPU), rounds=rounds)
    return {name: [batch / one.median, batch / one.most, batch / one.least] for name, one in samples.items()}


class _Methods:
    """Makes the cells' methods, each once.

    Args:
        model: plain; left so.
        start: begins a pass over the pictures that judge a refinement.
        work, facts: of the study.
    """

    def __init__(self, model: Any, start: Callable[[], Any], work: Work, facts: dict[str, Any]) -> None:
        self.model, self._start, self._work, self._facts = model, start, work, facts
        self._settings, self._folder = work.settings, work.folder / FOLDER
        self.ruler = Ruler(model)
        self.tables = {batch: self._table(batch) for batch in work.settings.latency.batches}
        self.by_time = {batch: Ruler(model, table.milliseconds) for batch, table in self.tables.items()}
        self.top1: dict[int, float] = {}  # by the numbers of tokens in ``grid``, once measured
        self._made: dict[Cell, Method] = {}

    def say(self, text: str) -> None:
        if self._work.show_progress:
            print(text, flush=True)

    @property
    def grid(self) -> range:
        """Numbers of tokens that the staircase rule chooses from."""
        return range(self.ruler.num_tokens, self.ruler.prefix, -self._settings.latency.grid_step)

    def cells(self) -> Iterator[Cell]:
        """All of them, the most telling first."""
        own = self._settings.latency
        yield Cell("whole", 1, None)
        for share in self._settings.shares:
            yield Cell("flops", share, None)
            yield from (Cell("time", share, batch) for batch in own.batches)
        yield from (Cell("staircase", alpha, batch) for batch in own.batches for alpha in own.alphas)
        yield from (Cell("tome", share, None) for share in self._settings.shares)

    def of(self, cell: Cell) -> Method:
        if cell not in self._made:
            self._made[cell] = self._make(cell)
        return self._made[cell]

    def _make(self, cell: Cell) -> Method:
        flops = cell.setting * self.ruler.flops(None)
        if cell.rule == "whole":
            return keep_everything(self.model)
        if cell.rule == "tome":
            return tome_for_budget(self.model, flops)
        if cell.rule == "flops":
            return self._refined(cell, self.ruler, flops)
        assert cell.batch is not None
        if cell.rule == "time":
            ruler = self.by_time[cell.batch]
            return self._refined(cell, ruler, ruler.cost(self.of(Cell("flops", cell.setting, None))))
        tokens = tokens_of_most_use(self.tables[cell.batch], self.top1, cell.setting)
        return OneMoreToken(tokens, self.ruler.patches, self.ruler.prefix)

    def _refined(self, cell: Cell, ruler: Ruler, budget: float) -> Method:
        facts = {**self._facts, "budget": budget}
        found = Refinement(
            self.model,
            self._start(),
            ruler,
            budget,
            starts_for(self.model, MODEL, ruler, budget),
            RefineSettings(self._settings.latency.candidates),
            state=self._folder / "refined" / f"{cell.name}-{key_of(facts)}.json",
            facts=facts,
            note=lambda step, text: self.say(f"{cell.name}, candidate {step}: {text}"),
        ).run(self._work.stop)
        if not found.complete:
            raise _Stopped
        return found.method

    def _table(self, batch: int) -> LatencyTable:
        own = self._settings.latency
        path = self._folder / "tables" / f"{batch}-{key_of(self._facts)}.json"
        return find_latency_table(
            self.model,
            path,
            batch_size=batch,
            spacing=own.spacing,
            rounds=own.rounds,
            report=self.say,
            stop=lambda: self._work.stop.wanted,
        )
