from __future__ import annotations

import pytest
import tokcomp
import torch

# GFLOPs (multiply-adds) of Algorithm 2, dense and under the published schedule, rounded as published.
PUBLISHED = {
    ("deit_tiny_patch16_224", 0.6): (1.253831, 0.654861),
    ("deit_small_patch16_224", 2.3): (4.599177, 2.327226),
    ("deit_base_patch16_224", 8.7): (17.564420, 8.730610),
    ("vit_large_patch16_224.mae", 31.0): (61.555483, 31.004887),
    ("vit_huge_patch14_224.mae", 93.2): (167.295828, 92.107350),
}


@pytest.mark.parametrize(("name", "budget"), PUBLISHED, ids=lambda value: str(value))
def test_published_schedules(meta_model, name, budget):
    model = meta_model(name, num_classes=1000)
    dense, compressed = (
        tokcomp.flops(model),
        tokcomp.flops(tokcomp.compress(model, tokcomp.DiffRate.published(name, budget))),
    )
    # The published sums were accumulated in float32: one rounding of the total per block and step.
    rounding = 2**-24 * 4 * len(model.blocks)
    assert dense / 1e9 == pytest.approx(PUBLISHED[name, budget][0], rel=rounding, abs=5e-7)
    assert compressed / 1e9 == pytest.approx(PUBLISHED[name, budget][1], rel=rounding, abs=5e-7)
    assert tokcomp.flops(tokcomp.restore(model)) == dense


def by_hand(tokens_in, tokens_out, width, patches_area, classes):
    total = tokens_in[0] * width * patches_area * 3 + classes * width
    for arriving, leaving in zip(tokens_in, tokens_out, strict=True):
        total += 4 * arriving * width**2 + 2 * arriving**2 * width + 8 * leaving * width**2
    return total


@pytest.mark.parametrize(
    ("method", "tokens_out"),
    [
        (tokcomp.ToMe(3), [14, 11, 8, 5]),
        (tokcomp.ToMe([0, 8, 8, 8]), [17, 9, 5, 3]),
        (tokcomp.EViT(0.5, blocks=(1, 3)), [17, 10, 10, 7]),
        (tokcomp.EViT(0.5, blocks=(1, 3), fuse=False), [17, 9, 9, 5]),
        (tokcomp.EViT(num_pruned=3, fuse=False), [14, 11, 8, 5]),
        (tokcomp.EViT(num_pruned=3), [15, 13, 11, 9]),
        (tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 14, 20, 9], [17, 16, 12, 6])), [17, 14, 12, 6]),
        (
            tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 14, 20, 9], [17, 16, 12, 6]), pipeline="prune"),
            [17, 14, 14, 9],
        ),
        (
            tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 14, 20, 9], [17, 16, 12, 6]), pipeline="merge"),
            [17, 16, 12, 6],
        ),
        (None, [17, 17, 17, 17]),
    ],
    ids=str,
)
def test_token_counts(make_vit, method, tokens_out):
    model = make_vit()
    if method is not None:
        tokcomp.compress(model, method)
    assert tokcomp.flops(model) == by_hand([17, *tokens_out[:-1]], tokens_out, 24, 64, 5)
    counts = [int(source.max()) + 1 for source in tokcomp.trace(model, torch.randn(2, 3, 32, 32))]
    assert counts == tokens_out


def test_heads(make_vit):
    from timm.models.deit import VisionTransformerDistilled

    plain = tokcomp.flops(make_vit())
    assert tokcomp.flops(make_vit(num_classes=0)) == plain - 24 * 5
    assert tokcomp.flops(make_vit(num_classes=0, cls=VisionTransformerDistilled)) == by_hand(
        [18] * 4, [18] * 4, 24, 64, 0
    )
    assert tokcomp.flops(make_vit(cls=VisionTransformerDistilled)) == by_hand([18] * 4, [18] * 4, 24, 64, 2 * 5)


@pytest.fixture
def hybrid():
    """A ViT on the feature map of a small ResNetV2: 64 x 64 pixels, 4 x 4 patches."""
    from functools import partial

    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    backbone = ResNetV2(
        layers=(1, 1), channels=(128, 256), num_classes=0, global_pool="", conv_layer=StdConv2dSame, stem_type="same"
    )
    embed = partial(HybridEmbed, backbone=backbone, proj=True)
    return VisionTransformer(
        img_size=64, patch_size=2, embed_dim=24, depth=4, num_heads=3, num_classes=5, embed_layer=embed
    ).eval()


