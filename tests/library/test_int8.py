"""tokcomp.quantize: logits against fake quantisation, each image by itself, undone without a trace, refused in time."""

from __future__ import annotations

import copy
import pickle

import pytest
import tokcomp
import torch
from timm.models.eva import Eva
from tokcomp.adapters.timm_vit import fast
from tokcomp.fastpath import Int8Weights
from torch import nn

from tokcomp_kernels import int8, tiles
from tokcomp_kernels.product_types import product_dtype

pytestmark = pytest.mark.skipif(int8.unavailable() is not None, reason=str(int8.unavailable()))

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def fake_quantised(model: nn.Module, levels: int) -> nn.Module:
    """The model in float64, its blocks' products of values that have been through int8 and back."""

    def through_int8(layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        q, scale = int8.quantize_rows_reference(inputs[0].float(), levels)
        return ((q.double() - levels - 1) * scale[..., None].double(),)

    fake = tokcomp.restore(copy.deepcopy(model))
    for layer in fake.blocks.modules():
        if isinstance(layer, nn.Linear):
            q, scale = int8.quantize_weight(layer.weight.detach())
            layer.double().weight.data = q.double() * scale[:, None].double()
            layer.register_forward_pre_hook(through_int8)
    fake.double()
    method = tokcomp.adapters.find_adapter(model).method(model)
    return fake if method is None else tokcomp.compress(fake, method)


def logits(model: nn.Module, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.inference_mode():
        return model(images.to(next(model.parameters()).dtype)).double()


@pytest.mark.parametrize("levels", [63, pytest.param(None, id="all")])
def test_logits_are_those_of_fake_quantisation(make_vit, method, levels, monkeypatch) -> None:
    """But for images in which a rounding goes the other way, since two sums differ in their last bit.

    That changes later roundings in turn, so such an image, one in eight, may be as far off as int8 itself.
    """
    levels = levels or int8.activation_levels()
    monkeypatch.setattr(int8, "activation_levels", lambda: levels)
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tokcomp.compress(make_vit(embed_dim=48), method)
    exact, fake = logits(copy.deepcopy(model).double(), images), logits(fake_quantised(model, levels), images)
    noise = (fake - exact).abs().max()
    assert 0 < noise < 0.3 * exact.abs().max()
    off = (logits(tokcomp.quantize(model), images) - fake).abs().amax(1)
    assert off.quantile(0.6) < noise / 1000
    assert off.max() < noise


@pytest.fixture
def model(make_vit, methods):
    return tokcomp.quantize(tokcomp.compress(make_vit(), methods["diffrate"]))


def test_every_linear_layer_of_the_blocks_is_in_int8(model, monkeypatch) -> None:
    layers = []

    def counted(layer):
        return lambda *inputs, **more: layers.append(layer) or layer(*inputs, **more)

    for module, name in ((int8, "linear"), (int8, "linear_gelu"), (tiles, "linear_int8")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    logits(model)
    assert len(layers) == 4 * 4
    tokcomp.restore(model)
    logits(model)
    assert len(layers) == 16


def test_an_image_s_logits_do_not_depend_on_its_batch(model) -> None:
    loud = torch.cat([IMAGES[:1], IMAGES[1:] * 1000])
    torch.testing.assert_close(logits(model, loud)[:1], logits(model, IMAGES[:1]), atol=1e-5, rtol=0)
    assert logits(model, IMAGES[:0]).shape == (0, 5)


def test_it_is_undone_and_the_weights_never_change(make_vit, methods) -> None:
    model = make_vit()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    whole = logits(tokcomp.quantize(model))  # a plain model drops no token
    assert 0 < (whole - before).abs().max() < 0.3 * before.abs().max()
    tokcomp.compress(model, methods["tome"])
    assert not torch.equal(logits(model), whole)
    tokcomp.compress(model, tokcomp.ToMe(0))
    assert torch.equal(logits(model), whole)  # still in int8
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(logits(tokcomp.restore(model)), before)
    assert type(tokcomp.restore(model)) is type(make_vit()) and not [name for name in vars(model) if "tokcomp" in name]


def test_copies_pickles_and_new_weights(model) -> None:
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    changed = logits(model)
    assert not torch.equal(changed, expected)
    assert torch.equal(changed, logits(copy.deepcopy(model)))


class TwiceQuantised(torch.Tensor):
    """A weight of another library's type, as torchao's are."""


def reparametrised(model: nn.Module) -> None:
    layer = model.blocks[1].attn.qkv
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(TwiceQuantised))


def test_what_cannot_be_in_int8_is_refused_and_left_as_it_was(make_vit, methods) -> None:
    model = make_vit()
    with pytest.raises(ValueError, match="dtype must be 'int8', got 'int4'"):
        tokcomp.quantize(model, "int4")
    for change, message in (
        (lambda model: model.train(), "training mode; call model\\.eval"),
        (lambda model: model.bfloat16(), "float32 on the CPU, got bfloat16 on cpu"),
        (lambda model: model.to("meta"), "got float32 on meta"),
        (reparametrised, "blocks\\.1 must have plain, contiguous weights, got a TwiceQuantised"),
        (lambda model: model.blocks[1].mlp.register_forward_hook(lambda *_: None), "blocks\\.1 has parts"),
    ):
        odd = make_vit()
        change(odd)
        with pytest.raises(ValueError, match=message):
            tokcomp.quantize(odd)
        assert tokcomp.adapters.find_adapter(odd).method(odd) is None
    with pytest.raises(TypeError, match="its products cannot be computed in int8; timm's ViTs' can"):
        tokcomp.quantize(Eva(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval())


@pytest.mark.slow
def test_calls_that_int8_does_not_serve_are_errors_and_none_falls_to_float32_in_silence(model) -> None:
    expected = logits(model)
    with pytest.raises(RuntimeError, match=r"int8, for plain inference.*gradients"):
        model(IMAGES)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        if product_dtype(torch.bfloat16, "cpu") == torch.bfloat16:
            with pytest.raises(RuntimeError, match="autocast"):
                model(IMAGES)
        else:  # autocast is switched off around a model whose products it would emulate
            features = model.forward_features(IMAGES)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(model.forward_features(IMAGES), features)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch\.compile"):
        torch.compile(model, backend="eager")(IMAGES)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="training mode"):
        model.train()(IMAGES)
    assert torch.equal(logits(model.eval()), expected)
    handle = model.blocks[2].attn.qkv.register_forward_hook(lambda *_: None)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"blocks\.2 has parts"):
        model(IMAGES)
    handle.remove()
    assert torch.equal(logits(model), expected)


def test_the_pack_says_its_bytes(model) -> None:
    logits(model)
    layers = fast.layers_of(model.blocks[0])
    packed = Int8Weights(layers, torch.float32)
    weights = sum(layer.weight.numel() for layer in layers)
    scales = sum(8 * layer.weight.shape[0] for layer in layers)
    assert weights + scales <= packed.nbytes_of(layers) < 2 * weights + scales


def test_a_model_quantised_by_torchao_is_compressed_as_it_is(make_vit, method) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = make_vit(embed_dim=48)
    expected = logits(tokcomp.compress(copy.deepcopy(model), method))
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    tokcomp.compress(model, method)
    assert (logits(model) - expected).norm() < 0.2 * expected.norm()
    with pytest.raises(ValueError, match="must have plain, contiguous weights"):
        tokcomp.quantize(model)
