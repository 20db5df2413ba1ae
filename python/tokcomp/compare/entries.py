"""The rows of a comparison: which method each is, and what it is made from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokcomp.equal_cost import BY_COUNT, BY_IMAGES, BY_PREDICTOR, BY_RATE
from tokcomp.methods.diffrate import METRICS, PIPELINES

#: Methods by the names that users give; what each does is in the help of ``tokcomp compare``.
NAMES = ("diffrate", "search", "refine", "published", *BY_COUNT, *BY_RATE, *BY_IMAGES, *BY_PREDICTOR, "uniform")
#: Those that depend on a search, and so on its seed.
SEARCHED = ("diffrate", "search", "refine")


@dataclass(frozen=True)
class Variant:
    """What differs from search to search: Table 4's columns, and the seed.

    Args:
        metric, pipeline: as for :class:`tokcomp.DiffRate`; None: what suits the model.
        images: images to search on; None: all.
        epochs: passes over the training images; None: what the search's other settings say.
        seed: of everything random in the search.
        match_inference: as for :class:`tokcomp.DiffRateSearch`; None: what the search's other settings say.
    """

    metric: str | None = None
    pipeline: str | None = None
    images: int | None = 1000
    epochs: float | None = None
    seed: int = 0
    match_inference: bool | None = None


@dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Args:
        name: as shown, and unique in a comparison.
        kind: one of :data:`NAMES`, "none", "random" or "file".
        variant: of the search, where the kind depends on one.
        pipeline: instead of the method itself, DiffRate with its counts under this pipeline.
        number: which random schedule.
        file: a schedule's file or another comparison's folder, for kind "file".
        only: the budgets at which it is compared, of a comparison's; empty: all.
    """

    name: str
    kind: str
    variant: Variant = field(default_factory=Variant)
    pipeline: str | None = None
    number: int = 0
    file: Path | None = None
    only: tuple[float, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Everything that the method follows from, besides model and budget, as JSON data."""
        facts = {**asdict(self), "file": None if self.file is None else str(self.file)}
        del facts["name"], facts["only"]
        if self.kind not in SEARCHED:
            facts.pop("variant")
        return facts


UNCOMPRESSED = Entry("uncompressed", "none")


def parse_methods(words: Sequence[str], variant: Variant) -> list[Entry]:
    """The entries that words such as ``tome``, ``random:30`` and ``tome/merge`` stand for, in order.

    Raises:
        ValueError: an unknown word; the message lists the known ones.
    """
    entries: list[Entry] = []
    for word in words:
        drawn = re.fullmatch(r"random:([1-9]\d*)", word)
        kind, _, pipeline = word.partition("/")
        if drawn:
            entries += [Entry(f"random {number}", "random", number=number) for number in range(1, int(drawn[1]) + 1)]
        elif word in NAMES or (
            kind in NAMES and kind not in (*BY_IMAGES, *BY_PREDICTOR) and pipeline in ("prune", "merge")
        ):
            entries.append(Entry(word, kind, variant, pipeline or None))
        else:
            raise ValueError(
                f"must be {', '.join(NAMES)}, random:N, or counts under another pipeline such as tome/merge and "
                f"evit/prune; got {word!r}"
            )
    return _once(entries)


def with_seeds(entries: Sequence[Entry], seeds: int) -> list[Entry]:
    """Each searched entry once more for every seed after its own."""
    found = []
    for entry in entries:
        found.append(entry)
        if entry.kind in SEARCHED:
            first = entry.variant.seed
            found += [
                replace(entry, name=f"{entry.name}, seed {seed}", variant=replace(entry.variant, seed=seed))
                for seed in range(first + 1, first + seeds)
            ]
    return found


def sweep(
    variant: Variant,
    *,
    metrics: Sequence[str] = (),
    pipelines: Sequence[str] = (),
    images: Sequence[int] = (),
    epochs: Sequence[float] = (),
) -> list[Entry]:
    """Searches that differ from ``variant`` in one thing each: Table 4, a to d.

    Raises:
        ValueError: an unknown metric or pipeline.
    """
    for name, given, known in (("metrics", metrics, METRICS), ("pipelines", pipelines, PIPELINES)):
        odd = [one for one in given if one not in known]
        if odd:
            raise ValueError(f"{name} must be among {', '.join(known)}, got {odd[0]!r}")
    entries = [Entry(f"search, {one}", "search", replace(variant, metric=one)) for one in metrics]
    entries += [Entry(f"search, {one}", "search", replace(variant, pipeline=one)) for one in pipelines]
    entries += [Entry(f"search, {one} images", "search", replace(variant, images=one)) for one in images]
    entries += [Entry(f"search, {one:g} epochs", "search", replace(variant, epochs=one)) for one in epochs]
    return _once(entries)


def _once(entries: Sequence[Entry]) -> list[Entry]:
    return list({entry.name: entry for entry in entries}.values())
