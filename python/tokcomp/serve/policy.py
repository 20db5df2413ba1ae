"""Choosing the degree of compression for the next batch by the number of waiting requests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol


class Policy(Protocol):
    """Chooses a degree before each batch. One server uses it, from one thread."""

    @property
    def name(self) -> str:
        """For reports."""
        ...

    @property
    def degrees(self) -> Sequence[int]:
        """All that it may choose; it starts at the first."""
        ...

    def choose(self, waiting: int) -> int:
        """The degree of the next batch; ``waiting`` counts the requests in the queue, the batch's own included."""
        ...


class Fixed:
    """The same degree however many requests wait."""

    def __init__(self, degree: int) -> None:
        self.name, self.degrees = f"fixed {degree}", (degree,)

    def choose(self, waiting: int) -> int:
        return self.degrees[0]


class QueueLength:
    """A higher degree as the queue grows, with hysteresis so that it does not flutter.

    It moves from the i-th degree to the next when at least ``up[i]`` requests wait, and back when at most ``down[i]``
    do, several steps at once if the queue calls for it.

    Args:
        degrees: two or more, rising.
        up: one number fewer than degrees, rising.
        down: as many as ``up``, rising, each below its ``up``.

    Raises:
        ValueError: any of these rules is broken.
    """

    def __init__(self, degrees: Sequence[int], up: Sequence[int], down: Sequence[int]) -> None:
        self.degrees, self.up, self.down = _rising("degrees", degrees), _rising("up", up), _rising("down", down)
        if len(self.degrees) < 2:
            raise ValueError(f"degrees must be two or more to choose from, got {list(degrees)}")
        steps = len(self.degrees) - 1
        for name, found in (("up", self.up), ("down", self.down)):
            if len(found) != steps:
                raise ValueError(f"{name} must have one number per step between degrees, {steps}, got {len(found)}")
        for low, high in zip(self.down, self.up, strict=True):
            if low >= high:
                raise ValueError(f"down must be below up at each step, got {low} and {high}")
        if self.down[0] < 1:
            raise ValueError(f"down must be 1 or more, since a batch's own requests count, got {self.down[0]}")
        self.name = "adaptive"
        self._level = 0

    @classmethod
    def by_batches(cls, degrees: Sequence[int], max_batch: int) -> QueueLength:
        """Thresholds that suit a server of ``max_batch``: 2, 3, 4 ... full batches for the steps up, 1/2, 1, 3/2 ...
        for the steps back."""
        numbers = range(1, len(degrees))
        up = [(number + 1) * max_batch for number in numbers]
        return cls(degrees, up, [max(number, number * max_batch // 2) for number in numbers])

    def choose(self, waiting: int) -> int:
        while self._level < len(self.up) and waiting >= self.up[self._level]:
            self._level += 1
        while self._level > 0 and waiting <= self.down[self._level - 1]:
            self._level -= 1
        return self.degrees[self._level]


def _rising(name: str, values: Sequence[int]) -> tuple[int, ...]:
    found = tuple(values)
    if any(first >= second for first, second in pairwise(found)):
        raise ValueError(f"{name} must rise, got {list(found)}")
    return found
