"""The Triton merge kernels where the samples of tests/ops do not reach: sorting, many tokens, ties far apart."""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton.prune_merge as prune_merge_module
import tokcomp_kernels.triton.tome_merge as tome_merge_module
from tests.triton.inputs import DEVICE, launched, normal, uniform
from tokcomp_kernels._numbers import MIN_SIZE
from tokcomp_kernels.triton.prune_merge import prune_merge_triton
from tokcomp_kernels.triton.tome_merge import tome_merge_triton


@pytest.mark.parametrize(
    ("num_tokens", "channels", "num_prune_kept", "num_merge_kept", "prefix", "dtype"),
    [
        (2, 5, 2, 2, 0, torch.float32),
        (33, 24, 30, 17, 2, torch.float16),
        (197, 192, 192, 180, 1, torch.bfloat16),
        (257, 70, 200, 150, 5, torch.float32),
        (577, 16, 560, 500, 1, torch.float16),
    ],
)
def test_prune_merge(num_tokens, channels, num_prune_kept, num_merge_kept, prefix, dtype):
    importance, size = uniform(1, 0, 1, 1, num_tokens), uniform(2, 0.5, 4, 1, num_tokens)
    x = normal(0, 1, num_tokens, channels, dtype=dtype)
    counts = (num_prune_kept, num_merge_kept)
    launched("prune_merge", x, importance, *counts, size=size, num_prefix_tokens=prefix)


@pytest.mark.parametrize("options", [{"similarity_weighted_size": False}, {}], ids=["whole", "by-similarity"])
def test_prune_merge_without_size(options):
    launched("prune_merge", normal(0, 2, 50, 48), normal(1, 2, 50), 48, 20, **options)


def test_prune_merge_above_the_counted_tokens(monkeypatch):
    """There the order comes from a sort; NaN still ranks last, and ties keep their order."""
    monkeypatch.setattr(prune_merge_module, "MAX_COUNTED", 16)
    importance = uniform(0, 0, 9, 2, 70).floor()
    importance[0, ::9] = torch.nan
    importance[0, 5::11] = -torch.inf
    launched("prune_merge", normal(1, 2, 70, 8), importance, 65, 40, size=uniform(2, 0.5, 2, 2, 70))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_prune_merge_ties_and_special_importance(kind):
    importance = uniform(0, 0, 4, 2, 60).floor().to(kind)
    importance[:, 3::7] = torch.nan
    importance[:, 4::9] = -0.0
    importance[:, 5::9] = torch.inf
    importance[:, 6::11] = -torch.inf
    launched("prune_merge", normal(1, 2, 60, 16), importance, 58, 40)


def test_importance_is_ranked_in_its_own_precision():
    importance = 1.0 + torch.arange(20, dtype=torch.float64, device=DEVICE).flip(0)[None] * 2.0**-50
    importance[0, 7:] = importance[0, 7:].flip(0)
    launched("prune_merge", normal(0, 1, 20, 8), importance, 15, 10)


def along_axes(num_tokens, width):
    """Rows that are multiples of unit axes, so every cosine is exactly 0, 1 or -1 and most of them tie."""
    generator = torch.Generator().manual_seed(3)
    axes = torch.randint(0, width, (2, num_tokens), generator=generator)
    signs = torch.tensor([-2.0, 0.0, 1.0, 4.0])[torch.randint(0, 4, (2, num_tokens), generator=generator)]
    return (torch.eye(width)[axes] * signs[:, :, None]).to(DEVICE)


def test_prune_merge_takes_the_lowest_of_equal_slots():
    x = along_axes(80, 5)
    launched("prune_merge", x, normal(5, 2, 80), 78, 40, exact=True, size=uniform(6, 0.1, 3, 2, 80))


def test_prune_merge_reads_strided_views():
    packed = normal(0, 40, 3, 2, 32)
    x = packed[:, 1].transpose(0, 1)
    importance = normal(1, 40, 2).t()
    size = uniform(2, 1, 3, 40, 2, 2)[:, :, 1].t()
    launched("prune_merge", x, importance, 36, 20, size=size)
    launched("prune_merge", normal(3, 2, 40, 64)[:, :, ::2], importance, 36, 20, size=size)
    launched("prune_merge", normal(3, 1, 40, 8).expand(3, -1, -1), normal(4, 1, 40).expand(3, -1), 36, 20)


def test_prune_merge_with_values_that_are_not_numbers():
    """NaN and infinite tokens give cosine 0: they go to the lowest slot unless another cosine is positive."""
    x = normal(0, 1, 12, 4)
    importance = torch.arange(12, 0, -1, device=DEVICE, dtype=torch.float32)[None]
    x[0, 9, 2] = torch.nan
    x[0, 10] = torch.inf
    x[0, 11] = 0.0
    x[0, 2, 0] = torch.nan
    size = torch.ones(1, 12, device=DEVICE)
    size[0, 4], size[0, 5], size[0, 6] = torch.nan, -3.0, 0.0
    _, size_out, source = prune_merge_triton(x, importance, 12, 9, size=size)
    assert source[0].tolist() == [*range(9), 1, 1, 1]
    floor = torch.tensor(MIN_SIZE)
    assert torch.equal(size_out[0].cpu(), torch.stack([torch.tensor(1.0)] * 4 + [floor] * 3 + [torch.tensor(1.0)] * 2))


