"""The Triton kernels that move rows, unmerge and the gradients of merging, against sums in float64."""

import pytest
import torch

pytest.importorskip("triton")

from tests.triton.inputs import DEVICE, DTYPES, launched, normal, uniform
from tokcomp_kernels.triton.merge_backward import merge_backward_triton
from tokcomp_kernels.triton.unmerge import unmerge_backward_triton, unmerge_triton


def some_source(seed, batch, num_tokens, num_slots):
    """Slots 0 .. M - 1, pruned positions, and indices far outside."""
    source = torch.randint(-2, num_slots, (batch, num_tokens), generator=torch.Generator().manual_seed(seed))
    source[:, 1::17] = 2**40 + 1
    source[:, 2::19] = num_slots
    return source.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("num_tokens", "num_slots", "channels"), [(1, 1, 3), (40, 7, 16), (97, 50, 130), (300, 2, 8)])
def test_unmerge(num_tokens, num_slots, channels, dtype):
    x, fill = normal(0, 2, num_slots, channels, dtype=dtype), normal(1, 2, num_tokens, channels, dtype=dtype)
    source = some_source(2, 2, num_tokens, num_slots)
    alive = (source >= 0) & (source < num_slots)
    rows = x.gather(1, source.where(alive, 0)[:, :, None].expand(-1, -1, channels))
    assert torch.equal(unmerge_triton(x, source), torch.where(alive[:, :, None], rows, 0.0))
    assert torch.equal(unmerge_triton(x, source, pruned_fill=fill), torch.where(alive[:, :, None], rows, fill))
    launched("_unmerge_backward", fill, source, num_slots)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "by-size"])
@pytest.mark.parametrize(("num_tokens", "num_slots", "channels"), [(1, 1, 3), (40, 7, 16), (97, 50, 130), (300, 2, 8)])
def test_merge_backward(num_tokens, num_slots, channels, weighted, dtype):
    grad = normal(0, 2, num_slots, channels, dtype=dtype)
    source = some_source(1, 2, num_tokens, num_slots)
    size = None
    if weighted:
        size = uniform(2, 0.5, 4, 2, num_tokens)
        size[:, ::5] = torch.nan
        size[:, 1::5] = -1.0
    launched("_merge_backward", grad, source, size)


def test_backward_ignores_what_pruned_positions_hold():
    grad = torch.full((1, 2, 4), torch.nan, device=DEVICE)
    source = torch.tensor([[-1, 5, -1]], device=DEVICE)
    assert torch.equal(merge_backward_triton(grad, source).cpu(), torch.zeros(1, 3, 4))
    assert torch.equal(
        unmerge_backward_triton(grad.expand(1, 2, 4)[:, :1].expand(1, 3, 4), source, 2).cpu(), torch.zeros(1, 2, 4)
    )


def test_strided_rows_and_empty_batches_of_the_row_kernels():
    x = normal(0, 30, 2, 16).transpose(0, 1)
    source = some_source(1, 30, 2, 30).t()
    contiguous = source.contiguous()
    fill = normal(2, 2, 30, 32)[:, :, ::2]
    assert torch.equal(
        unmerge_triton(x, source, pruned_fill=fill),
        unmerge_triton(x.contiguous(), contiguous, pruned_fill=fill.contiguous()),
    )
    assert torch.equal(merge_backward_triton(x, source), merge_backward_triton(x.contiguous(), contiguous))
    assert torch.equal(unmerge_backward_triton(x, source, 9), unmerge_backward_triton(x.contiguous(), contiguous, 9))
    empty = torch.empty(0, 30, dtype=torch.int64, device=DEVICE)
    assert unmerge_triton(x[:0], empty).shape == (0, 30, 16)
    assert unmerge_triton(x[:, :0], contiguous).abs().sum() == 0
    assert merge_backward_triton(x[:, :0], contiguous).abs().sum() == 0
    assert unmerge_backward_triton(x[:, :0], contiguous[:, :0], 4).abs().sum() == 0
