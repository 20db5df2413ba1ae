"""Images of one batch that keep different numbers of tokens: their logits, cost, calibration, and what is refused.

That DToMe and ATS keep the right ones is tested in tests/oracle, every family in tests/families.
"""

from __future__ import annotations

import pytest
import tokcomp
import torch
from tokcomp import learned
from tokcomp.cost import flops_by_image
from tokcomp.fastpath import rows
from torchvision.models.vision_transformer import VisionTransformer

METHODS = [tokcomp.DToMe(0.93), tokcomp.ATS(9, [0, 2])]


def lively(model):
    """Weights under which keys, and so images, differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


@pytest.fixture
def images():
    """From nearly black to noisy."""
    noise = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * torch.tensor([0.02, 0.1, 0.5, 1.0, 2.0], dtype=torch.float64)[:, None, None, None]


MODELS = {
    "largest value": {"global_pool": "max"},
    "mean and largest": {"global_pool": "avgmax"},
    "attention pooling": {"global_pool": "map"},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("pool", MODELS)
def test_logits_are_those_of_each_image_alone(make_vit, images, method, pool):
    model = lively(make_vit(**MODELS[pool]))
    if pool == "no class token" and method.name == "ats":
        with pytest.raises(ValueError, match=r"ATS needs a class token, .*; use ToMe or DToMe"):
            tokcomp.compress(model, method)
        return
    tokcomp.compress(model, method)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    assert len(set(tokcomp.trace(model, images)[-1].amax(1).tolist())) > 1
    assert tokcomp.restore(model)(images[:0]).shape == tokcomp.compress(model, method)(images[:0]).shape


@pytest.mark.parametrize("least", [1 / 16, 2], ids=["left out", "computed"])
def test_padding_is_left_out(make_vit, images, monkeypatch, least):
    """On the fast path of a CPU, from some share of padding on; in int8 as well."""
    monkeypatch.setattr(rows, "LEAST_PADDING", least)
    packed, images = [], images.float()
    monkeypatch.setattr(rows.Rows, "packed", lambda self, x, own=rows.Rows.packed: packed.append(x) or own(self, x))
    for method in (*METHODS, tokcomp.AViT(0.9, 1.0, -2.0)):
        # A register may halt before the class token does, and is then not attended to.
        kind = {"global_pool": "token", "reg_tokens": 3} if method.between else {"global_pool": "max"}
        model = lively(make_vit(**kind)).float()
        tokcomp.compress(learned.attach(model, method) if method.between else model, method)
        assert len(set(flops_by_image(model, images).tolist())) > 2
        for quantize in (False, True):
            if quantize:
                tokcomp.quantize(model)
            with torch.inference_mode():
                torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))
        assert bool(packed) == (least < 1)
        packed.clear()


def test_whoever_watches_a_module_sees_the_padded_batch(images, monkeypatch):
    """In a family without a fast path: a hook, or a gradient."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    tokcomp.compress(lively(model).eval(), tokcomp.ATS(12, [0, 1]))
    monkeypatch.setattr(rows, "LEAST_PADDING", 0)
    with torch.no_grad():
        want, seen = model(images), []
        model.encoder.layers[2].mlp.register_forward_hook(
            lambda _, given, out: seen.append((given[0].shape, out.shape))
        )
        torch.testing.assert_close(model(images), want)
    torch.testing.assert_close(model(images), want)
    left = int(tokcomp.trace(model, images)[-1].max()) + 1
    assert seen == 3 * [(torch.Size((5, left, 16)),) * 2] and want.requires_grad is False


def test_feature_maps_have_every_position(make_vit, images):
    model = tokcomp.compress(lively(make_vit()), tokcomp.DToMe(0.9))
    maps = model.forward_intermediates(images, intermediates_only=True)
    alone = [
        torch.cat(one)
        for one in zip(*(model.forward_intermediates(i[None], intermediates_only=True) for i in images), strict=True)
    ]
    for have, want in zip(maps, alone, strict=True):
        torch.testing.assert_close(have, want)


def test_gradients_reach_the_images(make_vit, images):
    model = tokcomp.compress(lively(make_vit()), tokcomp.DToMe(0.9))
    leaf = images.clone().requires_grad_()
    model(leaf).sum().backward()
    alone = images[2:3].clone().requires_grad_()
    model(alone).sum().backward()
    torch.testing.assert_close(leaf.grad[2:3], alone.grad)


def test_cost_is_that_of_the_tokens_kept(make_vit, images):
    model = lively(make_vit())
    plain = tokcomp.flops(model)
    tokcomp.compress(model, tokcomp.DToMe(0.93))
    each = flops_by_image(model, images)
    assert (each <= plain).all() and len(each.unique()) > 1
    assert tokcomp.flops(model, images=images) == round(each.mean().item())
    assert flops_by_image(model, images[3:4])[0] == each[3]
    static = tokcomp.compress(model, tokcomp.ToMe(2))
    assert (flops_by_image(static, images) == tokcomp.flops(static)).all()
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        tokcomp.flops(model, images=images[:0])
    with pytest.raises(ValueError, match="img_size must be left out where images are given"):
        tokcomp.flops(model, 32, images)


def test_calibrated_thresholds_merge_r_of_the_average_image(make_vit, images):
    model = lively(make_vit())
    before = model(images)
    method = tokcomp.calibrate(model, [images], [3, 0, 2, 1])
    assert torch.equal(model(images), before)
    assert method.thresholds[1] == 1 and method.expected == (3, 0, 2, 1)
    maps = tokcomp.trace(tokcomp.compress(model, method), images)
    left = torch.stack([one.amax(1) + 1 for one in maps]).double().mean(1).tolist()
    assert left == [14, 14, 12, 11]
    assert tokcomp.flops(model) == pytest.approx(tokcomp.flops(model, images=images), rel=0.02)
    # The mean over batches; a model that is compressed stays so.
    halves = [tokcomp.calibrate(model, [half], 2).thresholds for half in (images[:2], images[2:])]
    both = tokcomp.calibrate(model, [images[:2], images[2:]], 2).thresholds
    assert both[0] == pytest.approx((halves[0][0] + halves[1][0]) / 2)
    assert repr(method) in repr(tokcomp.adapters.find_adapter(model).method(model))


def test_what_is_refused(make_vit, images, tmp_path):
    model = lively(make_vit())
    for batches in ([], [images[:0]]):
        with pytest.raises(ValueError, match="batches must hold images to calibrate on, got none"):
            tokcomp.calibrate(model, batches, 2)
    with pytest.raises(TypeError, match=r"batches must be an iterable of images .*, got a NoneType"):
        tokcomp.calibrate(model, None, 2)
    with pytest.raises(ValueError, match=r"batches must hold images, .* that are finite numbers, got keys in block 0"):
        tokcomp.calibrate(model, [images, images * torch.nan], 2)
    with pytest.raises(ValueError, match="r must have one entry per block, got 2 entries for 4 blocks"):
        tokcomp.calibrate(model, [images], [1, 2])
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        tokcomp.calibrate(model.train(), [images], 2)
    model.eval()
    with pytest.raises(ValueError, match="attention must be 'tokcomp' for DToMe"):
        tokcomp.compress(model, METHODS[0], attention="stock")
    tokcomp.compress(model.float(), METHODS[0])
    with pytest.raises(ValueError, match=r"same number of tokens of every image for export, got .* DToMe"):
        tokcomp.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="needs a plain vision transformer, got a hierarchical model"):
        METHODS[0].validate(tokcomp.methods.Geometry(4, 0, False, 16, spreads_tokens=True))
