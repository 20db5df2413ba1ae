"""What is not understood is refused by name and left unchanged."""

from __future__ import annotations

from importlib import import_module

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def test_block_cannot_run_on_its_own(make_vit, methods, images_for):
    model = tokcomp.compress(make_vit(), methods["tome"])
    with pytest.raises(RuntimeError, match=r"call the model, or tokcomp\.restore"):
        model.blocks[0](torch.randn(1, 17, 24))
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        model(images_for(model), attn_mask=torch.ones(17, 17))


UNSUPPORTED = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_atto": "ConvNeXt",
    "resnet10t": "ResNet",
    "eva02_tiny_patch14_224": None,
    "vit_small_patch16_18x2_224": None,
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


#: File of timm's models, or of transformers' -> the class of all that are in it.
GRIDS = {
    "swin_transformer": "SwinTransformer",
    "swin_transformer_v2": "SwinTransformerV2",
    "swin_transformer_v2_cr": "SwinTransformerV2Cr",
    "maxxvit": "MaxxVit",
    "vision_transformer_sam": "VisionTransformerSAM",
    "hiera": "Hiera",
    "hieradet_sam2": "HieraDet",
    "levit": "Levit",
    "xcit": "Xcit",
    "pvt_v2": "PyramidVisionTransformerV2",
    "mvitv2": "MultiScaleVit",
    "convnext": "ConvNeXt",
    "resnet": "ResNet",
    "cait": "Cait",
    "videomae.modeling_videomae": "VideoMAEModel",
    "vit_mae.modeling_vit_mae": "ViTMAEModel",
    "clipseg.modeling_clipseg": "CLIPSegVisionModel",
    "siglip2.modeling_siglip2": "Siglip2VisionModel",
}


@pytest.mark.parametrize("file", GRIDS)
def test_models_that_need_their_grid_are_told_why_and_what_to_use(file):
    library = "transformers" if ".modeling_" in file else "timm"
    pytest.importorskip(library)
    cls = getattr(import_module(f"{library}.models.{file}"), GRIDS[file])
    model = object.__new__(cls)  # the class is enough to refuse it, and takes no time
    nn.Module.__init__(model)
    with pytest.raises(
        tokcomp.UnsupportedModelError, match=rf"{library}\.models\.{file}\.{GRIDS[file]} .*; .+; use .+"
    ):
        tokcomp.compress(model, tokcomp.ToMe(4))


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
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.2\.attn: OwnAttention is not understood"):
        tokcomp.compress(model, methods["tome"])
    assert type(model) is VisionTransformer and type(model.blocks[0]).__name__ == "Block"

    with pytest.raises(tokcomp.UnsupportedModelError, match="OwnModel is not understood: it has a forward_features"):
        tokcomp.compress(make_vit(cls=OwnModel), methods["tome"])

    model = make_vit()
    model.blocks[1].forward = lambda x: x
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.1: Block is not understood"):
        tokcomp.compress(model, methods["tome"])

    model = make_vit()
    model.blocks[3].mlp.fc1 = nn.Conv1d(24, 96, 3)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.3\.mlp\.fc1: a Conv1d mixes tokens"):
        tokcomp.compress(model, methods["tome"])


IMAGES = torch.randn(2, 3, 32, 32)
#: what arrives in place of images, and what is said of it
NOT_IMAGES = [
    (None, TypeError, r"images must be a tensor \[B, C, H, W\], got NoneType"),
    (IMAGES.numpy(), TypeError, "images must be a tensor .* got ndarray"),
    (
        IMAGES[0],
        ValueError,
        r"images must be \[B, C, H, W\], got .* \[3, 32, 32\]; images.unsqueeze\(0\) makes a batch",
    ),
    (IMAGES[:, :1], ValueError, r"images must have the model's 3 channels, .* got a tensor of shape \[2, 1, 32, 32\]"),
    (IMAGES.permute(0, 2, 3, 1), ValueError, r"shape \[2, 32, 32, 3\]; images.permute\(0, 3, 1, 2\) puts"),
    (IMAGES.byte(), TypeError, "images must be floating point, normalized as the model takes them, got uint8"),
    (IMAGES.to(torch.complex64), TypeError, "images must be floating point, .* got complex64"),
    (IMAGES.to_sparse(), TypeError, r"images must be one dense tensor, got one of layout sparse_coo; .*to_dense\(\)"),
    (IMAGES.to_mkldnn(), TypeError, "images must be one dense tensor, got one of layout mkldnn"),
    (
        torch.nested.as_nested_tensor([IMAGES[0]], layout=torch.jagged),
        TypeError,
        "images must be one dense tensor, got a nested one",
    ),
]


