"""A published method and ours side by side: first that both answer alike, then how fast each is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokcomp.bench.published_code import PublishedCodeError
from tokcomp.measure.timing import interleave, stopwatch
from torch import Tensor

#: How far numbers may differ, as a share of the largest: float32 sums in another order through twelve blocks.
TOLERANCE = 1e-3
#: Share of the images that must be answered alike: a sum in another order can tip a choice between two tokens, and the
#: image is another one from there on.
ALIKE = 0.9
#: Random inputs on which both must answer alike; the first is timed.
CASES = 3


def images(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """[batch, 3, 224, 224]."""
    return (torch.randn(batch, 3, 224, 224, generator=generator),)


def farthest(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number."""
    return float((theirs - ours).abs().max() / theirs.abs().max())


@dataclass(frozen=True)
class Pair:
    """The published code and ours, with the same weights.

    Args:
        what: is computed: the model, or the step and its sizes.
        published, ours: the same arguments to answers.
        gflops: of ours; None for a step of a model.
        inputs: batch size and generator to the arguments.
        differs: how far two answers are apart, as a share; None: they are drawn at random.
        alone: whether the published code is asked image by image for what it answers, as an answer of its own depends
            on what else is in the batch.
        batches: sizes that the published code takes; None: all.
    """

    what: str
    published: Callable[..., Any]
    ours: Callable[..., Any]
    gflops: float | None = None
    inputs: Callable[[int, torch.Generator], tuple[Tensor, ...]] = images
    differs: Callable[[Any, Any], float] | None = farthest
    alone: bool = False
    batches: tuple[int, ...] | None = None


def measured(pair: Pair, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of both, and how many times faster ours is: the median of the rounds, the least and the most.

    Raises:
        PublishedCodeError: they do not answer alike where they should, or the published code fails.
    """
    cases = [pair.inputs(batch, torch.Generator().manual_seed(seed)) for seed in range(CASES)]
    with torch.inference_mode():
        found = [] if pair.differs is None else [one for case in cases for one in _differences(pair, case)]
        alike = [one for one in found if one <= TOLERANCE]
        if len(alike) < ALIKE * len(found):
            others = f"in {len(found) - len(alike)} of {len(found)}"
            raise PublishedCodeError(f"the answers differ by {max(found):.2g} of the largest {others}")
        calls = {"published": lambda: pair.published(*cases[0]), "ours": lambda: pair.ours(*cases[0])}
        times = interleave(calls, stopwatch(torch.device("cpu")), rounds=rounds)
    return {
        "what": pair.what,
        "batch": batch,
        "gflops": pair.gflops,
        "difference": max(alike, default=None),
        "alike": [len(alike), len(found)],
        "published": batch / times["published"].median,
        "ours": batch / times["ours"].median,
        "speedup": times["ours"].speedup_over(times["published"]),
    }


def _differences(pair: Pair, case: tuple[Tensor, ...]) -> list[float]:
    """Of each image; of all together where an answer is more than a tensor."""
    assert pair.differs is not None
    try:
        if pair.alone:
            singles = [pair.published(*(one[i : i + 1] for one in case)) for i in range(len(case[0]))]
            theirs = torch.cat(singles)
        else:
            theirs = pair.published(*case)
    except Exception as error:
        raise PublishedCodeError(f"the published code fails here: {type(error).__name__}: {error}") from error
    ours = pair.ours(*case)
    if isinstance(theirs, Tensor) and isinstance(ours, Tensor):
        return [pair.differs(*both) for both in zip(theirs.split(1), ours.split(1), strict=True)]
    return [pair.differs(theirs, ours)]
