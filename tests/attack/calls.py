"""Calls of operators that nobody chose: ordinary ones, values out of any range, and wrong arguments."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import torch

from tokcomp_kernels import testing
from tokcomp_kernels._sample_maker import Maker
from tokcomp_kernels._schema import OPERATORS
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.reference import REFERENCES
from tokcomp_kernels.testing import Sample, samples

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = [operator.name for operator in OPERATORS]
ODD = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, 1e30, -1e30, 65504.0, 1e-8)


def draw(rng: random.Random) -> Sample:
    """A call of any operator, of any token count, dtype and layout, with values of its own."""
    seed, count = rng.random(), rng.randint(1, 150)
    with (
        patch.object(testing, "TOKEN_COUNTS", (count,)),
        patch.object(testing, "Maker", lambda name, *rest: Maker(f"{seed} {name}", *rest)),
    ):
        return rng.choice(list(samples(rng.choice(NAMES), rng.choice(DTYPES))))


def run(sample: Sample) -> tuple[Any, ...]:
    outputs = getattr(torch.ops.tokcomp, sample.op)(*sample.args, **sample.kwargs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def spoilt(rng: random.Random, sample: Sample) -> Sample:
    """The call with odd values in a few places of its arguments."""

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        for _ in range(rng.randint(0, 6) if tensor.numel() else 0):
            place = tuple(rng.randrange(size) for size in tensor.shape)
            tensor[place] = rng.choice(ODD)
        return tensor

    return sample.map(spoil)


def ordinary(rng: random.Random) -> None:
    """What comes agrees with the reference."""
    sample = draw(rng)
    assert_right(sample, run(sample))


def out_of_any_range(rng: random.Random) -> None:
    """What is an index is one, and two runs agree to the bit."""
    sample = draw(rng)
    odd = spoilt(rng, sample)
    outputs, again = run(odd), run(odd)
    plain = run(sample)
    tensors = [one for one in (*sample.args, *plain) if isinstance(one, torch.Tensor) and one.dim() > 1]
    tokens = max(one.shape[1] for one in tensors)
    for have, twice, usual in zip(outputs, again, plain, strict=True):
        assert have.shape == usual.shape and have.dtype == usual.dtype, sample
        assert torch.equal(have.isnan(), twice.isnan()) and torch.equal(have.nan_to_num(), twice.nan_to_num())
        if not have.is_floating_point() and have.numel():
            assert int(have.min()) >= -1 and int(have.max()) < max(usual.shape[-1], tokens) + 6


def _wrong(rng: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return rng.choice(
            [
                lambda: value[..., :-1],
                lambda: value.unsqueeze(0),
                lambda: value[0] if value.dim() and value.shape[0] else value.long(),
                lambda: value.to(rng.choice([torch.int64, torch.bool, torch.float16, torch.complex64])),
                lambda: value[:0],
                lambda: None,
                lambda: torch.cat([value, value]),
            ]
        )()
    if isinstance(value, bool) or value is None:
        return value
    return rng.choice([-1, 0, 1, 3, 2**31, -(2**62)]) if isinstance(value, int) else rng.choice([-1.0, 0.0, *ODD])


def wrong(rng: random.Random) -> str:
    """One argument of a right call changed: refused in the reference's own words, or answered as it answers."""

    def answer(function: Any, sample: Sample) -> Any:
        try:
            return function(*sample.args, **sample.kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    sample = draw(rng)
    args, kwargs = list(sample.args), dict(sample.kwargs)
    place: Any = rng.choice([*range(len(args)), *kwargs])
    holder: Any = args if isinstance(place, int) else kwargs
    holder[place] = _wrong(rng, holder[place])
    changed = Sample(sample.op, sample.id, tuple(args), kwargs)
    have, want = (answer(f, changed) for f in (getattr(torch.ops.tokcomp, sample.op), REFERENCES[sample.op]))
    if isinstance(have, str) and have.startswith("RuntimeError: tokcomp::"):
        return "refused by the schema"
    assert isinstance(have, str) == isinstance(want, str), f"{sample.op}, {place}: {have} where reference: {want}"
    if isinstance(want, str) and not want.startswith("RuntimeError"):
        rule = want.split(", got ")[0]  # what arrived is spelled as C++ and Python spell numbers and types
        assert rule in have, f"{sample.op}, {place}: {have}, not {want}"
    return "refused" if isinstance(have, str) else "answered"
