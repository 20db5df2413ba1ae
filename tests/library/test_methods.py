"""Each method, metric and pipeline against an explicit float64 forward pass that holds the whole attention map."""

from __future__ import annotations

import math

import pytest
import tokcomp
import torch
from tokcomp.adapters import UnsupportedModelError

from tokcomp_kernels.reference.prune_merge import prune_merge_reference
from tokcomp_kernels.reference.tome_merge import tome_merge_reference

# 4 blocks, 16 patches and a class token: pruning alone, merging alone, both, and a block that drops nothing.
PRUNE = [17, 14, 11, 11]
MERGE = [17, 12, 11, 6]
SCHEDULE = tokcomp.CompressionSchedule(PRUNE, MERGE)


def attention_map(block, x, size):
    attn = block.attn
    batch, tokens, _ = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    scores = q @ k.transpose(-1, -2) * attn.scale
    if size is not None:
        scores = scores + size.log()[:, None, None, :]
    return scores.softmax(-1), k, v


def oracle(model, images, reduce, proportional=True):
    """Logits of a plain model with reduce(index, x, size, attention map, k, v) -> x, size between attention and MLP."""
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        size = None
        for index, block in enumerate(model.blocks):
            attn, k, v = attention_map(block, x, size if proportional else None)
            out = (attn @ v).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(out)
            x, size = reduce(index, x, size, attn, k, v)
            x = x + block.mlp(block.norm2(x))
        return model.head(model.norm(x)[:, 0])


def importance_of(metric, attn, v):
    cls_attn = attn[:, :, 0].mean(1)
    if metric == "image_attn":
        return attn.mean((1, 2))
    return cls_attn * v.transpose(1, 2).flatten(2).norm(dim=-1) if metric == "cls_attn_v" else cls_attn


def assert_same(ours, expected):
    # Two float64 passes of a few hundred operations each, on logits of order 1.
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)


@pytest.fixture(params=[0, 1], ids="seed{}".format)
def vit(request, make_vit):
    model = make_vit(request.param).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    return model, images


@pytest.mark.parametrize("metric", ["cls_attn", "image_attn", "cls_attn_v"])
def test_diffrate_metric(vit, metric):
    model, images = vit

    def reduce(index, x, size, attn, k, v):
        if min(PRUNE[index], MERGE[index]) >= x.shape[1]:
            return x, size
        return prune_merge_reference(x, importance_of(metric, attn, v), PRUNE[index], MERGE[index], size=size)[:2]

    expected = oracle(model, images, reduce)
    with torch.no_grad():
        ours = tokcomp.compress(model, tokcomp.DiffRate(SCHEDULE, metric=metric))(images)
    assert_same(ours, expected)


@pytest.mark.parametrize("pipeline", ["prune_merge", "prune", "merge"])
def test_diffrate_pipeline(vit, pipeline):
    model, images = vit

    def reduce(index, x, size, attn, k, v):
        prune = PRUNE[index] if "prune" in pipeline else x.shape[1]
        merge = MERGE[index] if "merge" in pipeline else x.shape[1]
        if min(prune, merge) >= x.shape[1]:
            return x, size
        return prune_merge_reference(x, attn[:, :, 0].mean(1), prune, merge, size=size)[:2]

    expected = oracle(model, images, reduce)
    with torch.no_grad():
        ours = tokcomp.compress(model, tokcomp.DiffRate(SCHEDULE, pipeline=pipeline))(images)
    assert_same(ours, expected)


def test_diffrate_merge_prune(vit):
    model, images = vit
    prune, merge = [17, 11, 9, 5], [17, 14, 11, 6]

    def reduce(index, x, size, attn, k, v):
        x, size, _ = prune_merge_reference(x, attn[:, :, 0].mean(1), x.shape[1], merge[index], size=size)
        return x[:, : prune[index]], size[:, : prune[index]]

    expected = oracle(model, images, reduce)
    method = tokcomp.DiffRate(tokcomp.CompressionSchedule(prune, merge), pipeline="merge_prune")
    with torch.no_grad():
        ours = tokcomp.compress(model, method)(images)
        maps = tokcomp.trace(model, images)
    assert_same(ours, expected)
    assert [int(source.max()) + 1 for source in maps] == [17, 11, 9, 5]
    assert (maps[0] >= 0).all() and (maps[1] < 0).any(1).all()