@pytest.mark.parametrize(("images", "error", "message"), NOT_IMAGES, ids=[wrong[2][-20:] for wrong in NOT_IMAGES])
def test_images_of_the_wrong_kind(make_vit, images, error, message):
    plain, compressed = make_vit(), tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    search = tokcomp.DiffRateSearch(make_vit()).eval()
    calls = [lambda: tokcomp.trace(plain, images), lambda: tokcomp.trace(compressed, images)]
    for call in (*calls, lambda: compressed(images), lambda: search(images)):
        with torch.no_grad(), pytest.raises(error, match=message):
            call()


def test_what_an_embedding_of_one_s_own_takes_is_left_to_it(make_vit):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    model.patch_embed.register_forward_pre_hook(lambda module, args: args[0].float() / 255)
    assert model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)


def test_tracers_that_cannot_follow_are_refused(make_vit):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch\.fx\.symbolic_trace: .* use torch\.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match=r"cannot be scripted by torch\.jit\.script; use torch\.export"):
        torch.jit.script(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokcomp.ToMe(torch.tensor(1.5)), r"r must be an integer or one per block, got tensor\(1\.5"),
        (lambda: tokcomp.ToMe("12"), "r must be an integer or one per block, got '12'"),
        (lambda: tokcomp.EViT(0.5, blocks=3), "blocks must be a list of block numbers, got 3"),
        (lambda: tokcomp.EViT(0.5, blocks=None), "blocks must be a list of block numbers, got None"),
        (lambda: tokcomp.EViT(num_pruned=[3]), r"num_pruned must be an integer, got \[3\]"),
        (lambda: tokcomp.CompressionSchedule(torch.tensor(3), [3]), "num_prune_kept must be a list of integers"),
        (
            lambda: tokcomp.DiffRate.published(torch.nn.Identity(), 2.3),
            "name must be a timm model's name, got Identity",
        ),
        (lambda: tokcomp.DiffRate(tokcomp.CompressionSchedule([3], [3]), seed=1.5), "seed must be an integer, got 1.5"),
    ],
)
def test_numbers_of_the_wrong_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_numbers_in_tensors_are_numbers():
    assert tokcomp.ToMe(torch.tensor(3)).r == 3 and tokcomp.ToMe(torch.tensor([3, 2])).r == (3, 2)
    assert tokcomp.EViT(torch.tensor(0.5)).keep_rate == 0.5
    published = tokcomp.DiffRate.published("deit_small_patch16_224", torch.tensor(2.3))
    assert published.schedule == tokcomp.DiffRate.published("deit_small_patch16_224", 2.3).schedule
    assert "provenance" not in repr(published)
    with pytest.raises(ValueError, match=r"metric must be one of .* got \['random'\]"):
        tokcomp.DiffRate(published.schedule, metric=["random"])


def test_subclass_that_overrides_nothing_is_understood(make_vit, methods):
    class Named(VisionTransformer):
        pass

    model = tokcomp.compress(make_vit(cls=Named), methods["tome"])
    assert isinstance(model, Named)
    assert type(tokcomp.restore(model)) is Named


@pytest.mark.slow
def test_wrappers_are_refused_with_advice(make_vit, methods):
    model = make_vit()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(tokcomp.UnsupportedModelError, match="wraps a VisionTransformer: pass that, and wrap it"):
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
