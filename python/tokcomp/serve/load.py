"""Requests that arrive at random, at a rate that rises and falls, and their sender."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from tokcomp.runs.steps import ARRIVALS, SAMPLE, derived_seed
from tokcomp.serve.server import Answer, Server

#: Longest sleep of the sender in seconds, so that it notices when the server has failed.
_NAP = 0.05


@dataclass(frozen=True)
class Profile:
    """A rate over time, linear between its points.

    Attributes:
        points: (seconds from the start, requests per second), in order of time, the first at 0.

    Raises:
        ValueError: there are fewer than two points, they are out of order, or a rate is below 0.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        times = [moment for moment, _ in self.points]
        if len(times) < 2 or times[0] != 0 or any(a >= b for a, b in pairwise(times)):
            raise ValueError(f"points must be two or more, the first at 0 seconds, in order of time, got {times}")
        if min(rate for _, rate in self.points) < 0:
            raise ValueError(f"rates must be 0 or more, got {[rate for _, rate in self.points]}")

    @classmethod
    def hill(cls, seconds: float, base: float, peak: float) -> Profile:
        """From ``base`` up to ``peak``, a while there, and down again: rates in requests per second."""
        shape = ((0.0, base), (0.1, base), (0.35, peak), (0.6, peak), (0.85, base), (1.0, base))
        return cls(tuple((part * seconds, rate) for part, rate in shape))

    @property
    def seconds(self) -> float:
        return self.points[-1][0]

    def rate(self, moment: float) -> float:
        """Requests per second at a moment."""
        times, rates = zip(*self.points, strict=True)
        return float(np.interp(moment, np.array(times), np.array(rates)))

    def expected(self) -> float:
        """The expected number of requests."""
        return sum((b - a) * (low + high) / 2 for (a, low), (b, high) in pairwise(self.points))

    def arrivals(self, seed: int) -> np.ndarray:
        """Arrival times in seconds, ascending: a Poisson process of this rate, drawn with ``seed``."""
        draw = np.random.default_rng(derived_seed(seed, ARRIVALS))
        # A Poisson process of rate 1, each point mapped to the time at which the integral of the rate reaches it.
        total = self.expected()
        count = int(total + 10 * total**0.5 + 20)
        marks = np.cumsum(draw.exponential(size=count))
        found, passed = [], 0.0
        for (start, low), (end, high) in pairwise(self.points):
            area = (end - start) * (low + high) / 2
            wanted = marks[(marks >= passed) & (marks < passed + area)] - passed
            slope = (high - low) / (end - start)
            # low t + slope t^2 / 2 = wanted, in the form that is exact for slope 0 too.
            found.append(start + 2 * wanted / (low + np.sqrt(np.maximum(low * low + 2 * slope * wanted, 0.0))))
            passed += area
        return np.concatenate(found)


def choose_images(num_images: int, count: int, seed: int) -> np.ndarray:
    """Which image each request sends: ``count`` numbers below ``num_images``."""
    return np.random.default_rng(derived_seed(seed, SAMPLE)).integers(num_images, size=count)


def send(
    server: Server,
    images: Tensor,
    arrivals: Sequence[float] | np.ndarray,
    chosen: Sequence[int] | np.ndarray,
    *,
    on_progress: Callable[[int, float], None] | None = None,
) -> tuple[float, list[Answer]]:
    """Send requests when they are due and wait for all answers.

    The load is open: the next request is sent without waiting for an answer, and a request that is sent late, because
    the sender was held up, still counts from the time it was due.

    Args:
        server: a started server.
        images: [n, 3, H, W].
        arrivals: seconds from now at which requests are due, rising.
        chosen: index of the image that each request sends.
        on_progress: called now and then with the requests sent and the seconds passed.

    Returns:
        When it started (``time.perf_counter``), and the answers in the order of the requests.

    Raises:
        RuntimeError: the server failed while requests were being sent; its error is the cause.
        Exception: it failed on one of them after the last was sent.
    """
    start = time.perf_counter()
    pending: list[Future[Answer]] = []
    for due, index in zip(arrivals, chosen, strict=True):
        moment = start + float(due)
        while (ahead := moment - time.perf_counter()) > 0:
            if on_progress is not None:
                on_progress(len(pending), time.perf_counter() - start)
            server.check()
            time.sleep(min(ahead, _NAP))
        pending.append(server.submit(images[int(index)], arrival=moment))
    answers = []
    for future in pending:
        answers.append(future.result())
        if on_progress is not None and len(answers) % 64 == 0:
            on_progress(len(pending), time.perf_counter() - start)
    return start, answers


def capacity(server: Server, images: Tensor, *, seconds: float = 0.5) -> float:
    """Images per second that a started server answers while its queue never runs dry: the median over bursts of 8 full
    batches, as many as fit into ``seconds``, but at least three."""
    count = 8 * server.max_batch
    rates: list[float] = []
    begun = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        pending = [server.submit(images[number % len(images)]) for number in range(count)]
        for future in pending:
            future.result()
        rates.append(count / (time.perf_counter() - start))
    return float(np.median(rates))
