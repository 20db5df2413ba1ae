"""What training asks of the forward passes of a learned method: each one's passage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tokcomp.methods.learned import Passage

_WATCHED: ContextVar[list[Passage] | None] = ContextVar("tokcomp passages", default=None)


@contextmanager
def watched_passages() -> Iterator[list[Passage]]:
    """Collect the passages of this thread's forward passes, in order."""
    found: list[Passage] = []
    token = _WATCHED.set(found)
    try:
        yield found
    finally:
        _WATCHED.reset(token)


def note_passage(passage: Passage) -> None:
    """Called with each passage at the end of its forward pass."""
    found = _WATCHED.get()
    if found is not None:
        found.append(passage)
