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
        difference = None
        if pair.differs is not None:
            difference = max(_difference(pair, case) for case in cases)
            if not difference <= TOLERANCE:
                raise PublishedCodeError(f"the answers differ by {difference:.2g} of the largest")
        calls = {"published": lambda: pair.published(*cases[0]), "ours": lambda: pair.ours(*cases[0])}
        found = interleave(calls, stopwatch(torch.device("cpu")), rounds=rounds)
    return {
        "what": pair.what,
        "batch": batch,
        "gflops": pair.gflops,
        "difference": difference,
        "published": batch / found["published"].median,
        "ours": batch / found["ours"].median,
        "speedup": found["ours"].speedup_over(found["published"]),
    }


def _difference(pair: Pair, case: tuple[Tensor, ...]) -> float:
    assert pair.differs is not None
    try:
        if pair.alone:
            singles = [pair.published(*(one[i : i + 1] for one in case)) for i in range(len(case[0]))]
            theirs = torch.cat(singles)
        else:
            theirs = pair.published(*case)
    except Exception as error:
        raise PublishedCodeError(f"the published code fails here: {type(error).__name__}: {error}") from error
    return pair.differs(theirs, pair.ours(*case))
