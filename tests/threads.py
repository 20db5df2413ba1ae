"""Work that several threads do at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """What ``work`` returns for each item, or raises: in as many threads, none of which begins before all are there."""
    items = list(items)
    barrier = threading.Barrier(len(items))

    def begin(item: Any) -> Any:
        barrier.wait()
        return work(item)

    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(begin, items))
