"""Every kind of timm VisionTransformer that the adapter takes, against an explicit float64 forward pass."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import tokcomp
import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokcomp_kernels.reference.prune_merge import prune_merge_reference
from tokcomp_kernels.reference.tome_merge import tome_merge_reference

# 4 blocks of 16 patches; prefix tokens come on top.
PRUNE, MERGE = [17, 15, 12, 11], [17, 13, 12, 8]
DIFFRATE = tokcomp.DiffRate(tokcomp.CompressionSchedule(PRUNE, MERGE))
TOME = tokcomp.ToMe(2)

FAMILIES = {
    "class token": {},
    "registers": dict(reg_tokens=4),
    "registers, no class position": dict(reg_tokens=2, no_embed_class=True),
    "no class position": dict(no_embed_class=True),
    "average": dict(global_pool="avg"),
    "average, prefix included": dict(global_pool="avg", pool_include_prefix=True),
    "average and max": dict(global_pool="avgmax"),
    "max": dict(global_pool="max"),
    "average, final norm before": dict(global_pool="avg", fc_norm=False),
    "class token, norm after": dict(fc_norm=True),
    "map": dict(global_pool="map"),
    "no pooling": dict(global_pool=""),
    "no head": dict(num_classes=0),
    "layer scale": dict(init_values=0.3),
    "qk norm": dict(qk_norm=True),
    "qk norm, rms": dict(qk_norm=True, norm_layer=RmsNorm),
    "attention and mlp norms": dict(scale_attn_norm=True, scale_mlp_norm=True),
    "pre norm": dict(pre_norm=True),
    "no final norm": dict(final_norm=False),
    "no qkv bias": dict(qkv_bias=False, proj_bias=False),
    "no positions": dict(pos_embed="none"),
    "swiglu": dict(mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "swiglu packed": dict(mlp_layer=SwiGLUPacked, mlp_ratio=2.0),
    "quick gelu": dict(act_layer="quick_gelu"),
    "tanh gelu": dict(act_layer=partial(nn.GELU, approximate="tanh")),
    "odd grid": dict(img_size=(24, 40)),
    "big patches, one channel": dict(img_size=(40, 32), patch_size=(10, 8), in_chans=1),
    "distilled": dict(cls=VisionTransformerDistilled),
    "distilled, no head": dict(cls=VisionTransformerDistilled, num_classes=0),
}
CLASSLESS = {
    "map, no class token": dict(global_pool="map", class_token=False),
    "no class token": dict(class_token=False, global_pool="avg"),
    "registers alone": dict(class_token=False, reg_tokens=1, global_pool="avg", no_embed_class=True),
}


def images_for(model, batch=3):
    size = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size, generator=generator, dtype=torch.float64)


def oracle(model, images, reduce):
    """Every step spelled out, the attention map held; the head by its own modules, with size-weighted pooling."""
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size = None
        for index, block in enumerate(model.blocks):
            attn = block.attn
            batch, tokens, _ = x.shape
            qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = attn.q_norm(q), attn.k_norm(k)
            scores = q @ k.transpose(-1, -2) * attn.scale
            probabilities = (scores if size is None else scores + size.log()[:, None, None]).softmax(-1)
            out = (probabilities @ v).transpose(1, 2).flatten(2)
            x = x + block.ls1(attn.proj(getattr(attn, "norm", nn.Identity())(out)))
            x, size = reduce(index, x, size, probabilities, k, prefix)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = model.norm(x)
        if isinstance(model, VisionTransformerDistilled):
            return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
        if model.global_pool == "":
            return model.head(model.fc_norm(x))
        if model.global_pool == "token":
            return model.head(model.fc_norm(x[:, 0]))
        weight = torch.ones_like(x[:, :, 0]) if size is None else size
        start = 0 if getattr(model, "pool_include_prefix", False) else prefix
        x, weight = x[:, start:], weight[:, start:, None]
        mean = (x * weight).sum(1) / weight.sum(1)
        if model.global_pool == "map":
            pooled = pool_with_counts(model.attn_pool, x, weight)
        else:
            pooled = {"avg": mean, "max": x.amax(1), "avgmax": 0.5 * (mean + x.amax(1))}[model.global_pool]
        return model.head(model.fc_norm(pooled))


def pool_with_counts(pool, x, weight):
    """Attention pooling in which a token of weight w counts w times."""
    batch, tokens, width = x.shape
    k, v = pool.kv(x).reshape(batch, tokens, 2, pool.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q = pool.q(pool.latent).reshape(1, 1, pool.num_heads, -1).transpose(1, 2)
    e = (q @ k.transpose(-1, -2) * pool.scale).exp() * weight.transpose(1, 2)[:, None]  # [B, H, 1, N]
    out = (e / e.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(batch, 1, width)
    out = pool.proj(out)
    return (out + pool.mlp(pool.norm(out)))[:, 0]


def diffrate(index, x, size, attn, k, prefix):
    if min(PRUNE[index], MERGE[index]) >= x.shape[1]:
        return x, size
    importance = attn[:, :, 0].mean(1)
    return prune_merge_reference(x, importance, PRUNE[index], MERGE[index], size=size, num_prefix_tokens=prefix)[:2]


def tome(index, x, size, attn, k, prefix):
    return tome_merge_reference(x, k.mean(1), 2, size=size, num_prefix_tokens=prefix)[:2]


def assert_matches(model, method, reduce):
    images = images_for(model)
    expected = oracle(model, images, reduce)
    tokcomp.compress(model, method)
    ours = model(images)
    assert torch.isfinite(expected).all()
    # Two float64 passes of a few hundred operations each, on outputs of order 1.
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)
    features = model.forward_features(images)
    torch.testing.assert_close(model.forward_head(features), ours, atol=1e-12, rtol=0)
    with torch.no_grad():  # the fast path, where there is one for the model, in float32 and bfloat16
        model.float()
        torch.testing.assert_close(model(images.float()).double(), expected, atol=5e-4, rtol=0)
        tokcomp.restore(model)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_diffrate(make_vit, family):
    assert_matches(make_vit(**FAMILIES[family]).double(), DIFFRATE, diffrate)


@pytest.mark.parametrize("family", FAMILIES | CLASSLESS)
def test_tome(make_vit, family):
    assert_matches(make_vit(**(FAMILIES | CLASSLESS)[family]).double(), TOME, tome)


@pytest.mark.parametrize("family", CLASSLESS)
def test_without_a_class_token_the_attention_received_ranks(make_vit, family):
    model = make_vit(**CLASSLESS[family]).double()

    def reduce(index, x, size, attn, k, prefix):
        if min(PRUNE[index], MERGE[index]) >= x.shape[1]:
            return x, size
        counts = PRUNE[index], MERGE[index]
        return prune_merge_reference(x, attn.mean((1, 2)), *counts, size=size, num_prefix_tokens=prefix)[:2]

    expected = assert_matches(model, DIFFRATE, reduce)
    asked_for = tokcomp.compress(model.double(), tokcomp.DiffRate(DIFFRATE.schedule, metric="image_attn"))
    torch.testing.assert_close(asked_for(images_for(model)), expected, atol=1e-6, rtol=0)  # weights rounded to float32


@pytest.mark.parametrize("family", CLASSLESS)
def test_evit_without_a_class_token(make_vit, family):
    def reduce(index, x, size, attn, k, prefix):
        received = attn.mean((1, 2))
        kept, _, source = prune_merge_reference(x, received, x.shape[1] - 3, x.shape[1] - 3, num_prefix_tokens=prefix)
        fused = (received * (source < 0)).unsqueeze(1) @ x
        return torch.cat([kept, fused], 1), None

    assert_matches(make_vit(**CLASSLESS[family]).double(), tokcomp.EViT(num_pruned=3), reduce)


@pytest.mark.parametrize("family", FAMILIES | CLASSLESS)
def test_compressing_nothing_is_timm(make_vit, family):
    model = make_vit(**(FAMILIES | CLASSLESS)[family])
    images = images_for(model).float()
    with torch.no_grad():
        expected = model(images)
        ours = tokcomp.compress(model, tokcomp.ToMe(0))(images)
    # The same sums in another order: a few float32 roundings of outputs of order 1, more after a max.
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_are_never_touched(make_vit, family):
    model = make_vit(**FAMILIES[family])
    prefix = model.num_prefix_tokens
    methods = [DIFFRATE, tokcomp.ToMe(100), tokcomp.EViT(num_pruned=5), tokcomp.DiffRate(DIFFRATE.schedule, "random")]
    for method in methods:
        for source in tokcomp.trace(tokcomp.compress(model, method), images_for(model).float()):
            assert torch.equal(source[:, :prefix], torch.arange(prefix).expand(3, -1))
            assert not (source[:, prefix:].unsqueeze(-1) == torch.arange(prefix)).any()


def test_distilled_training_returns_both_heads(make_vit):
    model = make_vit(cls=VisionTransformerDistilled)
    images = images_for(model).float()
    tokcomp.compress(model, DIFFRATE)
    average = model(images)
    model.set_distilled_training(True)
    model.train()
    head, head_dist = model(images)
    torch.testing.assert_close((head + head_dist) / 2, average, atol=2e-5, rtol=0)


def test_any_image_size(make_vit):
    model = make_vit(dynamic_img_size=True)
    tokcomp.compress(model, tokcomp.ToMe(2))
    for height, width in ((32, 32), (48, 24), (64, 64)):
        patches = height * width // 64
        images = torch.randn(2, 3, height, width)
        maps = tokcomp.trace(model, images)
        assert maps[-1].shape == (2, patches + 1) and maps[-1].max() == patches - 2 * 4
        with torch.no_grad():
            fast = model(images)
        torch.testing.assert_close(fast, model(images), atol=2e-5, rtol=0)


@pytest.mark.skipif(not hasattr(VisionTransformer, "set_input_size"), reason="this timm has no set_input_size")
def test_set_input_size_after_compression(make_vit):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        before = tokcomp.flops(model)
        model.set_input_size((48, 48))
        assert model(torch.randn(2, 3, 48, 48)).shape == (2, 5)
    assert tokcomp.flops(model) > before
    assert tokcomp.trace(model, torch.randn(2, 3, 48, 48))[0].shape == (2, 37)


def test_reset_classifier_after_compression(make_vit):
    model = tokcomp.compress(make_vit(), DIFFRATE)
    model.reset_classifier(7, global_pool="avg")
    images = images_for(model).float()
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (3, 7)
    assert torch.equal(tokcomp.compress(model, DIFFRATE)(images).detach().argmax(1), logits.argmax(1))


def test_pooling_without_sizes_is_refused(make_vit):
    model = tokcomp.compress(make_vit(global_pool="avg"), DIFFRATE)
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match="global_pool='avg' needs the tokens' sizes"):
        model.forward_head(features.clone())


def test_pooling_that_is_not_understood_is_refused(make_vit):
    try:
        model = make_vit(global_pool="prr")
    except AssertionError:
        pytest.skip(f"timm {timm.__version__} has no global_pool='prr'")
    with pytest.raises(tokcomp.UnsupportedModelError, match="global_pool='prr' cannot be compressed"):
        tokcomp.compress(model, DIFFRATE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_tiny_patch16_224",
        "vit_base_patch16_224.mae",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch32_clip_224",
        "vit_base_patch16_siglip_224",
        "vit_medium_patch16_reg4_gap_256",
        "vit_little_patch16_reg4_gap_256",
        "flexivit_small",
        "vit_small_resnet26d_224",
    ],
)
def test_timm_models(meta_model, name):
    """Real architectures at their own size, on the meta device: understood, compressed, restored."""
    model = meta_model(name)
    images = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    assert tokcomp.compress(model, tokcomp.ToMe(4))(images).shape == model(images).shape
    assert isinstance(model, VisionTransformer)
    tokcomp.restore(model)
    assert type(model) in (VisionTransformer, VisionTransformerDistilled)
