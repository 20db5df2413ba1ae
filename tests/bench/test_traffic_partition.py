"""The traffic model of bipartite_merge and select_diverse against the interpreted kernels, as test_traffic."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model import traffic_partition
from tests.bench.interpreted import counting
from tests.bench.test_traffic import check, random


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "sources", "destinations", "r", "has_size"),
    [
        (torch.float32, 90, 40, 30, 22, True),  # several blocks of sources; slots, tokens and channels in several
        (torch.float16, 150, 40, 90, 40, False),  # destinations in two tiles
    ],
)
def test_bipartite_merge(
    dtype: torch.dtype,
    num_tokens: int,
    sources: int,
    destinations: int,
    r: int,
    has_size: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokcomp_kernels.triton.bipartite_merge import bipartite_merge_triton

    batch, channels, width = 2, 140, 40
    role = torch.zeros(batch, num_tokens, dtype=torch.int64)
    role[:, :sources], role[:, sources : sources + destinations] = 1, 2
    role = role[:, torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))]
    x, metric = random(batch, num_tokens, channels, dtype=dtype), random(batch, num_tokens, width, dtype=dtype)
    size = random(batch, num_tokens).exp() if has_size else None
    with counting(monkeypatch) as launches:
        bipartite_merge_triton(x, metric, role, r, size=size)
    costs = traffic_partition.bipartite_merge(
        batch, num_tokens, sources, destinations, r, channels, width, x.element_size(), has_size=has_size
    )
    check(launches, costs)


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
def test_select_diverse(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.select_diverse import select_diverse_triton

    features = random(2, 70, 40)
    relevance = random(2, 70, seed=1).exp() if rule == "dpp" else None
    with counting(monkeypatch) as launches:
        select_diverse_triton(features, 22, relevance=relevance, num_prefix_tokens=3, rule=rule)
    check(launches, traffic_partition.select_diverse(2, 67, 19, 40, 4, rule=rule, num_prefix_tokens=3))
