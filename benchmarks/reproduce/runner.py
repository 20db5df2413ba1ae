"""Runs units of work once each, in as many processes as asked, and remembers what they gave.

A unit's result is a JSON file, written whole; a unit whose file is there, made with the same settings, is not run
again. So a run that was stopped, by Ctrl-C or by anything else, goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tokcomp.files import write_whole


@dataclass(frozen=True)
class Unit:
    """A function of a module, its JSON arguments, and the units whose results must be there first.

    The function is called as ``function(folder, **arguments)`` and returns JSON data. ``weight`` is its rough duration
    in seconds, above 0, for the time left.
    """

    name: str
    function: str  # "module:name"
    arguments: Mapping[str, Any]
    needs: Sequence[str] = ()
    weight: float = 1.0


@dataclass
class Progress:
    """Which units are done, and how long the others will take."""

    units: Sequence[Unit]
    report: Callable[[str], None]
    started: float = field(default_factory=time.perf_counter)
    expected: float = 0.0  # seconds of the units run, as their weights said
    done: int = 0

    def skip(self) -> None:
        self.done += 1

    def finish(self, unit: Unit, left: float) -> None:
        """One more is done, and ``left`` seconds of others remain, as their weights say."""
        self.done += 1
        self.expected += unit.weight
        elapsed = time.perf_counter() - self.started
        # What is running has had some of its time: that makes the guess a little high, and never low.
        seconds = elapsed * left / self.expected
        self.report(f"[{self.done:3d}/{len(self.units)}] {elapsed:5.0f} s, {seconds:5.0f} s left  {unit.name}")


def result_path(folder: Path, name: str) -> Path:
    return folder / "units" / f"{name}.json"


def load_result(folder: Path, name: str) -> Any:
    """What the unit of that name gave."""
    return json.loads(result_path(folder, name).read_text())["result"]


def keys_of(units: Sequence[Unit]) -> dict[str, str]:
    """A digest per unit of all that its result follows from: its own arguments, and those of what it needs."""
    by_name = {unit.name: unit for unit in units}
    keys: dict[str, str] = {}

    def key(name: str) -> str:
        if name not in keys:
            unit = by_name[name]
            facts = [unit.function, dict(unit.arguments), [key(need) for need in unit.needs]]
            keys[name] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return keys[name]

    for unit in units:
        key(unit.name)
    return keys


def is_done(folder: Path, name: str, key: str) -> bool:
    try:
        return json.loads(result_path(folder, name).read_text())["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def run_unit(folder: Path, unit: Unit, key: str) -> None:
    """Run one unit and store its result: what a worker process does.

    The seconds beside the result are those of its core, which mean the same on a machine with other work.
    """
    torch.set_num_threads(1)
    started = time.process_time()
    module, name = unit.function.split(":")
    result = getattr(importlib.import_module(module), name)(folder, **unit.arguments)
    seconds = time.process_time() - started
    record = {"key": key, "core_seconds": round(seconds, 3), "arguments": dict(unit.arguments), "result": result}
    write_whole(result_path(folder, unit.name), json.dumps(record, indent=1) + "\n")


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def run_units(folder: Path, units: Sequence[Unit], jobs: int, report: Callable[[str], None]) -> None:
    """Run every unit that is not done, each after what it needs, ``jobs`` at a time.

    Raises:
        KeyboardInterrupt: after the units in hand were stopped; those finished are kept.
    """
    keys = keys_of(units)
    progress = Progress(units, report)
    waiting = {}
    for unit in units:
        if is_done(folder, unit.name, keys[unit.name]):
            progress.skip()
        else:
            waiting[unit.name] = unit
    if progress.done:
        report(f"{progress.done} of {len(units)} units are there already")
    if not waiting:
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _leave_interrupts_to_the_parent)
    running: dict[Future[None], Unit] = {}
    try:
        while waiting or running:
            names = set(waiting) | {unit.name for unit in running.values()}
            ready = [unit for unit in waiting.values() if not names.intersection(unit.needs)]
            # No more in the pool than it can run, so that the order of the list decides and a stop is quick.
            for unit in ready[: jobs - len(running)]:
                running[pool.submit(run_unit, folder, unit, keys[unit.name])] = waiting.pop(unit.name)
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                unit = running.pop(future)
                future.result()
                progress.finish(unit, sum(one.weight for one in [*waiting.values(), *running.values()]))
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