def test_random_metric_is_seeded(make_vit):
    model, images = make_vit(), torch.randn(3, 3, 32, 32)

    def sources(seed):
        return tokcomp.trace(tokcomp.compress(model, tokcomp.DiffRate(SCHEDULE, "random", "prune", seed=seed)), images)

    first, again, other = sources(5), sources(5), sources(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])
    assert torch.equal(first[-1][0], first[-1][1])  # positions, not images, are drawn
    dropped = [int((sources(seed)[1][0, 1:] < 0).nonzero()[0]) for seed in range(24)]
    assert len(set(dropped)) > 4


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("r", [3, [0, 5, 2, 100]], ids=str)
def test_tome(vit, r, prop_attn):
    model, images = vit
    per_block = r if isinstance(r, list) else [r] * 4

    def reduce(index, x, size, attn, k, v):
        if per_block[index] == 0:
            return x, size
        return tome_merge_reference(x, k.mean(1), per_block[index], size=size)[:2]

    expected = oracle(model, images, reduce, proportional=prop_attn)
    with torch.no_grad():
        ours = tokcomp.compress(model, tokcomp.ToMe(r, prop_attn=prop_attn))(images)
    assert_same(ours, expected)


EVIT_CASES = {
    "rate": (dict(keep_rate=0.7, blocks=(1, 3)), [None, 0.7, None, 0.7]),
    "rates": (dict(keep_rate=[1, 0.5, 0.9, 0.3], blocks=(0,)), [None, 0.5, 0.9, 0.3]),
    "pruned": (dict(num_pruned=3), [3] * 4),
    "all pruned": (dict(num_pruned=100), [100] * 4),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("case", EVIT_CASES)
def test_evit(vit, case, fuse):
    model, images = vit
    arguments, plan = EVIT_CASES[case]

    def reduce(index, x, size, attn, k, v):
        patches = x.shape[1] - 1
        step = plan[index]
        if step is None:
            return x, None
        kept = math.ceil(step * patches) if isinstance(step, float) else max(patches - step, 1)
        if kept >= patches:
            return x, None
        weights = attn[:, :, 0, 1:].mean(1)
        order = weights.argsort(dim=1, descending=True, stable=True)
        patch = x[:, 1:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        weights = weights.gather(1, order)
        fused = (weights[:, kept:, None] * patch[:, kept:]).sum(1, keepdim=True)
        return torch.cat([x[:, :1], patch[:, :kept]] + [fused] * fuse, dim=1), None

    expected = oracle(model, images, reduce)
    with torch.no_grad():
        ours = tokcomp.compress(model, tokcomp.EViT(**arguments, fuse=fuse))(images)
    assert_same(ours, expected)


def test_evit_fused_tokens_are_traced_to_the_fused_slot(make_vit):
    model, images = make_vit(), torch.randn(2, 3, 32, 32)
    first, second, *_ = tokcomp.trace(tokcomp.compress(model, tokcomp.EViT(num_pruned=4)), images)
    assert (first == 13).sum(1).tolist() == [4, 4]  # the class token, 12 kept, then the fused one
    assert first.min() == 0 and second.min() == 0
    dropped = tokcomp.trace(tokcomp.compress(model, tokcomp.EViT(num_pruned=4, fuse=False)), images)[0]
    assert torch.equal(dropped < 0, first == 13)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: tokcomp.DiffRate([1, 2]), TypeError, "schedule must be a CompressionSchedule, got list"),
        (
            lambda: tokcomp.DiffRate(SCHEDULE, metric="size"),
            ValueError,
            "metric must be one of cls_attn, .* got 'size'",
        ),
        (lambda: tokcomp.DiffRate(SCHEDULE, pipeline="both"), ValueError, "pipeline must be one of prune_merge"),
        (
            lambda: tokcomp.DiffRate(tokcomp.CompressionSchedule(None, [3])),
            ValueError,
            "pipeline 'prune_merge' needs num_prune_kept",
        ),
        (lambda: tokcomp.ToMe(-1), ValueError, "r must be at least 0, got -1"),
        (lambda: tokcomp.ToMe(1.5), TypeError, "r must be an integer or one per block, got 1.5"),
        (lambda: tokcomp.EViT(), TypeError, "needs keep_rate or num_pruned, got neither"),
        (lambda: tokcomp.EViT(0.5, num_pruned=3), TypeError, "needs keep_rate or num_pruned, got both"),
        (lambda: tokcomp.EViT(0), ValueError, r"keep_rate must be in \(0, 1\], got 0"),
        (lambda: tokcomp.EViT([0.5, 1.1]), ValueError, r"keep_rate must be in \(0, 1\], got 1.1"),
        (lambda: tokcomp.EViT("most"), TypeError, "keep_rate must be a number or one per block"),
        (lambda: tokcomp.EViT(num_pruned=-2), ValueError, "num_pruned must be at least 0, got -2"),
    ],
)
def test_wrong_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (tokcomp.DiffRate(tokcomp.CompressionSchedule([9] * 3, [8] * 3)), "got 3 entries for 4 blocks"),
        (tokcomp.DiffRate(tokcomp.CompressionSchedule([9, 9, 9, 1], [9] * 4)), r"num_prune_kept\[3\] must keep the 2"),
        (
            tokcomp.DiffRate(tokcomp.CompressionSchedule([9] * 4, [9, 2, 9, 9])),
            r"num_merge_kept\[1\] must be above the 2",
        ),
        (tokcomp.ToMe([1, 2]), "r must have one entry per block, got 2 entries for 4 blocks"),
        (tokcomp.EViT([0.5] * 5), "keep_rate must have one entry per block, got 5 entries for 4 blocks"),
        (tokcomp.EViT(0.5, blocks=(1, 4)), "blocks must be below the model's depth 4"),
    ],
)
def test_method_that_does_not_fit_leaves_the_model_alone(make_vit, method, message):
    model = make_vit(reg_tokens=1)
    images = torch.randn(2, 3, 32, 32)
    tokcomp.compress(model, tokcomp.ToMe(2))
    before = model(images)
    with pytest.raises(ValueError, match=message):
        tokcomp.compress(model, method)
    assert torch.equal(model(images), before)
    with pytest.raises(ValueError, match=message):
        tokcomp.compress(tokcomp.restore(model), method)
    assert type(model).__name__ == "VisionTransformer"


def test_merging_nothing_into_the_prefix_is_no_error(make_vit):
    """A count that drops nothing any more, because fewer tokens arrive, is not a merge."""
    schedule = tokcomp.CompressionSchedule([17, 1, 1, 1], [17, 17, 1, 1])
    model = tokcomp.compress(make_vit(), tokcomp.DiffRate(schedule))
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    "method",
    [tokcomp.DiffRate(SCHEDULE), tokcomp.DiffRate(SCHEDULE, metric="cls_attn_v"), tokcomp.EViT(0.7, blocks=(1,))],
    ids=repr,
)
def test_class_attention_needs_a_class_token(make_vit, method):
    model = make_vit(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="needs a class token, which this model does not have; use"):
        tokcomp.compress(model, method)


def test_evidence_that_needs_do_not_name_is_an_error(make_vit):
    class Careless(tokcomp.ToMe):
        needs = frozenset({"cls_attn"})

    model = tokcomp.compress(make_vit(), Careless(2))
    with pytest.raises(RuntimeError, match="keys was not computed"):
        model(torch.randn(2, 3, 32, 32))


def test_unsupported_error_is_a_type_error():
    assert issubclass(UnsupportedModelError, TypeError)
