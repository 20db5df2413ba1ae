"""timm's NaFlexViT on images of any size, and on padded batches of images of different sizes."""

from __future__ import annotations

from functools import partial

import pytest
import tokcomp
import torch
from tokcomp.cost import flops_by_image

from tests.families.table import Family, _naflex

GRIDS = [(4, 4), (3, 5), (2, 8), (6, 5), (5, 3)]
#: Every kind of pooling, of position embeddings and of rotary places.
MODELS = {
    "attention pooling": dict(
        global_pool="map", pool_include_prefix=True, class_token=True, use_key_only_attn_mask=True
    ),
    "mean, factorised positions": dict(global_pool="avg", reg_tokens=4, pos_embed="factorized"),
    "mean and largest, sampled positions": dict(global_pool="avgmax", pos_embed_use_grid_sample=True),
    "axial rotary places": dict(global_pool="token", class_token=True, rope_type="axial", rope_ref_feat_shape=(4, 4)),
    "learnt rotary places": dict(global_pool="token", class_token=True, rope_type="mixed"),
}


def build(name):
    return Family(name, "timm", "", partial(_naflex, **MODELS[name])).build().double()


def batch_of(grids, length):
    """As timm's collator makes it, but for NaN in the padding, which nothing may read."""
    patches = torch.randn(len(grids), length, 192, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    coord, valid = torch.zeros(len(grids), length, 2, dtype=torch.int64), torch.zeros(len(grids), length).bool()
    for image, (rows, columns) in enumerate(grids):
        coord[image, : rows * columns] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[image, : rows * columns] = True
    return {"patches": patches.masked_fill(~valid[..., None], float("nan")), "patch_coord": coord, "patch_valid": valid}


def alone(batch):
    """Each image as a batch of its own, without padding."""
    counts = batch["patch_valid"].sum(1).tolist()
    return [{name: one[i : i + 1, :count] for name, one in batch.items()} for i, count in enumerate(counts)]


def methods_for(model):
    prefix = model.num_prefix_tokens
    counts = [prefix + kept for kept in (16, 14, 9, 8)]
    schedule = tokcomp.CompressionSchedule(counts, counts, num_tokens=16 + prefix, num_prefix_tokens=prefix)
    methods = [tokcomp.DiffRate(schedule), tokcomp.ToMe(2), tokcomp.EViT(0.6, blocks=(1, 2)), tokcomp.DToMe(0.3)]
    return methods + ([tokcomp.EvoViT(0.5, [1])] if model.has_class_token else [])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_an_image_s_answers_are_those_that_it_has_alone(name):
    model, batch = build(name), batch_of(GRIDS, 33)
    state = {key: one.clone() for key, one in model.state_dict().items()}
    padded = {**batch, "patches": batch["patches"].nan_to_num(0)}
    plain, parts = model(padded), alone(batch)
    # Angles are float32's in timm.
    torch.testing.assert_close(tokcomp.compress(model, tokcomp.ToMe(0))(batch), plain, rtol=0, atol=1e-6)
    for method in methods_for(model):
        tokcomp.compress(model, method)
        ours = model(batch)
        torch.testing.assert_close(ours, torch.cat([model(one) for one in parts]), rtol=0, atol=1e-12)
        features = model.forward_features(batch["patches"], batch["patch_coord"], batch["patch_valid"])
        torch.testing.assert_close(model.forward_head(**features), ours, rtol=0, atol=1e-12)
        assert torch.equal(flops_by_image(model, batch), torch.cat([flops_by_image(model, one) for one in parts]))
        maps = model.forward_intermediates(batch, output_fmt="NLC", output_dict=True)
        assert torch.equal(maps["patch_valid"], batch["patch_valid"])
        traced = tokcomp.trace(model, batch)
        for image, one in enumerate(parts):
            own = one["patches"].shape[1] + model.num_prefix_tokens
            for have, want in zip(traced, tokcomp.trace(model, one), strict=True):
                assert torch.equal(have[image, :own], want[0]) and (have[image, own:] == -1).all()
            want = model.forward_intermediates(one, [2], output_fmt="NLC", intermediates_only=True)[0][0]
            have = maps["image_intermediates"][2][image]
            torch.testing.assert_close(have[: len(want)], want, rtol=0, atol=1e-12)
            assert not have[len(want) :].any()
    assert torch.equal(tokcomp.restore(model)(padded), plain)
    assert all(torch.equal(one, state[key]) for key, one in model.state_dict().items())
    maps = tokcomp.trace(model, padded)
    assert [int(one) for one in (maps[-1] >= 0).sum(1) - model.num_prefix_tokens] == [h * w for h, w in GRIDS]
    assert tokcomp.flops(model, images=padded) == round(flops_by_image(model, padded).mean().item())


@torch.no_grad()
def test_shares_of_a_schedule_and_gradients():
    model, batch = build("attention pooling"), batch_of([(4, 4), (4, 8)], 40)
    counts = [17, 13, 9, 5]
    schedule = tokcomp.CompressionSchedule(counts, counts, num_tokens=17)
    left = [one.amax(1) for one in tokcomp.trace(tokcomp.compress(model, tokcomp.DiffRate(schedule)), batch)]
    assert torch.stack(left, 1).tolist() == [[16, 12, 8, 4], [32, 24, 16, 8]]
    assert tokcomp.flops(model, images=alone(batch)[0]) == tokcomp.flops(model, 32)
    assert model({name: one[:0] for name, one in batch.items()}).shape == (0, 5)
    with torch.enable_grad():
        patches = batch["patches"].requires_grad_()
        model(batch)[1].sum().backward()
    assert not patches.grad[0].any() and not patches.grad[1, 32:].any() and patches.grad[1, :32].all()
    schedule.num_tokens = None
    with pytest.raises(ValueError, match="the schedule must know its num_tokens to be rescaled, got None"):
        tokcomp.compress(model, tokcomp.DiffRate(schedule))(batch)
    tokcomp.compress(model, tokcomp.VisionZip(num_kept=20, blocks=(1,)))
    with pytest.raises(ValueError, match="num_kept must be at most the 16 patch tokens left in block 1, got 20"):
        model(batch)


@torch.no_grad()
def test_images_of_any_size():
    model = build("mean, factorised positions").float()
    for height, width in ((32, 40), (64, 24)):
        images = torch.randn(2, 3, height, width)
        plain = tokcomp.restore(model)(images)
        torch.testing.assert_close(tokcomp.compress(model, tokcomp.ToMe(0))(images), plain, rtol=0, atol=1e-5)
        maps = tokcomp.compress(model, tokcomp.ToMe(3)).forward_intermediates(images, [3], intermediates_only=True)
        assert maps[0].shape == (2, 48, height // 8, width // 8)
        assert tokcomp.trace(model, images)[-1].max() == (height // 8) * (width // 8) + model.num_prefix_tokens - 13


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(patch_coord=None), "must have patches, patch_coord and patch_valid, got no patch_coord"),
        (dict(patch_valid=None), "must have patches, patch_coord and patch_valid, got no patch_valid"),
        (dict(attn_mask=torch.zeros(1)), "attn_mask and is_causal cannot be used with a compressed model"),
        (dict(patch_valid=torch.zeros(5, 33)), "mark at least one patch of every image .*, got none in image 0"),
        (dict(patch_valid=torch.eye(33)[3:8]), "got padding before a patch in image 0"),
        (dict(patch_valid=torch.ones(5, 33)), "span as many patches as patch_valid marks, got 16 for 33 in image 0"),
        (dict(patch_valid=torch.ones(5, 32)), r"patch_valid must be \[5, 33\], one for each patch, got \[5, 32\]"),
        (dict(patch_coord=torch.zeros(5, 33, 2)), r"whole numbers \[5, 33, 2\] .*, got float32 \[5, 33, 2\]"),
        (dict(patches=torch.zeros(5, 33, 64)), r"patches must hold 192 values each, got a tensor \[5, 33, 64\]"),
        (dict(patches=torch.zeros(5, 3, 32, 32)), r"patches must be \[B, P, patch \* patch \* C\] or .*, got \[5, 3,"),
    ],
    ids=str,
)
def test_wrong_batches_are_refused(changed, message):
    model = tokcomp.compress(build("attention pooling"), tokcomp.ToMe(2))
    batch = {**batch_of(GRIDS, 33), **changed}
    with pytest.raises(ValueError, match=message):
        model(batch)
    if "patch_coord" not in changed:
        with pytest.raises(ValueError, match="patch_valid must come with|" + message):
            model(*(batch[name] for name in ("patches", "patch_coord", "patch_valid")), batch.get("attn_mask"))


def test_what_else_is_refused():
    model, batch = tokcomp.compress(build("attention pooling"), tokcomp.ToMe(2)), batch_of(GRIDS, 33)
    with pytest.raises(ValueError, match="output_fmt must be 'NLC' for a batch of patches, whose grids differ, got"):
        model.forward_intermediates(batch)
    with pytest.raises(ValueError, match="patch_valid must come with patch_coord, got no patch_coord"):
        model(batch["patches"], patch_valid=batch["patch_valid"])
    with pytest.raises(TypeError, match="patches must be a tensor, got list"):
        model({**batch, "patches": []})
    with pytest.raises(TypeError, match=r"batches must hold images \[B, 3, H, W\], of one size in each, got a dict"):
        tokcomp.calibrate(model, [batch], 2)
    with pytest.raises(TypeError, match=r"images must be a tensor \[B, C, H, W\], got dict"):
        tokcomp.flops(tokcomp.compress(Family("ViT", "timm", "", _plain).build(), tokcomp.ToMe(2)), images=batch)


def _plain():
    from tests.families.table import _timm_vit

    return _timm_vit()