def test_prune_merge_keeps_size_above_zero():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=DEVICE)
    importance = torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE)
    x_out, size_out, _ = prune_merge_triton(x, importance, 3, 2, size=torch.tensor([[1.0, 1.0, 5.0]], device=DEVICE))
    assert torch.equal(size_out.cpu(), torch.tensor([[1.0, MIN_SIZE]]))
    assert torch.equal(x_out.cpu(), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


def test_prune_merge_empty():
    x_out, size_out, source = prune_merge_triton(normal(0, 0, 9, 4), normal(0, 0, 9), 8, 6)
    assert (x_out.shape, size_out.shape, source.shape) == ((0, 6, 4), (0, 6), (0, 9))
    x_out, size_out, source = prune_merge_triton(normal(0, 2, 9, 4), normal(0, 2, 9), 0, 0, num_prefix_tokens=0)
    assert x_out.shape == (2, 0, 4) and size_out.shape == (2, 0) and (source == -1).all()
    x_out, size_out, source = prune_merge_triton(normal(0, 2, 9, 0), normal(0, 2, 9), 8, 6)
    assert x_out.shape == (2, 6, 0) and torch.equal(size_out.cpu().sort(dim=1).values, torch.ones(2, 6))
    assert ((source == 1).sum(dim=1) == 3).all()


def test_an_image_does_not_depend_on_its_batch():
    x, importance, size = normal(0, 5, 70, 40, dtype=torch.float16), normal(1, 5, 70), uniform(2, 0.5, 3, 5, 70)
    metric = normal(3, 5, 70, 32, dtype=torch.float16)
    together = prune_merge_triton(x, importance, 66, 40, size=size)
    alone = prune_merge_triton(x[3:4], importance[3:4], 66, 40, size=size[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(together, alone, strict=True))
    together = tome_merge_triton(x, metric, 20, size=size)
    alone = tome_merge_triton(x[3:4], metric[3:4], 20, size=size[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    ("num_tokens", "r", "prefix", "dtype"),
    [
        (2, 1, 0, torch.float32),
        (66, 20, 0, torch.bfloat16),
        (197, 98, 1, torch.float16),
        (257, 40, 5, torch.float32),
    ],
)
def test_tome_merge(num_tokens, r, prefix, dtype):
    x, metric = normal(1, 1, num_tokens, 24, dtype=dtype), normal(2, 1, num_tokens, 64, dtype=dtype)
    size = uniform(2, 0.5, 4, 1, num_tokens)
    launched("tome_merge", x, metric, r, size=size, num_prefix_tokens=prefix)


def test_tome_merge_without_size_and_with_odd_width():
    launched("tome_merge", normal(0, 2, 50, 33), normal(1, 2, 50, 70), 13)
    launched("tome_merge", normal(0, 2, 50, 33, dtype=torch.bfloat16), normal(1, 2, 50, 5).double(), 0)
    launched("tome_merge", normal(0, 2, 50, 33, dtype=torch.bfloat16), normal(1, 2, 50, 5).double(), 13)


def test_tome_merge_above_the_counted_edges(monkeypatch):
    monkeypatch.setattr(tome_merge_module, "MAX_COUNTED", 16)
    launched("tome_merge", normal(0, 2, 150, 4), normal(1, 2, 150, 8), 40)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_tome_merge_takes_the_lowest_of_equal_edges(prefix):
    metric = along_axes(90, 4)
    launched("tome_merge", normal(0, 2, 90, 8), metric, 21, exact=True, num_prefix_tokens=prefix)


def test_tome_merge_reads_strided_views_and_nan():
    x = normal(0, 40, 3, 2, 32)[:, 1].transpose(0, 1)
    metric = normal(1, 2, 3, 40, 16).mean(1).transpose(1, 2).contiguous().transpose(1, 2)
    size = uniform(2, 1, 3, 40, 2).t()
    launched("tome_merge", x, metric, 11, size=size)
    metric = metric.clone()
    metric[0, 5], metric[0, 8] = torch.nan, torch.nan
    launched("tome_merge", x, metric, 19, size=size)


def test_tome_merge_empty():
    x_out, size_out, source = tome_merge_triton(normal(0, 0, 9, 4), normal(0, 0, 9, 3), 2)
    assert (x_out.shape, size_out.shape, source.shape) == ((0, 7, 4), (0, 7), (0, 9))
