"""Shapes and counts that nobody wrote down: the merging operators on cases that hypothesis finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import Sample

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, pytest.importorskip("hypothesis.strategies")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
#: The same cases every time: an error bound made of random draws may not decide whether a change lands.
steady = hypothesis.settings(derandomize=True, deadline=None, max_examples=120)


@st.composite
def tokens(draw: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int, torch.Generator]:
    """x [B, N, C], importance [B, N] with ties, size or None, num_prefix_tokens, and the generator they came from."""
    batch, num_tokens, channels = draw(st.integers(0, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    prefix = draw(st.integers(0, min(num_tokens, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, num_tokens, channels, generator=generator).to(draw(DTYPES)).to(DEVICE)
    levels = draw(st.sampled_from([2, 7, 10**6]))
    importance = torch.randint(0, levels, (batch, num_tokens), generator=generator).float().to(DEVICE)
    size = (torch.rand(batch, num_tokens, generator=generator) * 8 + 0.5).to(DEVICE) if draw(st.booleans()) else None
    return x, importance, size, prefix, generator


@pytest.mark.slow
@steady
@given(tokens(), st.data())
def test_prune_merge(case: Any, data: Any) -> None:
    x, importance, size, prefix, _ = case
    num_prune_kept = data.draw(st.integers(prefix, x.shape[1] + 2))
    num_merge_kept = data.draw(st.integers(prefix + 1, x.shape[1] + 3))
    kwargs = {"num_prefix_tokens": prefix, "size": size, "similarity_weighted_size": data.draw(st.booleans())}
    sample = Sample("prune_merge", f"{list(x.shape)}", (x, importance, num_prune_kept, num_merge_kept), kwargs)
    assert_right(sample, torch.ops.tokcomp.prune_merge(*sample.args, **kwargs))


@pytest.mark.slow
@steady
@given(tokens(), st.data())
def test_masked_merge(case: Any, data: Any) -> None:
    x, importance, size, prefix, generator = case
    token_mask = (
        torch.rand(x.shape[:2], generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    ).float()
    counts = torch.tensor([data.draw(st.integers(-2, x.shape[1] + 2)) for _ in range(2)])
    kwargs = {
        "num_prefix_tokens": prefix,
        "size": size,
        "similarity_weighted_size": data.draw(st.booleans()),
        "min_weighted_size": data.draw(st.sampled_from([None, 1.0, -0.25])),
    }
    args = (x, importance, token_mask.to(DEVICE), counts.to(DEVICE))
    sample = Sample("masked_merge", f"{list(x.shape)}", args, kwargs)
    assert_right(sample, torch.ops.tokcomp.masked_merge(*args, **kwargs))


@pytest.mark.slow
@steady
@given(tokens(), st.data())
def test_tome_merge(case: Any, data: Any) -> None:
    x, _, size, prefix, generator = case
    metric = torch.randn(*x.shape[:2], data.draw(st.integers(1, 20)), generator=generator).to(x.dtype).to(DEVICE)
    kwargs = {"num_prefix_tokens": prefix, "size": size}
    sample = Sample("tome_merge", f"{list(x.shape)}", (x, metric, data.draw(st.integers(0, x.shape[1]))), kwargs)
    assert_right(sample, torch.ops.tokcomp.tome_merge(*sample.args, **kwargs))


@pytest.mark.slow
@steady
@given(tokens(), st.data())
def test_unmerge_undoes_what_nothing_merged_into(case: Any, data: Any) -> None:
    """Pruning alone, undone with the input as the filling, gives the input back bit for bit."""
    x, importance, size, prefix, _ = case
    num_prune_kept = data.draw(st.integers(prefix, x.shape[1]))
    kept, _, source = torch.ops.tokcomp.prune_merge(
        x, importance, num_prune_kept, x.shape[1] + 1, size=size, num_prefix_tokens=prefix
    )
    assert torch.equal(torch.ops.tokcomp.unmerge(kept, source, pruned_fill=x), x)
