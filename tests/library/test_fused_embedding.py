"""Images that enter a model with positions and first norm in one pass: the same tokens, and only where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import tokcomp
import torch
from tokcomp.adapters.timm_vit import entry, fast
from tokcomp.fastpath import PlainWeights, fused_embedding
from tokcomp.fastpath.plain import FUSED_EMBEDDING

CPU = torch.device("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv(FUSED_EMBEDDING, "1")
    fused_embedding.cache_clear()
    yield monkeypatch
    fused_embedding.cache_clear()


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    model = timm.models.VisionTransformer(**{**sizes, **options}).eval()
    torch.nn.init.normal_(model.pos_embed)
    return tokcomp.compress(model, tokcomp.ToMe(r=2))


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}, {"qkv_bias": False}], ids=str
)
def test_tokens_are_the_same_and_normalised_once(options: dict[str, Any], asked: pytest.MonkeyPatch) -> None:
    model, images = make(**options), torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        products = fast.products_of(model, images)
        found = entry.embed_normed(model, images, products)
        assert found is not None
        x, normalized = found
        proj = model.patch_embed.proj
        sums = torch.nn.functional.conv2d(images.abs(), proj.weight.abs(), proj.bias.abs(), stride=8).amax()
        # Both add up 192 products, the bias and the position in float32, in orders of their own.
        lost = 2 * 195 * 2**-24 * float(sums + model.pos_embed.abs().amax())
        torch.testing.assert_close(x, model.embed(images, products)[0], rtol=0, atol=lost)
        # Both sum 32 channels in float32: mean and variance lose some units each, and the quotient keeps their ratio.
        torch.testing.assert_close(normalized, model.blocks[0].norm1(x), rtol=1e-5, atol=2e-6)
        have = model(images)
        asked.setenv(FUSED_EMBEDDING, "0")
        fused_embedding.cache_clear()
        torch.testing.assert_close(have, model(images), rtol=1e-4, atol=1e-5)


def test_products_on_cuda_take_the_convolution_too() -> None:
    model = make()
    conv, images = model.patch_embed.proj, torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        patches = fast.embed_patches(model.patch_embed, images, PlainWeights([conv], torch.float32))
        torch.testing.assert_close(patches, model.patch_embed(images), rtol=1e-5, atol=1e-5)


def test_what_is_not_known_enters_step_by_step(asked: pytest.MonkeyPatch) -> None:
    images = torch.randn(1, 3, 32, 32)
    watched, other = make(), make()
    watched.norm_pre.register_forward_hook(lambda *_: None)
    other.blocks[0].norm1 = torch.nn.Identity()
    models = [watched, other, make(no_embed_class=True), make(pre_norm=True)]
    with torch.inference_mode():
        for model in models:
            products = fast.products_of(model, images)
            assert products is None or entry.embed_normed(model, images, products) is None
            assert model(images).isfinite().all()
        half = images.half()
        assert entry.embed_normed(make(), half, PlainWeights([], torch.float32)) is None


def test_the_switch(asked: pytest.MonkeyPatch) -> None:
    assert fused_embedding(CPU)
    asked.delenv(FUSED_EMBEDDING)
    fused_embedding.cache_clear()
    assert not fused_embedding(CPU) and not fused_embedding(torch.device("cuda"))  # no GPU has measured it
    asked.setenv(FUSED_EMBEDDING, "on")
    fused_embedding.cache_clear()
    with pytest.raises(ValueError, match="TOKCOMP_FUSED_EMBEDDING must be 0 or 1, got 'on'"):
        fused_embedding(CPU)
