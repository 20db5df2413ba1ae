"""How prune_merge shares an image among a cluster's blocks, for every shape. ``host_shim_suite.py`` has the rest."""

from __future__ import annotations

import ctypes
import itertools
from collections import namedtuple

import pytest

from tests.cuda.host_shim_suite import DEVICES, SHIM

Plan = namedtuple("Plan", ("slices", "width", "lanes", "resident", "targets", "shared_bytes"))


def plan(width: int, num_tokens: int, prefix: int, alive: int, kept: int, bytes_each: int, device: str) -> Plan:
    fields = (ctypes.c_int64 * 6)()
    SHIM.shim_merge_plan(width, num_tokens, prefix, alive, kept, bytes_each, *DEVICES[device], fields)
    return Plan(*fields)


@pytest.mark.parametrize("bytes_each", [2, 4])
def test_merge_plans_fit_every_shape(bytes_each: int) -> None:
    """Slices cover the channels and none is empty; shared memory is within the device's; sums do not depend on it."""
    for width, num_tokens, (alive, kept) in itertools.product(
        (0, 1, 31, 33, 192, 200, 384, 768, 1000, 1280, 3000, 5000),
        (1, 2, 50, 197, 257, 577, 1025, 4097),
        ((1.0, 1.0), (1.0, 0.5), (0.9, 0.85), (0.5, 0.01)),
    ):
        counts = max(2, round(alive * num_tokens)), max(2, round(kept * num_tokens))
        shape = (width, num_tokens, 1, *(min(count, num_tokens) for count in counts), bytes_each)
        plans = {device: plan(*shape, device) for device in DEVICES}
        for device, have in plans.items():
            assert have.shared_bytes <= DEVICES[device][0], (shape, device, have)
            assert have.width * (have.slices - 1) < max(width, 1) <= have.width * have.slices, (shape, have)
            assert have.width % 32 == 0 and have.width <= have.lanes * 16 // bytes_each, (shape, have)
            assert have.lanes in (1, 2, 4, 8, 16, 32), (shape, have)
            assert not have.resident or have.slices == 1 or (device == "sm_90" and have.slices <= 8), (shape, have)
        assert plans["sm_80"][:3] == plans["sm_90"][:3], (shape, plans)


@pytest.mark.parametrize(
    ("width", "num_tokens", "alive", "kept", "slices"),
    [(192, 197, 196, 187, 2), (384, 197, 192, 180, 4), (768, 197, 192, 178, 8), (1024, 197, 195, 191, 8)],
)
def test_published_models_stay_in_shared_memory(
    width: int, num_tokens: int, alive: int, kept: int, slices: int
) -> None:
    """DeiT-T, S, B and ViT-L in half precision: a cluster holds an image, and a multiprocessor three of its blocks."""
    have = plan(width, num_tokens, 1, alive, kept, 2, "sm_90")
    assert have.resident and have.slices == slices and have.shared_bytes <= 75 * 1024, have
    assert plan(1280, 257, 1, 257, 252, 2, "sm_90").resident
    assert not plan(width, num_tokens, 1, alive, kept, 2, "sm_80").resident
