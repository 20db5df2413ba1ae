"""Operators on arguments that nobody chose, also under the sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.attack import calls
from tests.attack.parts import Part, alone
from tests.attack.sanitized import Sanitized


def test_ordinary_values() -> None:
    Part("operators", share=0.08, few=30).each(calls.ordinary)


def test_values_out_of_any_range() -> None:
    Part("values", share=0.05, few=30).each(calls.out_of_any_range)


def test_wrong_arguments() -> None:
    Part("arguments", share=0.05, few=60).each(calls.wrong)


@pytest.fixture
def under() -> Iterator[Callable[[str], Sanitized]]:
    """under("thread"): the operators in a process under that sanitizer, which has reported what it must."""
    begun: list[Sanitized] = []

    def begin(kinds: str) -> Sanitized:
        begun.append(Sanitized(kinds))
        begun[-1].check_probes()
        return begun[-1]

    yield begin
    for one in begun:
        one.end()


@alone
def test_memory(under: Callable[[str], Sanitized]) -> None:
    """No access outside of memory that is the operator's, and no undefined arithmetic."""
    process = under("address,undefined")
    Part("memory", share=0.08, few=30).each(lambda rng: process.call(rng.random()))


@alone
def test_races(under: Callable[[str], Sanitized]) -> None:
    """Two callers at once, on four threads each, and no number that two threads touch unordered."""
    process = under("thread")
    Part("races", share=0.07, few=30).each(lambda rng: process.call(rng.random()))
