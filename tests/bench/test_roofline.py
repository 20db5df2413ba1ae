"""The roofline: its counts against the model's own, its bound against figures worked out beforehand, its refusals."""

from __future__ import annotations

import copy

import pytest
import timm
import tokcomp
import torch

from benchmarks.model.roofline import BlockTokens, ModelShape, ideal_kernels, ideal_seconds, token_counts

H200 = {"matrix_flops_per_s": 790e12, "copy_bytes_per_s": 4.3e12, "exponentials_per_s": 132 * 16 * 1.755e9}
MAE = {"global_pool": "avg", "num_classes": 1000}
METHODS = {
    "none": None,
    "diffrate": tokcomp.DiffRate(tokcomp.CompressionSchedule([65, 60, 50, 50, 30, 9], [65, 55, 50, 40, 20, 9])),
    "tome": tokcomp.ToMe(7),
    "evit": tokcomp.EViT(0.6, blocks=(1, 3)),
}


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return timm.create_model("test_vit", img_size=128, num_classes=7).eval()


@pytest.mark.parametrize("name", METHODS)
def test_multiply_adds_are_the_model_s_own(name: str, small: torch.nn.Module) -> None:
    """tokcomp.flops counts the patch embedding for the class token too, as Alg. 2 does; no kernel does that."""
    method = METHODS[name]
    own = copy.deepcopy(small)
    expected = tokcomp.flops(own if method is None else tokcomp.compress(own, method))
    shape = ModelShape.of(small)
    ideal = sum(cost.multiply_adds for cost in ideal_kernels(small, method, 3, torch.float32))
    assert ideal == 3 * (expected - shape.patch_inputs * shape.channels)


def test_token_counts() -> None:
    shape = ModelShape.of("deit_tiny_patch16_224")
    published = tokcomp.DiffRate.published("deit_tiny_patch16_224", 0.6)
    counts = token_counts(shape, published)
    assert counts[0] == BlockTokens(197, 197, 197, False)
    assert counts[1] == BlockTokens(197, 196, 187, False)
    assert counts[2] == BlockTokens(187, 180, 167, True)
    assert token_counts(shape, published.schedule) == counts
    assert token_counts(shape, tokcomp.ToMe(10))[1] == BlockTokens(187, 187, 177, True)
    evit = token_counts(shape, tokcomp.EViT(0.5, blocks=(3,)))
    assert evit[3:5] == [BlockTokens(197, 197, 100, False), BlockTokens(100, 100, 100, False)]
    prune = tokcomp.DiffRate(published.schedule, pipeline="prune")
    assert not any(block.has_size for block in token_counts(shape, prune))


@pytest.mark.parametrize(
    ("name", "gflops", "options", "images_per_second"),
    [
        ("deit_tiny_patch16_224", 0.6, {}, 359.6e3),
        ("deit_small_patch16_224", 2.3, {}, 141.9e3),
        ("deit_base_patch16_224", 8.7, {}, 41.8e3),
        ("vit_large_patch16_224.mae", 31.0, MAE, 11.97e3),
        ("vit_huge_patch14_224.mae", 93.2, MAE, 4.129e3),
    ],
)
def test_the_bound_of_the_published_models(
    name: str, gflops: float, options: dict[str, object], images_per_second: float
) -> None:
    """Batch 1024, float16, at an H200's rates: figures of an independent calculation, to their last digit."""
    shape = ModelShape.of(name, **options)
    seconds = ideal_seconds(shape, tokcomp.DiffRate.published(name, gflops), 1024, torch.float16, H200)
    assert 1024 / seconds == pytest.approx(images_per_second, rel=1e-3)


def test_the_bound_follows_the_rates() -> None:
    name = "deit_small_patch16_224"
    fast = ideal_seconds(name, None, 64, torch.bfloat16, H200)
    half = ideal_seconds(name, None, 64, torch.bfloat16, {key: rate / 2 for key, rate in H200.items()})
    assert half == pytest.approx(2 * fast)
    launched = ideal_seconds(name, None, 64, torch.bfloat16, H200, launch_seconds=1e-6)
    assert launched - fast == pytest.approx((2 + 12 * 5) * 1e-6)
    # With arithmetic for nothing the bytes remain, and float32 has twice as many.
    endless = {**H200, "matrix_flops_per_s": 1e30, "exponentials_per_s": 1e30}
    narrow, wide = (ideal_seconds(name, None, 1024, dtype, endless) for dtype in (torch.float16, torch.float32))
    assert narrow < ideal_seconds(name, None, 1024, torch.float16, H200)
    assert wide == pytest.approx(2 * narrow, rel=1e-2)
    # A single image has to read every weight.
    weights = sum(p.numel() for p in timm.create_model(name).parameters() if p.ndim > 1)
    assert ideal_seconds(name, None, 1, torch.float16, endless) > 2 * weights / H200["copy_bytes_per_s"]
    with pytest.raises(KeyError, match="copy_bytes_per_s"):
        ideal_seconds(name, None, 1, torch.float16, {"matrix_flops_per_s": 1e12})


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="the roofline knows timm's VisionTransformer, not a MetaFormer"):
        ModelShape.of("caformer_s18")
    with pytest.raises(TypeError, match="the roofline knows timm's Mlp, not a"):
        ModelShape.of("vit_small_patch14_reg4_dinov2", mlp_layer=torch.nn.Identity)
