"""Feature maps of compressed models: every position has its token, or the value that it had when it was pruned."""

from __future__ import annotations

import pytest
import timm
import tokcomp
import torch
from tokcomp.adapters import find_adapter

from tests.families.table import FAMILIES
from tests.families.test_families import diffrate, images_for

#: CAFormer's maps are whole grids at the ends of its stages; tests/dense reads them.
ROWS = [family for family in FAMILIES if family.library in ("timm", "transformers") and family.name != "CAFormer"]


def maps_of(model, images):
    """Tokens [B, N, C] of every position after each block."""
    if hasattr(model, "forward_intermediates"):
        options = {"return_prefix_tokens": model.num_prefix_tokens > 0, "output_fmt": "NLC", "intermediates_only": True}
        maps = model.forward_intermediates(images, **options)
        return [one if isinstance(one, torch.Tensor) else torch.cat(one[::-1], dim=1) for one in maps]
    return list(model(images, output_hidden_states=True).hidden_states[1:])


@torch.no_grad()
@pytest.mark.parametrize("family", ROWS, ids=[f"{one.library}: {one.name}" for one in ROWS])
def test_every_position_has_its_token(family):
    if family.missing:
        pytest.skip(family.missing)
    model = family.build().double()
    adapter, images = find_adapter(model), images_for(model, torch.float64)
    plain = maps_of(model, images)
    for ours, theirs in zip(maps_of(tokcomp.compress(model, tokcomp.ToMe(0)), images), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
    tokcomp.compress(model, diffrate(model))
    maps, slots = maps_of(model, images), tokcomp.trace(model, images)
    assert [one.shape for one in maps] == [one.shape for one in plain]
    before = None
    for now, slot in zip(maps, slots, strict=True):
        same = slot.unsqueeze(2) == slot.unsqueeze(1)  # [B, N, N]
        first = same.to(torch.uint8).argmax(2)[..., None].expand_as(now)
        assert torch.equal(now[slot >= 0], now.gather(1, first)[slot >= 0])
        if before is not None:
            assert torch.equal(now[slot < 0], before[slot < 0])
        before = now
    tokens, _ = adapter.tower(model).traced(None, images)
    assert torch.equal(tokcomp.uncompress(tokens, slots[-1], fill=maps[-1]), maps[-1])


@torch.no_grad()
def test_timm_s_ways_to_ask_for_feature_maps():
    """features_only, DINOv2's get_intermediate_layers, a dictionary, and stopping early."""
    model = FAMILIES[0].build()
    images, method = images_for(model), tokcomp.ToMe(2)
    tokcomp.compress(model, method)
    final, maps = model.forward_intermediates(images, [1, 3], norm=True)
    assert final.shape == (2, 17, 48) and [one.shape for one in maps] == [(2, 48, 4, 4)] * 2
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), final[:, 1:])
    asked = model.forward_intermediates(images, [1, 3], norm=True, output_dict=True, return_prefix_tokens=True)
    assert torch.equal(asked["image_intermediates"][0], maps[0]) and torch.equal(asked["image_features"], final)
    assert torch.equal(asked["image_intermediates_prefix"][1], final[:, :1])
    assert torch.equal(model.get_intermediate_layers(images, 1, reshape=True, norm=True)[0], maps[1])
    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    early = model.forward_intermediates(images, [1], stop_early=True, norm=True, intermediates_only=True)
    assert not ran
    torch.testing.assert_close(early[0], maps[0])  # what is watched by hooks is not fused
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(images, output_fmt="NHWC")

    extractor = timm.create_model("test_vit", features_only=True, out_indices=(1, 3)).eval()
    images = torch.randn(1, 3, 160, 160)
    plain = extractor(images)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"pass model\.model"):
        tokcomp.compress(extractor, method)
    tokcomp.compress(extractor.model, method)
    assert [one.shape for one in extractor(images)] == [one.shape for one in plain]


def test_uncompress_says_what_is_wrong():
    source = torch.tensor([[0, 1, 1, -1]])
    x = torch.randn(1, 2, 3)
    assert torch.equal(tokcomp.uncompress(x, source), torch.cat((x, x[:, 1:], torch.zeros(1, 1, 3)), dim=1))
    with pytest.raises(TypeError, match="features must be a tensor, got list"):
        tokcomp.uncompress([1.0], source)


@torch.no_grad()
def test_llava_takes_a_hidden_state_of_a_compressed_tower():
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=96)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=63,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    images, ids = torch.randn(1, 3, 32, 32), torch.tensor([[1, *[63] * 16, 5]])
    plain = model(input_ids=ids, pixel_values=images).logits
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"a CLIPVisionModel: pass model\.model\.vision_tower"):
        tokcomp.compress(model, tokcomp.ToMe(3))
    tower = tokcomp.compress(model.model.vision_tower, tokcomp.ToMe(0))
    torch.testing.assert_close(model(input_ids=ids, pixel_values=images).logits, plain)
    tokcomp.compress(tower, tokcomp.ToMe(3))
    assert model(input_ids=ids, pixel_values=images).logits.shape == plain.shape
    hidden = tower(images, output_hidden_states=[-2, 0]).hidden_states
    assert [one is not None for one in hidden] == [True, False, False, True, False]
    assert torch.equal(hidden[3], tower(images, output_hidden_states=True).hidden_states[-2])
