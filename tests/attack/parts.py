"""What is attacked, for how long, and what came of it.

In the suite each part makes a few tries, of the same seeds every time. ``make attack MINUTES=10`` sets
TOKCOMP_ATTACK_MINUTES: each part then tries what failed before, and new seeds until its share of the time is over.
TOKCOMP_ATTACK_SEED repeats one try. Figures and failed seeds go to TOKCOMP_ATTACK_OUT.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

MINUTES = float(os.environ.get("TOKCOMP_ATTACK_MINUTES", "0"))
OUT = Path(os.environ.get("TOKCOMP_ATTACK_OUT", "attack-output"))
SEED = os.environ.get("TOKCOMP_ATTACK_SEED")
_MOST_FAILURES = 20
#: Every part that has run in this process, for the table.
DONE: list[Part] = []
#: What takes longer than the suite may.
alone = pytest.mark.skipif(not MINUTES, reason="a part of make attack")


class Part:
    """One part of the attack.

    Args:
        name: of the part, in the table.
        share: of the minutes.
        few: tries in the suite, and the least that there are.
    """

    def __init__(self, name: str, *, share: float, few: int) -> None:
        self.name, self.share, self.few = name, share, few
        self.tried, self.seconds = 0, 0.0
        self.outcomes: Counter[str] = Counter()
        self.failed: list[dict[str, Any]] = []

    def each(self, check: Callable[[random.Random], str | None]) -> None:
        """Try until the time is over. ``check`` draws from its generator, fails by an exception, and may say what came.

        Raises:
            AssertionError: tries failed; it says which, and how to repeat one.
        """
        begun = time.monotonic()
        for seed in self._seeds(begun):
            self.tried += 1
            try:
                self.outcomes[check(random.Random(f"{self.name} {seed}")) or "as promised"] += 1
            except Exception as error:
                self.failed.append({"seed": seed, "error": f"{type(error).__name__}: {error}"[:600]})
                if len(self.failed) == _MOST_FAILURES:
                    break
        self.seconds = time.monotonic() - begun
        DONE.append(self)
        if MINUTES and SEED is None:
            self._keep_seeds()
        if self.failed:
            first = self.failed[0]
            raise AssertionError(
                f"{self.name}: {len(self.failed)} of {self.tried} tries failed, seeds "
                f"{[one['seed'] for one in self.failed]}; TOKCOMP_ATTACK_SEED={first['seed']} repeats the first: "
                f"{first['error']}"
            )

    def figures(self) -> dict[str, Any]:
        return {
            "tried": self.tried,
            "failed": len(self.failed),
            "outcomes": dict(sorted(self.outcomes.items())),
            "seconds": round(self.seconds, 1),
            "failures": self.failed,
        }

    def _seeds(self, begun: float) -> Iterator[int]:
        if SEED is not None:
            yield int(SEED)
            return
        if not MINUTES:
            yield from range(self.few)
            return
        yield from self._kept_seeds()
        end = begun + MINUTES * 60 * self.share
        new = random.SystemRandom()
        while self.tried < self.few or time.monotonic() < end:
            yield new.randrange(2**31)

    @property
    def _file(self) -> Path:
        return OUT / "seeds" / f"{self.name}.json"

    def _kept_seeds(self) -> list[int]:
        return json.loads(self._file.read_text()) if self._file.is_file() else []

    def _keep_seeds(self) -> None:
        """Those that failed now; what no longer fails is forgotten."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps([one["seed"] for one in self.failed]) + "\n")


def table() -> list[str]:
    """The figures as lines of text."""
    lines = [f"{'part':<12} {'tried':>8} {'failed':>7} {'seconds':>8}  what came of it"]
    for part in DONE:
        came = ", ".join(f"{count} {outcome}" for outcome, count in sorted(part.outcomes.items()))
        lines.append(f"{part.name:<12} {part.tried:>8} {len(part.failed):>7} {part.seconds:>8.1f}  {came}")
    return lines


def write_figures(path: Path) -> None:
    from tokcomp.files import write_whole
    from tokcomp.measure.provenance import provenance

    parts = {part.name: part.figures() for part in DONE}
    write_whole(
        path, json.dumps({"minutes": MINUTES, "on": provenance(torch.device("cpu")), "parts": parts}, indent=1) + "\n"
    )
