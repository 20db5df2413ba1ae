"""The Triton kernels of masked_merge where the samples of tests/ops do not reach: long loops, sorting, strides."""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton.masked_merge as masked_merge_module
from tests.triton.inputs import DEVICE, launched
from tokcomp_kernels.testing import Sample
from tokcomp_kernels.triton.masked_merge import masked_merge_triton
from tokcomp_kernels.triton.masked_merge_backward import masked_merge_backward_triton


def make(seed, batch, num_tokens, channels, counts, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, num_tokens, channels, generator=generator).to(dtype)
    importance, mask, size = torch.rand(3, batch, num_tokens, generator=generator)
    options["size"] = (0.5 + 4 * size).to(DEVICE)
    args = (x.to(DEVICE), importance.to(DEVICE), (mask < 0.9).float().to(DEVICE), torch.tensor(counts, device=DEVICE))
    return Sample("masked_merge", f"seed {seed}", args, options)


def run(sample):
    return launched(sample.op, *sample.args, **sample.kwargs)


def test_more_sources_than_programs_have_tiles_at_once():
    """Some 130 sources, 16 to a tile and 4 programs to an image, all of which join few tokens."""
    _, _, _, destination = run(make(0, 1, 150, 40, [150, 4], torch.bfloat16, min_weighted_size=0.5))
    own = torch.arange(150, device=DEVICE)
    assert int((destination != own).sum(1).min()) > 4 * 16


def test_a_row_longer_than_a_block_of_channels():
    run(make(1, 1, 40, 600, [40, 20], torch.float16))


def test_tokens_that_are_sorted_rank_as_counted_ones(monkeypatch):
    sample = make(2, 2, 70, 8, [60, 30])
    importance, mask = sample.args[1], sample.args[2]
    importance[:, ::9] = torch.nan
    importance[:, 5::11] = -torch.inf
    importance[:, 7::13] = importance[:, 6:7]
    mask[0, 3::17] = torch.nan
    counted = run(sample)
    monkeypatch.setattr(masked_merge_module, "MAX_COUNTED", 16)
    assert all(torch.equal(a, b) for a, b in zip(counted, run(sample), strict=True))


def test_each_image_merges_as_its_own_mask_allows():
    """One image has too few live tokens to merge, one merges some, one all: alone each gives the same bits."""
    sample = make(3, 3, 50, 24, [45, 20], torch.float16)
    mask = sample.args[2]
    mask[0, 15:], mask[1, 30:], mask[2] = 0.0, 0.0, 1.0
    x, size, rank, destination = run(sample)
    merged = (destination != torch.arange(50, device=DEVICE)).sum(1)
    assert merged[0] == 0 and 0 < merged[1] < 25 and merged[2] == 25
    for image in range(3):
        one = slice(image, image + 1)
        alone = masked_merge_triton(*(t[one] for t in sample.args[:3]), sample.args[3], size=sample.kwargs["size"][one])
        for have, want in zip(alone, (x, size, rank, destination), strict=True):
            assert torch.equal(have, want[one])


def test_strides_of_every_input():
    sample = make(4, 3, 40, 64, [36, 20], torch.float16)
    x, importance, mask, counts = sample.args
    size = sample.kwargs["size"]
    want = masked_merge_triton(x[:, :, ::2], importance, mask, counts, size=size)
    have = masked_merge_triton(
        x[:, :, ::2].transpose(0, 1).contiguous().transpose(0, 1),
        importance.t().contiguous().t(),
        torch.stack([mask, mask], 2)[:, :, 1],
        torch.stack([counts, counts], 1)[:, 0],
        size=size.t().contiguous().t(),
    )
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    grad, destination = x, want[3]
    assert torch.equal(
        masked_merge_backward_triton(
            grad.transpose(0, 1).contiguous().transpose(0, 1), destination.t().contiguous().t()
        ),
        masked_merge_backward_triton(grad, destination),
    )


def test_no_channels_and_no_tokens():
    sample = make(5, 2, 9, 0, [9, 4])
    x, size, _, destination = masked_merge_triton(*sample.args)
    assert x.shape == (2, 9, 0)
    # Every cosine is 0, so the token of lowest rank takes all; with it, sizes stay as they were.
    assert torch.equal(size, torch.ones_like(size))
    assert bool(((destination != torch.arange(9, device=DEVICE)).sum(1) > 0).all())
    sample = make(6, 2, 0, 4, [9, 4])
    outputs = masked_merge_triton(*sample.args, num_prefix_tokens=0)
    assert [tuple(t.shape) for t in outputs] == [(2, 0, 4), (2, 0), (2, 0), (2, 0)]
    assert masked_merge_backward_triton(outputs[0], outputs[3]).shape == (2, 0, 4)
