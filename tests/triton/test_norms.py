"""The Triton kernels that add, merge and normalise: bits of prune_merge, rows of any width and layout, gradients."""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton._merge_norm as merge_norm
from tests.triton.inputs import DEVICE, DTYPES, normal, uniform
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import Sample
from tokcomp_kernels.triton.add_layer_norm import add_layer_norm_triton
from tokcomp_kernels.triton.prune_merge import prune_merge_triton
from tokcomp_kernels.triton.prune_merge_norm import prune_merge_norm_triton


@pytest.mark.parametrize(
    ("num_tokens", "channels", "num_prune_kept", "num_merge_kept", "prefix", "dtype"),
    [
        (1, 8, 1, 1, 1, torch.float32),
        (70, 130, 66, 40, 2, torch.float16),
        (37, 64, 37, 37, 1, torch.float32),
        (30, 24, 21, 2, 1, torch.float32),
        (30, 24, 21, 2, 1, torch.bfloat16),
    ],
    ids=str,
)
def test_bits_are_those_of_prune_merge(num_tokens, channels, num_prune_kept, num_merge_kept, prefix, dtype):
    """Of the rounded sum, on the same backend; several blocks of slots, several blocks of sources, odd widths."""
    x, branch = (
        normal(num_tokens, 2, num_tokens, channels, dtype=dtype),
        normal(1, 2, num_tokens, channels, dtype=dtype),
    )
    weight, bias = normal(2, channels, dtype=dtype), normal(3, channels, dtype=dtype)
    counts = (normal(4, 2, num_tokens), num_prune_kept, num_merge_kept)
    options = {"size": uniform(5, 0.5, 4.5, 2, num_tokens), "num_prefix_tokens": prefix}
    outputs = prune_merge_norm_triton(x, branch, *counts, weight, bias, **options)
    kept, size, source = prune_merge_triton(x + branch, *counts, **options)
    assert torch.equal(outputs[0], kept) and torch.equal(outputs[2], size) and torch.equal(outputs[3], source)
    assert_right(Sample("prune_merge_norm", "bits", (x, branch, *counts, weight, bias), options), outputs)
    alone = prune_merge_norm_triton(
        x[1:], branch[1:], counts[0][1:], *counts[1:], weight, bias, **{**options, "size": options["size"][1:]}
    )
    assert all(torch.equal(one, both[1:]) for one, both in zip(alone, outputs, strict=True)), "depends on the batch"


def test_rows_too_wide_for_the_registers(monkeypatch):
    """They are matched and merged in passes over their channels: other kernels, the same answer."""
    x, branch, importance = normal(0, 2, 30, 40), normal(1, 2, 30, 40), normal(2, 2, 30)
    weight, bias = normal(3, 40), normal(4, 40)
    args, options = (x, branch, importance, 28, 17, weight, bias), {"size": uniform(5, 0.5, 4.5, 2, 30)}
    resident = prune_merge_norm_triton(*args, **options)
    ran = []
    monkeypatch.setattr("tokcomp_kernels.triton.prune_merge.MAX_RESIDENT", 39 * 4)
    monkeypatch.setattr("tokcomp_kernels.triton.prune_merge.merge_ranked", lambda *_, **__: ran.append("resident"))
    wide = prune_merge_norm_triton(*args, **options)
    assert not ran
    assert_right(Sample("prune_merge_norm", "wide", args, options), wide)
    assert torch.equal(wide[3], resident[3])
    for have, want in zip(wide, resident, strict=True):
        torch.testing.assert_close(have, want)


def test_sources_of_one_slot_share_it_in_order_of_rank():
    """All sources equal one token's direction: one slot takes them all, from every block of sources."""
    x = torch.zeros(1, 64, 16, device=DEVICE)
    x[0, :, 0] = 1.0
    x[0, :24] = torch.eye(64, 16, device=DEVICE)[:1].roll(1, 1)
    x[0, 5] = 0.0
    x[0, 5, 0] = 3.0
    x[0, 24:, 1] = 0.0
    importance = torch.arange(64, 0, -1, device=DEVICE, dtype=torch.float32)[None]
    args = (x, torch.zeros_like(x), importance, 60, 24)
    kept, normalized, size, source = prune_merge_norm_triton(*args)
    assert (source[0, 24:60] == 5).all() and (source[0, 60:] == -1).all()
    assert size[0, 5] == 37 and kept[0, 5, 0] == torch.tensor(39.0) / 37
    assert_right(Sample("prune_merge_norm", "one-slot", args), (kept, normalized, size, source))


def test_the_mean_of_equal_rows_is_that_row():
    """Division by 3, 5, 6, 7 ... of sums that are exact multiples leaves no rounding behind."""
    x = (torch.arange(32, device=DEVICE) % 7 + 1.0).expand(1, 40, 32).contiguous()
    importance = torch.arange(40, 0, -1, device=DEVICE, dtype=torch.float32)[None]
    for kept in (2, 3, 9):
        out = prune_merge_triton(x, importance, 40, kept)[0]
        assert torch.equal(out, x[:, :kept])


def test_empty_batches_and_widths():
    outputs = prune_merge_norm_triton(normal(0, 0, 9, 4), normal(0, 0, 9, 4), normal(0, 0, 9), 8, 6)
    assert [tuple(out.shape) for out in outputs] == [(0, 6, 4), (0, 6, 4), (0, 6), (0, 9)]
    outputs = prune_merge_norm_triton(normal(0, 2, 9, 0), normal(0, 2, 9, 0), normal(0, 2, 9), 8, 6)
    assert outputs[1].shape == (2, 6, 0) and ((outputs[3] == 1).sum(1) == 3).all()
    total, normalized = add_layer_norm_triton(normal(0, 0, 9, 4), normal(0, 0, 9, 4))
    assert total.shape == normalized.shape == (0, 9, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70,), (5, 70), (3, 2, 5, 64), (1, 1, 193), (2, 9, 1)], ids=str)
def test_add_layer_norm_takes_any_leading_shape(shape, dtype):
    x, branch = normal(0, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)
    weight, bias = normal(2, shape[-1], dtype=dtype), normal(3, shape[-1], dtype=dtype)
    outputs = add_layer_norm_triton(x, branch, weight, bias, 1e-5)
    assert all(out.shape == x.shape and out.is_contiguous() for out in outputs)
    flat = (x.reshape(-1, shape[-1]), branch.reshape(-1, shape[-1]), weight, bias)
    sample = Sample("add_layer_norm", str(shape), flat, {"norm_eps": 1e-5})
    assert_right(sample, tuple(out.reshape(-1, shape[-1]) for out in outputs))


def test_add_layer_norm_reads_strided_views():
    packed = normal(0, 3, 12, 2, 33)
    x, branch = packed[:, 1:, 0], packed[:, 1:, 1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(add_layer_norm_triton(x, branch), add_layer_norm_triton(x.clone(), branch.clone()), strict=True)
    )
    four = normal(1, 2, 3, 4, 8).transpose(0, 2)
    for a, b in zip(add_layer_norm_triton(four, four), add_layer_norm_triton(four.clone(), four.clone()), strict=True):
        assert torch.equal(a, b)


def test_the_table_is_shared():
    """prune_merge_norm has no tile sizes of its own: with others its bits could differ from prune_merge's."""
    from tokcomp_kernels.triton._configs import CONFIG_DIR

    assert merge_norm.TABLE == "prune_merge" and not (CONFIG_DIR / "prune_merge_norm.json").exists()
