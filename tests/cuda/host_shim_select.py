"""select_diverse in CUDA C++ on CPU tensors, beyond the samples of ``host_shim_suite.py``, which this belongs to."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.host_shim_suite import DTYPES, check, layouts, rand, randn


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