def test_hybrid_counts_its_backbone(hybrid):
    """Every convolution's products, seen by hooks in a real run; the blocks as ever."""
    products = []

    def count(conv, _, out):
        products.append(conv.weight.numel() * out.shape[-2] * out.shape[-1])

    hooks = [part.register_forward_hook(count) for part in hybrid.modules() if isinstance(part, torch.nn.Conv2d)]
    hybrid(torch.randn(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    tokens = hybrid.patch_embed.num_patches + 1
    state = {name: value.clone() for name, value in hybrid.state_dict().items()}
    blocks = by_hand([tokens] * 4, [tokens] * 4, 24, 0, 5)
    assert len(products) > 5 and tokcomp.flops(hybrid) == sum(products) + blocks
    tokcomp.compress(hybrid, tokcomp.ToMe(2))
    left = [tokens - 2 * block for block in range(5)]
    assert tokcomp.flops(hybrid) == sum(products) + by_hand(left[:-1], left[1:], 24, 0, 5)
    assert all(torch.equal(value, state[name]) for name, value in hybrid.state_dict().items())


def test_hybrid_is_searched(hybrid):
    dense = tokcomp.flops(hybrid)
    search = tokcomp.DiffRateSearch(hybrid)
    logits, flops = search(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 5) and flops.item() <= dense
    flops.backward()
    assert search.merge[1].logits.grad is not None


def test_embedding_that_cannot_be_counted_is_refused_at_once(make_vit):
    class Own(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.proj, self.img_size, self.num_patches = inner.proj, inner.img_size, inner.num_patches

        def forward(self, x):
            if x.sum() > 0:  # asks for a value
                x = -x
            return self.proj(x).flatten(2).transpose(1, 2)

    model = make_vit()
    model.patch_embed = Own(model.patch_embed)
    for call in (tokcomp.flops, tokcomp.DiffRateSearch):
        with pytest.raises(
            tokcomp.UnsupportedModelError, match="multiply-adds of a Own are not known: it does not run"
        ):
            call(model)


def test_is_an_int_and_runs_nothing(make_vit):
    model = make_vit().to("meta")
    assert type(tokcomp.flops(model)) is int


def test_another_image_size(make_vit, meta_model):
    """As if the model were built for it; a hierarchical model's other stages grow along."""
    for method in (None, tokcomp.ToMe(3)):
        models = [make_vit(), make_vit(img_size=64), make_vit(img_size=(32, 64))]
        for model in models if method else ():
            tokcomp.compress(model, method)
        small, large, wide = models
        assert tokcomp.flops(small, img_size=64) == tokcomp.flops(small, (64, 64)) == tokcomp.flops(large)
        assert tokcomp.flops(small, img_size=(32, 64)) == tokcomp.flops(wide) != tokcomp.flops(small)
    model = meta_model("caformer_s18")
    plain = tokcomp.flops(model)
    assert tokcomp.flops(model, img_size=224) == plain
    large = meta_model("caformer_s18", pretrained_cfg_overlay={"input_size": (3, 384, 384)})
    assert tokcomp.flops(model, img_size=384) == tokcomp.flops(large) > 2.9 * plain
    hybrid, larger = (meta_model("vit_tiny_r_s16_p8_224", img_size=size) for size in (224, 384))
    assert tokcomp.flops(hybrid, img_size=384) == tokcomp.flops(larger) > 2.9 * tokcomp.flops(hybrid)


def test_image_sizes_that_are_refused(make_vit):
    model = make_vit()
    with pytest.raises(ValueError, match="whole patches of 8 x 8 pixels, got 36 x 36"):
        tokcomp.flops(model, img_size=36)
    for wrong in (0, -32, 32.0, (32,), (32, 32, 3), "32"):
        with pytest.raises(ValueError, match="img_size must be a number of pixels, or height and width, got"):
            tokcomp.flops(model, img_size=wrong)


def test_a_schedule_is_for_one_image_size(make_vit):
    model = make_vit(dynamic_img_size=True)
    tokcomp.compress(model, tokcomp.DiffRate(tokcomp.CompressionSchedule([17] * 4, [17, 9, 9, 9], num_tokens=17)))
    assert tokcomp.flops(model, img_size=32) == tokcomp.flops(model)
    with pytest.raises(ValueError, match=r"for the 65 tokens that enter block 0, got one for 17; schedule\.rescaled"):
        tokcomp.flops(model, img_size=64)
