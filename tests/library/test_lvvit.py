"""LV-ViT: the paper's arithmetic, the published checkpoints' names, and a head that reads the patches that are left."""

from __future__ import annotations

import pytest
import timm
import tokcomp
import torch
from tokcomp.lvvit import LVViT
from torch.nn import functional as F

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, stem_width=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LVViT(**TINY, skip_lam=2.0).eval().double()
    with torch.no_grad():
        for parameter in (*model.parameters(), *(one for one in model.buffers() if one.is_floating_point())):
            parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.2)
    return model


IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plainly(state, images, depth=3, heads=2, skip=2.0):
    """The paper's formulas on a state_dict."""

    def part(name, suffix="weight"):
        return state.get(f"{name}.{suffix}")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], part(name), part(name, "bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, part(name), part(name, "bias"))

    x = images
    for index, padding in ((1, 3), (2, 1), (3, 1)):
        x = F.conv2d(x, part(f"patch_embed.conv{index}"), stride=2 if index == 1 else 1, padding=padding)
        running = [part(f"patch_embed.bn{index}", name) for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *running, eps=1e-5))
    x = F.conv2d(x, part("patch_embed.proj"), part("patch_embed.proj", "bias"), stride=4)
    x = torch.cat((state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)), 1) + state["pos_embed"]
    for block in (f"blocks.{index}" for index in range(depth)):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").unflatten(-1, (3, heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + linear(out.transpose(1, 2).flatten(2), f"{block}.attn.proj") / skip
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2") / skip
    x = norm(x, "norm")
    return linear(x[:, 0], "head") + 0.5 * linear(x[:, 1:], "aux_head").amax(1)


@torch.no_grad()
def test_it_computes_the_paper_s_formulas(model):
    expected = plainly(model.state_dict(), IMAGES)
    for ours in (model(IMAGES), tokcomp.compress(model, tokcomp.ToMe(0))(IMAGES)):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@torch.no_grad()
def test_the_fast_path_scales_residuals(model):
    expected = plainly(model.state_dict(), IMAGES)
    model.float()
    ours = tokcomp.compress(model, tokcomp.ToMe(0))(IMAGES.float())
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_the_patches_that_are_left_are_scored(model):
    counts = [[17, 9, 9], [17, 17, 6]]
    tokcomp.compress(model, tokcomp.DiffRate(tokcomp.CompressionSchedule(*counts), pipeline="prune"))
    tokens = model.forward_features(IMAGES)
    assert tokens.shape[1] == 9
    logits, of_patches = model.token_logits(tokens)
    torch.testing.assert_close(model(IMAGES), logits + 0.5 * of_patches.max(1).values)


def test_lvvit_s_has_the_published_size_and_names():
    model = timm.create_model("lvvit_s")
    assert round(tokcomp.flops(model) / 1e9, 1) == 6.6
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 26.15
    names = ["cls_token", "pos_embed"]
    names += [f"patch_embed.{conv}.weight" for conv in ("conv1", "conv2", "conv3", "proj")] + ["patch_embed.proj.bias"]
    kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names += [f"patch_embed.bn{index}.{kind}" for index in (1, 2, 3) for kind in kinds]
    layers = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for block in (f"blocks.{index}" for index in range(16)):
        names += [f"{block}.attn.qkv.weight", *(f"{block}.{one}.{kind}" for one in layers for kind in kinds[:2])]
    names += [f"{one}.{kind}" for one in ("norm", "head", "aux_head") for kind in kinds[:2]]
    assert set(names) == set(model.state_dict())


@torch.no_grad()
def test_a_checkpoint_as_published_loads_at_another_size_too(tmp_path, model):
    torch.save({"state_dict": model.state_dict()}, tmp_path / "lvvit.pth.tar")
    options = {**TINY, "skip_lam": 2.0, "pretrained": True}
    options["pretrained_cfg_overlay"] = {"file": str(tmp_path / "lvvit.pth.tar"), "num_classes": 5}
    loaded = timm.create_model("lvvit_t", **options).eval().double()
    torch.testing.assert_close(loaded(IMAGES), model.float().double()(IMAGES))
    larger = timm.create_model("lvvit_t", **{**options, "img_size": 48}).eval().double()
    assert larger(torch.zeros(1, 3, 48, 48).double()).shape == (1, 5)


def test_what_it_refuses(model):
    with pytest.raises(ValueError, match=r"global_pool must be 'token', .* got 'avg'"):
        LVViT(**TINY, global_pool="avg")
    with pytest.raises(ValueError, match=r"global_pool must be 'token', .* got 'max'"):
        model.reset_classifier(3, "max")
    with pytest.raises(ValueError, match="images must be 32 x 32, got 40 x 32"):
        model(torch.zeros(1, 3, 40, 32).double())
    model.reset_classifier(3)
    assert model(IMAGES).shape == (2, 3)
    assert isinstance(LVViT(**TINY | {"num_classes": 0}).aux_head, torch.nn.Identity)
