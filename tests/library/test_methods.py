"""What the methods say of themselves: traces, seeds, and the arguments and models that they refuse.

That each computes what it should is tested in tests/oracle.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tokcomp
import torch
from tokcomp.adapters import UnsupportedModelError
from tokcomp.methods import Evidence

# 4 blocks, 16 patches and a class token: pruning alone, merging alone, both, and a block that drops nothing.
PRUNE = [17, 14, 11, 11]
MERGE = [17, 12, 11, 6]
SCHEDULE = tokcomp.CompressionSchedule(PRUNE, MERGE)


def test_merge_prune_prunes_what_was_merged(make_vit):
    model, images = make_vit(), torch.randn(3, 3, 32, 32)
    schedule = tokcomp.CompressionSchedule([17, 11, 9, 5], [17, 14, 11, 6])
    maps = tokcomp.trace(tokcomp.compress(model, tokcomp.DiffRate(schedule, pipeline="merge_prune")), images)
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
        (lambda: tokcomp.VisionZip(), TypeError, "VisionZip needs keep_rate or num_kept, got neither"),
        (lambda: tokcomp.DivPrune(0.5, num_kept=3), TypeError, "DivPrune needs keep_rate or num_kept, got both"),
        (lambda: tokcomp.DivPrune(num_kept=0), ValueError, "num_kept must be at least 1, got 0"),
        (lambda: tokcomp.DivPrune(num_kept=[5, 4]), ValueError, r"num_kept must be .* one for each of \(3, 6, 9\)"),
        (lambda: tokcomp.VisionZip(0.5, contextual=0), ValueError, r"contextual must be in \(0, 1\], got 0"),
        (lambda: tokcomp.VisionZip(0.5, contextual="few"), TypeError, "contextual must be a number, got 'few'"),
        (lambda: tokcomp.PiToMe(2, margin=1.5), ValueError, r"margin must be in \[-1, 1\], as cosines are, got 1.5"),
        (lambda: tokcomp.PiToMe(2, unprotected=1.5), ValueError, r"unprotected must be in \[0, 1\], got 1.5"),
        (lambda: tokcomp.PiToMe(2, margin=None), TypeError, "margin must be a number, got None"),
        (lambda: tokcomp.DToMe(1.5), ValueError, r"thresholds must be in \[-1, 1\], as cosines are, got 1.5"),
        (lambda: tokcomp.DToMe([0.5, "x"]), TypeError, "thresholds must be numbers, got 'x'"),
        (lambda: tokcomp.DToMe("0.9"), TypeError, "thresholds must be numbers, got '0.9'"),
        (lambda: tokcomp.DToMe(0.9, prop_attn="no"), TypeError, "prop_attn must be True or False, got 'no'"),
        (lambda: tokcomp.PiToMe(2, prop_attn=None), TypeError, "prop_attn must be True or False, got None"),
        (lambda: tokcomp.EViT(0.5, fuse="no"), TypeError, "fuse must be True or False, got 'no'"),
        (lambda: tokcomp.EvoViT(representative="no"), TypeError, "representative must be True or False, got 'no'"),
        (lambda: tokcomp.DivPrune("0.5"), TypeError, "keep_rate must be a number or one per block, got '0.5'"),
        (lambda: tokcomp.SPViT(True), TypeError, "keep_rate must be a number or one per block, got True"),
        (
            lambda: tokcomp.DToMe([0.5], expected=[1, 2]),
            ValueError,
            "expected must have one entry per threshold, got 2",
        ),
        (lambda: tokcomp.ATS(0), ValueError, "num_samples must be at least 1, got 0"),
        (lambda: tokcomp.ATS(4, blocks=3), TypeError, "blocks must be a list of block numbers, got 3"),
        (lambda: tokcomp.PiToMe([2, -1]), ValueError, "r must be at least 0, got -1"),
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
        (
            tokcomp.DivPrune(num_kept=17, blocks=[1]),
            "num_kept must be at most the 16 patch tokens left in block 1, got 17",
        ),
        (tokcomp.VisionZip(num_kept=[4, 5], blocks=[0, 2]), "at most the 4 patch tokens left in block 2, got 5"),
        (tokcomp.DToMe([0.5, 0.5]), "thresholds must have one entry per block, got 2 entries for 4 blocks"),
        (tokcomp.ATS(8, [1, 4]), r"blocks must be below the model's depth 4, got \(1, 4\)"),
        (tokcomp.PiToMe([1, 2]), "r must have one entry per block, got 2 entries for 4 blocks"),
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
    [
        tokcomp.DiffRate(SCHEDULE, metric="cls_attn"),
        tokcomp.DiffRate(SCHEDULE, metric="cls_attn_v"),
        tokcomp.DiffRate(replace(SCHEDULE, method={"metric": "cls_attn"})),
        tokcomp.ATS(8),
    ],
    ids=["cls_attn", "cls_attn_v", "of the schedule", "ATS"],
)
def test_class_attention_that_is_asked_for_needs_a_class_token(make_vit, method):
    model = make_vit(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="needs a class token, which this model does not have; use"):
        tokcomp.compress(model, method)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tokcomp.DiffRate(SCHEDULE),
        lambda: tokcomp.EViT(num_pruned=3),
        lambda: tokcomp.VisionZip(0.5, [1]),
        lambda: tokcomp.CDPruner(0.5, [1]),
    ],
)
def test_what_a_method_leaves_to_the_model_is_chosen_for_each(make_vit, make):
    images, used = torch.randn(2, 3, 32, 32), make()
    tokcomp.compress(make_vit(class_token=False, global_pool="avg"), used)(images)
    assert "cls_attn" in used.needs
    assert torch.equal(tokcomp.compress(make_vit(), used)(images), tokcomp.compress(make_vit(), make())(images))


def test_without_a_class_token_the_attention_received_ranks(make_vit):
    """Of the prefix none, of the rest VisionZip's dominant tokens are EViT's."""
    model, images = make_vit(class_token=False, global_pool="avg"), torch.randn(2, 3, 32, 32)
    kept = tokcomp.trace(tokcomp.compress(model, tokcomp.EViT(7 / 16, [0], fuse=False)), images)[0] >= 0
    slots = tokcomp.trace(tokcomp.compress(model, tokcomp.VisionZip(0.5, [0], contextual=1 / 8)), images)[0]
    alone = (slots[:, :, None] == slots[:, None]).sum(2) == 1
    assert (alone | ~kept).all() and not alone.all(1).any()


def test_a_depth_that_is_not_known_is_an_error():
    with pytest.raises(RuntimeError, match=r"call fitted\(geometry\)"):
        tokcomp.PiToMe(2).score(Evidence(keys=torch.randn(1, 2, 5, 4)), 0, torch.randn(1, 5, 8))


def test_evidence_that_needs_do_not_name_is_an_error(make_vit):
    class Careless(tokcomp.ToMe):
        needs = frozenset({"cls_attn"})

    model = tokcomp.compress(make_vit(), Careless(2))
    with pytest.raises(RuntimeError, match="keys was not computed"):
        model(torch.randn(2, 3, 32, 32))


def test_unsupported_error_is_a_type_error():
    assert issubclass(UnsupportedModelError, TypeError)
