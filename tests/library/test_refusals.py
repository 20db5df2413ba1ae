"""What is not understood is refused by name and left unchanged."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def test_block_cannot_run_on_its_own(make_vit, methods, images_for):
    model = tokcomp.compress(make_vit(), methods["tome"])
    with pytest.raises(RuntimeError, match=r"call the model, or tokcomp\.restore"):
        model.blocks[0](torch.randn(1, 17, 24))
    with pytest.raises(RuntimeError, match="no intermediate feature maps"):
        model.forward_intermediates(images_for(model))
    with pytest.raises(RuntimeError, match="no intermediate feature maps"):
        model.get_intermediate_layers(images_for(model))
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        model(images_for(model), attn_mask=torch.ones(17, 17))


UNSUPPORTED = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_atto": "ConvNeXt",
    "resnet10t": "ResNet",
    "eva02_tiny_patch14_224": "Eva",
    "beit_base_patch16_224": "Beit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_small_patch16_36x1_224": None,
    "cait_xxs24_224": "Cait",
    "convformer_s18": "SepConv",
    "poolformer_s12": "Pooling",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_are_not_understood_are_refused_by_name(meta_model, name):
    model = meta_model(name)
    classes = [type(module) for module in model.modules()]
    if UNSUPPORTED[name] is None:
        assert tokcomp.compress(model, tokcomp.ToMe(4)) is model
        return
    for call in (lambda: tokcomp.compress(model, tokcomp.ToMe(4)), lambda: tokcomp.flops(model)):
        with pytest.raises(tokcomp.UnsupportedModelError, match=UNSUPPORTED[name]):
            call()
    assert [type(module) for module in model.modules()] == classes


def test_modules_that_are_not_understood_are_refused_by_name(make_vit, methods):
    class OwnAttention(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, **kwargs):
            return self.inner(x, **kwargs)

    class OwnModel(VisionTransformer):
        def forward_features(self, x, **kwargs):
            return super().forward_features(x, **kwargs) * 2

    model = make_vit()
    model.blocks[2].attn = OwnAttention(model.blocks[2].attn)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.2\.attn: OwnAttention cannot be compressed"):
        tokcomp.compress(model, methods["tome"])
    assert type(model) is VisionTransformer and type(model.blocks[0]).__name__ == "Block"

    with pytest.raises(tokcomp.UnsupportedModelError, match="OwnModel cannot be compressed: it has a forward_features"):
        tokcomp.compress(make_vit(cls=OwnModel), methods["tome"])

    model = make_vit()
    model.blocks[1].forward = lambda x: x
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.1: Block cannot be compressed"):
        tokcomp.compress(model, methods["tome"])

    model = make_vit()
    model.blocks[3].mlp.fc1 = nn.Conv1d(24, 96, 3)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.3\.mlp\.fc1: a Conv1d mixes tokens"):
        tokcomp.compress(model, methods["tome"])


def test_subclass_that_overrides_nothing_is_understood(make_vit, methods):
    class Named(VisionTransformer):
        pass

    model = tokcomp.compress(make_vit(cls=Named), methods["tome"])
    assert isinstance(model, Named)
    assert type(tokcomp.restore(model)) is Named


def test_wrappers_are_refused_with_advice(make_vit, methods):
    model = make_vit()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(tokcomp.UnsupportedModelError, match="wraps a VisionTransformer: compress that first"):
            tokcomp.compress(wrapped, methods["tome"])


def test_arguments_of_the_wrong_kind(make_vit, methods):
    with pytest.raises(TypeError, match="method must be a DiffRate, ToMe, EViT or other Method object, got int"):
        tokcomp.compress(make_vit(), 8)
    with pytest.raises(TypeError, match="got the class ToMe"):
        tokcomp.compress(make_vit(), tokcomp.ToMe)
    for call in (tokcomp.restore, tokcomp.flops):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            call("deit_small_patch16_224")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        tokcomp.compress("deit_small_patch16_224", methods["tome"])
