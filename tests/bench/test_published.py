"""The published pipelines give the compressed model's logits: what a speed figure compares is the same function."""

from __future__ import annotations

import copy

import pytest
import timm
import tokcomp
import torch
from tokcomp.bench.published import PublishedPipeline

SCHEDULE = tokcomp.CompressionSchedule([17, 17, 15, 12, 9, 3], [17, 15, 12, 12, 6, 3])
METHODS = {
    "diffrate": tokcomp.DiffRate(SCHEDULE),
    "diffrate-prune": tokcomp.DiffRate(SCHEDULE, pipeline="prune"),
    "diffrate-merge": tokcomp.DiffRate(SCHEDULE, pipeline="merge"),
    "tome": tokcomp.ToMe(3),
    "tome-plain-attention": tokcomp.ToMe([0, 2, 8, 1, 0, 2], prop_attn=False),
    "evit": tokcomp.EViT(0.7, blocks=(1, 3, 4)),
    "evit-unfused": tokcomp.EViT(num_pruned=2, fuse=False),
}
MODELS = {
    "class-token": {},
    "average-pool": {"global_pool": "avg"},
    "layer-scale-qk-norm": {"init_values": 0.3, "qk_norm": True},
}


def small_vit(seed: int, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=6, num_heads=3, num_classes=7, **options
    )
    return model.double().eval()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_logits_agree(method: tokcomp.Method, options: dict[str, object]) -> None:
    model = small_vit(3, **options)
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        plain = model(images)
        want = PublishedPipeline(model, method)(images)
        have = tokcomp.compress(copy.deepcopy(model), method)(images)
    # float64 end to end: six blocks of sums over fewer than 200 terms.
    scale = want.abs().max()
    assert (have - want).abs().max() <= 1e-11 * scale
    assert (plain - want).abs().max() > 1e-4 * scale  # the method changes the logits: agreement says something


def test_distilled_model_agrees() -> None:
    torch.manual_seed(5)
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=4, num_classes=7)
    model = model.double().eval()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for method in (tokcomp.ToMe(2), tokcomp.DiffRate(tokcomp.CompressionSchedule([18, 15, 9, 9], [18, 12, 9, 6]))):
        with torch.no_grad():
            want = PublishedPipeline(model, method)(images)
            have = tokcomp.compress(copy.deepcopy(model), method)(images)
        assert (have - want).abs().max() <= 1e-11 * want.abs().max()


def test_autocast_promotes_where_sizes_touch() -> None:
    model = small_vit(6).float()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        PublishedPipeline(model, METHODS["diffrate"])(images)
    assert seen == [torch.float32] * 6  # the residual stream stays float32


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (tokcomp.DiffRate(SCHEDULE, metric="image_attn"), "metric must be 'cls_attn'"),
        (tokcomp.DiffRate(SCHEDULE, pipeline="merge_prune"), "pipeline must be"),
        (tokcomp.DiffRate(SCHEDULE, similarity_weighted_size=False), "similarity_weighted_size must be True"),
    ],
)
def test_unpublished_variants_are_refused(method: tokcomp.Method, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PublishedPipeline(small_vit(1), method)
