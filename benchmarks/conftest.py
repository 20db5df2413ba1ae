"""`pytest benchmarks/ --benchmark-only`: the one fixture that may time, and where its figures go.

Competitors take turns in one process (tokcomp.measure.timing); pytest-benchmark is then shown the rounds of one of
them, so its own table, comparison and JSON work as usual. Every run adds a file to --results with all rows and
competitors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokcomp.bench.models import NotMeasured
from tokcomp.bench.report import format_columns
from tokcomp.measure.provenance import device_slug, find_device, provenance, save_record
from tokcomp.measure.timing import MIN_ROUNDS, TURN_SECONDS, Samples, device_rates, interleave, stopwatch

from benchmarks.whole_model import Choice, batches

NOT_MEASURED = "not measured"


class Playback:
    """A clock for pytest-benchmark that shows rounds which were measured already."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def show(self, benchmark: Any, seconds: tuple[float, ...]) -> None:
        rounds = iter(seconds)

        def advance() -> None:
            self.now += next(rounds)

        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


CLOCK = Playback()
RESULTS = pytest.StashKey["Results"]()


class Results:
    """Rows of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = find_device(config.getoption("--device"))
        self.rounds: int = config.getoption("--rounds")
        self.choice = Choice.of(config, self.device)
        folder = config.getoption("--results")
        self.folder = Path(folder) if folder else Path(__file__).parent / "results" / device_slug(self.device)
        self.rows: list[dict[str, Any]] = []
        self.not_measured: list[dict[str, Any]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.rates: dict[str, dict[str, float]] = {}
        self.path: Path | None = None
        self.provenance: dict[str, Any] | None = None
        self.command = re.sub(r" --results[ =]\S+", "", " ".join(["pytest", *config.invocation_params.args]))

    def rates_of(self, dtype: torch.dtype) -> dict[str, float]:
        """The device's matrix and copy rates in this run."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.rates:
            self.rates[name] = device_rates(self.device, dtype)
        return self.rates[name]

    def add(self, row: Mapping[str, Any], table: str, head: Sequence[str], cells: Sequence[str]) -> None:
        """Record a row, and show it as a line of the table of that name."""
        self.rows.append(dict(row))
        self.tables.setdefault(table, [list(head)]).append(list(cells))

    def add_not_measured(self, suite: str, model: str, missing: NotMeasured) -> None:
        """Record an entry that has no figure, and show why."""
        self.not_measured.append({"suite": suite, "model": model, **missing.to_json()})
        cells = [suite, model, str(missing.batch), missing.precision, missing.name, missing.reason]
        self.tables.setdefault(NOT_MEASURED, [["suite", "model", "batch", "precision", "entry", "why"]]).append(cells)

    def save(self) -> None:
        """Write what there is so far, so that a run cut short leaves its rows behind."""
        if self.provenance is None:
            self.provenance = provenance(self.device)
        record = {"provenance": self.provenance, "command": self.command, "rates": self.rates, "rows": self.rows}
        record["not_measured"] = self.not_measured
        self.path = save_record(self.folder, record, self.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tokcomp")
    group.addoption("--results", help="folder for this run's JSON (default: benchmarks/results/<device>)")
    group.addoption("--device", help="cpu or cuda (default: cuda where there is one)")
    group.addoption("--rounds", type=int, default=MIN_ROUNDS, help="turns of each competitor (default: %(default)s)")
    group.addoption(
        "--batches", metavar="N,N", help="images per batch of whole-model benchmarks, in place of each one's own"
    )
    group.addoption(
        "--compile",
        dest="compiled",
        action="store_const",
        const="all",
        help="time every competitor under torch.compile as well (default: timm alone)",
    )
    group.addoption("--no-compile", dest="compiled", action="store_const", const="none", help="time none compiled")
    group.addoption("--no-rivals", action="store_true", help="leave out runtimes other than PyTorch")
    group.addoption(
        "--published-code",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of your clone of a published repository (DiffRate, ToMe, ToCom), to run beside ours; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--rounds") < 1:
        raise pytest.UsageError(f"--rounds must be at least 1, got {config.getoption('--rounds')}")
    try:
        batches(config, ())
        config.stash[RESULTS] = Results(config)
    except ValueError as error:
        # find_device speaks of an argument, where the user knows an option.
        text = f"--{error}" if str(error).startswith("device") else str(error)
        raise pytest.UsageError(f"{text}; see 'pytest benchmarks --help'") from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    for title, lines in results.tables.items():
        terminalreporter.section(title)
        terminalreporter.write_line(format_columns(lines))
    for dtype, rates in results.rates.items():
        matrix, copy = rates["matrix_flops_per_s"] / 1e12, rates["copy_bytes_per_s"] / 1e9
        terminalreporter.write_line(
            f"measured in this run, {dtype}: matrices {matrix:.2f} TFLOP/s, copy {copy:.0f} GB/s"
        )
    if results.path:
        terminalreporter.write_line(f"saved {results.path}")


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    found = request.config.stash[RESULTS]
    known = len(found.rows) + len(found.not_measured)
    yield found
    if len(found.rows) + len(found.not_measured) > known:
        found.save()


@pytest.fixture
def device(results: Results) -> torch.device:
    return results.device


@pytest.fixture
def timed(benchmark: Any, results: Results) -> Callable[..., dict[str, Samples]]:
    """``timed(calls, gate=..., shown=...)`` -> the rounds of each competitor.

    ``gate()`` runs first and raises unless what is to be timed is right; ``shown`` names the competitor whose rounds
    pytest-benchmark lists, the first where that one is not there. With --benchmark-disable only the gate and one call
    of each run, and the answer is empty.
    """

    def run(
        calls: Mapping[str, Callable[[], Any]],
        *,
        gate: Callable[[], Any] = lambda: None,
        shown: str,
        turn_seconds: float = TURN_SECONDS,
    ) -> dict[str, Samples]:
        gate()
        if not calls:
            pytest.skip("no competitor runs here; the reasons are recorded")
        if benchmark.disabled:
            benchmark.pedantic(lambda: [call() for call in calls.values()])
            return {}
        samples = interleave(calls, stopwatch(results.device), rounds=results.rounds, turn_seconds=turn_seconds)
        CLOCK.show(benchmark, samples[shown if shown in samples else next(iter(samples))].seconds)
        benchmark.extra_info.update({name: list(one.seconds) for name, one in samples.items()})
        return samples

    return run
