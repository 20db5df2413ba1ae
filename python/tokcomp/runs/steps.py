"""What every step needs: seeding, stop requests, a progress line."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

#: Purposes of seeds: one of the numbers that a seed is derived from, so that different uses draw different numbers.
ORDER, SAMPLE, MIXING, MODEL, SPLIT, DEGREES, ARRIVALS = range(1, 8)


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed derived from whole numbers (seed, step, rank, ...); different numbers give different seeds."""
    # SeedSequence treats (0,) and (0, 0) as equal, so the count comes first.
    words = np.random.SeedSequence([len(numbers), *(number % 2**64 for number in numbers)]).generate_state(2)
    return (int(words[0]) << 31 | int(words[1]) >> 1) & 0x7FFF_FFFF_FFFF_FFFF


def seed_all(*numbers: int) -> None:
    """Seed the generators of torch (GPUs too), numpy and random by :func:`derived_seed`."""
    seed = derived_seed(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    random.seed(seed)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the CPU's generators by :func:`derived_seed`, and restore them at the end."""
    with kept_generators():
        seed = derived_seed(*numbers)
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFF_FFFF)
        random.seed(seed)
        yield


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the CPU's generators of torch, numpy and random at the end."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class DivergedError(ArithmeticError):
    """A loss, a gradient or the weights are no longer finite numbers. None of them was kept."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class StopRequest:
    """Notes SIGINT (Ctrl-C) and SIGTERM while it is open, so that a run can end after its current step.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python receives no signals, it notes none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def wanted(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it; 0 if no signal came."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


class Progress:
    """A progress line on a terminal; elsewhere, one line of text at each :meth:`note` and nothing in between.

    Args:
        total: steps of the whole run.
        start: steps done before, when resumed.
        label: text that comes first.
        show: False for a process that prints nothing.
    """

    def __init__(self, total: int, start: int = 0, *, label: str = "", show: bool = True) -> None:
        from tqdm import tqdm

        self._total, self._label, self._show = total, label, show
        off = not show or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc=label or None, unit=" steps", disable=off, file=sys.stderr)

    def advance(self) -> None:
        self._bar.update()

    def status(self, text: str) -> None:
        """Set the text beside the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def note(self, step: int, text: str) -> None:
        """Print a line that stays."""
        if not self._show:
            return
        line = f"{self._label + ' ' if self._label else ''}step {step}/{self._total}: {text}"
        if self._bar.disable:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
