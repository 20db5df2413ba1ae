"""bipartite_merge and select_diverse in CUDA C++ on CPU tensors, beyond the samples of ``host_shim_suite.py``, which
this belongs to."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.host_shim_suite import DTYPES, bits, check, layouts, rand, randn, roles, run


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
def test_select_diverse_of_equal_rows(rule: str) -> None:
    """Rows and columns of several tiles, slices of channels, scores in device memory; the lowest of equal rows wins."""
    kinds = torch.randint(0, 9, (2, 1030), generator=torch.Generator().manual_seed(0))
    check("select_diverse", torch.eye(9)[kinds[:1]], 12, exact=True, rule=rule)
    few = torch.eye(9)[kinds[:, :40]].repeat(1, 1, 16).half()
    for features in layouts(few):
        check("select_diverse", features, 40, exact=True, rule=rule, num_prefix_tokens=0)


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_select_diverse_of_wide_rows(dtype: torch.dtype, rule: str) -> None:
    relevance = rand(1, 53) + 0.2 if rule == "dpp" else None
    check("select_diverse", randn(1, 53, 300, dtype=dtype), 30, relevance=relevance, rule=rule, num_prefix_tokens=3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bipartite_merge_of_wide_rows(dtype: torch.dtype) -> None:
    """Slices of channels, several pieces of a row for each lane, in every layout; a metric of another type."""
    role, size = roles(2, 45), rand(2, 45) * 3
    rows, features = layouts(randn(2, 45, 270, dtype=dtype)), layouts(randn(2, 45, 150, dtype=dtype))
    for x, metric, average in zip(rows, features, ("size", "mean", "sum", "size"), strict=True):
        check("bipartite_merge", x, metric, role, 9, size=size, average=average)
    check("bipartite_merge", randn(2, 45, 7, dtype=dtype), randn(2, 45, 40), role, 9)


def test_bipartite_merge_of_many_tokens() -> None:
    """Several tiles of tokens to list, of destinations to compare and of sources to rank; the lowest of equals wins."""
    role = torch.where(torch.arange(1400) % 4 < 3, 1, 2)[None]
    metric = torch.eye(9)[torch.randint(0, 9, (1, 1400), generator=torch.Generator().manual_seed(0))]
    expected = check("bipartite_merge", randn(1, 1400, 3), metric, role, 1030, exact=True)
    for have, want in zip(
        run("bipartite_merge", randn(1, 1400, 3), metric.double(), role, 1030), expected, strict=True
    ):
        assert torch.equal(bits(have), bits(want))


def test_bipartite_merge_where_nothing_is_there() -> None:
    """No channels, no width to compare, one token; one image without a source."""
    role = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 2, 2, 2]])
    _, size_out, source = run("bipartite_merge", torch.empty(2, 5, 0), torch.empty(2, 5, 0), role, 2)
    assert torch.equal(source, torch.tensor([[0, 1, 1, 1, 2], [0, 1, 2, -1, -1]]))
    assert torch.equal(size_out, torch.tensor([[1.0, 3, 1], [1, 1, 1]]))
    x = randn(1, 1, 3)
    assert torch.equal(run("bipartite_merge", x, x, torch.ones(1, 1, dtype=torch.int64), 0)[0], x)
