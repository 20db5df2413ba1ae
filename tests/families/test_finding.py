"""Given something around a model, compress says what to pass; given a whole CLIP, it compresses the vision tower."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from torch import nn

from tests.families.table import FAMILIES


def test_a_wrapper_is_told_which_part_to_pass():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = nn.ModuleDict({"trunk": FAMILIES[0].build()})

    detector = Detector()
    for _ in range(2):
        with pytest.raises(
            tokcomp.UnsupportedModelError, match=r"it holds a VisionTransformer: pass model\.neck\.trunk"
        ):
            tokcomp.compress(detector, tokcomp.ToMe(2))
        tokcomp.compress(detector.neck.trunk, tokcomp.ToMe(2))

    class Pipeline:
        model = FAMILIES[0].build()

    with pytest.raises(TypeError, match=r"got Pipeline; pass its \.model, a VisionTransformer"):
        tokcomp.compress(Pipeline(), tokcomp.ToMe(2))


def test_the_vision_tower_of_a_transformers_clip():
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96)
    vision |= dict(image_size=32, patch_size=8)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    text |= dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 7, 1]])
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=images).logits_per_image
        compressed = tokcomp.compress(model, tokcomp.ToMe(3))(input_ids=ids, pixel_values=images).logits_per_image
        assert compressed.shape == before.shape and not torch.equal(compressed, before)
        assert model(input_ids=ids, pixel_values=images, return_dict=False)[0].shape == before.shape
        with pytest.raises(ValueError, match=r"output_attentions must be False, got True: .* use tokcomp\.trace"):
            model.vision_model(images, output_attentions=True)
        after = tokcomp.restore(model)(input_ids=ids, pixel_values=images).logits_per_image
    assert torch.equal(after, before)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"needs texts as well, .* pass model\.vision_model"):
        tokcomp.DiffRateSearch(model)


def test_gradients_reach_a_transformers_model_under_checkpointing():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
    )
    model = tokcomp.compress(transformers.ViTForImageClassification(config).train(), tokcomp.ToMe(3))
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(images, labels=labels).loss.backward()
        gradients.append(model.vit.layers[0].attention.q_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=float(gradients[0].abs().max()) * 1e-5)


@torch.no_grad()
def test_the_timm_trunk_of_an_open_clip_model():
    module = pytest.importorskip("open_clip.timm_model")
    model = module.TimmModel("test_vit", 20, image_size=160, pretrained=False).eval()
    images = torch.randn(1, 3, 160, 160)
    before = model(images)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"it holds a VisionTransformer: pass model\.trunk"):
        tokcomp.compress(model, tokcomp.ToMe(8))
    tokcomp.compress(model.trunk, tokcomp.ToMe(8))
    assert model(images).shape == before.shape and not torch.equal(model(images), before)
    tokcomp.restore(model.trunk)
    assert torch.equal(model(images), before)
