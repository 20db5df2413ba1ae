"""Heads, the segmenter around them, and what comes back to positions whose tokens were dropped."""

from __future__ import annotations

import copy

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tokcomp.adapters import UnsupportedModelError
from tokcomp.dense import LinearHead, MaskTransformerHead, Segmenter, position_tokens

HEADS = ("linear", "mask_transformer")


def images(height: int = 64, width: int = 64, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make_segmenter(make_vit):
    def make(head: str = "linear", num_classes: int = 7, **options) -> Segmenter:
        encoder = make_vit(**{"img_size": 64, "num_classes": 0, "global_pool": "", **options})
        torch.manual_seed(1)
        return Segmenter(encoder, num_classes, head).eval()

    return make


@pytest.mark.parametrize("head", HEADS)
def test_shapes_and_upsampling(make_segmenter, head):
    segmenter = make_segmenter(head)
    logits, small = segmenter(images()), segmenter.patch_logits(images())
    assert logits.shape == (2, 7, 64, 64) and small.shape == (2, 7, 8, 8)
    torch.testing.assert_close(logits, F.interpolate(small, scale_factor=8, mode="bilinear", align_corners=False))
    assert torch.equal(segmenter.predict(images()), logits.argmax(1))
    tokens = segmenter.encoder.forward_features(images())
    answers = segmenter.patch_answers(tokens)  # [B P, K]
    torch.testing.assert_close(answers.view(2, 8, 8, 7).permute(0, 3, 1, 2), small)


def test_the_linear_head_reads_each_patch_on_its_own(make_segmenter):
    segmenter = make_segmenter(reg_tokens=2).double()
    tokens = torch.randn(2, 3 + 64, 24, dtype=torch.float64)
    layer = segmenter.head.classifier
    small = segmenter.read(tokens, (8, 8))
    expected = (layer.weight @ tokens[1, 3 + 5 * 8 + 2]) + layer.bias
    torch.testing.assert_close(small[1, :, 5, 2], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_mask_transformer_by_hand(heads):
    torch.manual_seed(0)
    head = MaskTransformerHead(24, 5, num_heads=heads).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.randn(2, 9, 24, dtype=torch.float64)
    x = torch.cat([head.project(tokens), head.class_tokens.expand(2, -1, -1)], 1)
    for block in head.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(2, 14, 3, heads, 24 // heads).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT / (24 // heads) ** 0.5).softmax(-1) @ v
        x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    x = head.norm(x)
    patches = x[:, :9] @ head.project_patches.weight.T
    classes = x[:, 9:] @ head.project_classes.weight.T
    cosine = torch.einsum(
        "bpc,bkc->bpk", patches / patches.norm(dim=-1)[..., None], classes / classes.norm(dim=-1)[..., None]
    )
    centred = cosine - cosine.mean(-1, keepdim=True)
    scaled = centred / (cosine.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(tokens), scaled * head.mask_norm.weight + head.mask_norm.bias, rtol=0, atol=1e-11)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("method", [None, tokcomp.ToMeMLP(16), tokcomp.ToMe(5)], ids=str)
def test_gradients_reach_every_parameter(make_segmenter, head, method):
    segmenter = make_segmenter(head).train()
    if method is not None:
        tokcomp.compress(segmenter.encoder, method)
    F.cross_entropy(segmenter(images()), torch.randint(7, (2, 64, 64))).backward()
    missing = [name for name, one in segmenter.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("head", HEADS)
def test_merging_nothing_changes_nothing_and_much_something(make_segmenter, head):
    segmenter = make_segmenter(head)
    with torch.no_grad():
        plain = segmenter(images())
        tokcomp.compress(segmenter.encoder, tokcomp.ToMeMLP(0))
        torch.testing.assert_close(segmenter(images()), plain, atol=2e-5, rtol=0)
        tokcomp.compress(segmenter.encoder, tokcomp.ToMeMLP(32))
        merged = segmenter(images())
        assert merged.shape == plain.shape and (merged - plain).abs().max() > 1e-3
        assert torch.equal(copy.deepcopy(segmenter)(images()), merged)
        torch.testing.assert_close(tokcomp.restore(segmenter.encoder) and segmenter(images()), plain)


@pytest.mark.parametrize("head", HEADS)
def test_512_by_512(head):
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=512, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    segmenter = Segmenter(encoder, 4, head).eval()
    tokcomp.compress(encoder, tokcomp.ToMeMLP(512))  # half of 1024
    with torch.no_grad():
        assert segmenter(images(512, 512, batch=1)).shape == (1, 4, 512, 512)
    assert tokcomp.flops(encoder) < tokcomp.flops(tokcomp.restore(encoder)) - 2 * 500 * 8 * 32**2


def test_any_size_with_dynamic_images(make_segmenter):
    segmenter = make_segmenter(dynamic_img_size=True)
    tokcomp.compress(segmenter.encoder, tokcomp.ToMeMLP(20))
    assert segmenter(images(48, 96)).shape == (2, 7, 48, 96)


def test_dropped_tokens_are_given_back(make_segmenter):
    encoder = make_segmenter().encoder
    pictures = images()
    with torch.no_grad():
        for method, prunes in ((tokcomp.ToMe(9), False), (tokcomp.EViT(0.5, (1, 2), fuse=False), True)):
            tokcomp.compress(encoder, method)
            kept = encoder.forward_features(pictures)
            last = tokcomp.trace(encoder, pictures)[-1]
            found = position_tokens(encoder, pictures)
            assert found.shape == (2, 65, 24) and kept.shape[1] < 65
            for image in range(2):
                for place in range(65):
                    slot = int(last[image, place])
                    expected = kept[image, slot] if slot >= 0 else torch.zeros(24)
                    torch.testing.assert_close(found[image, place], expected, atol=1e-5, rtol=0)
            assert bool((last < 0).any()) == prunes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.nn.Linear(3, 3), 4),
            UnsupportedModelError,
            "encoder must be a timm VisionTransformer or CAFormer, got Linear",
        ),
        (("vit", 1), ValueError, "num_classes must be a whole number, 2 or more, got 1"),
        (("vit", True), ValueError, "num_classes must be a whole number, 2 or more, got True"),
        (("vit", 4, "conv"), ValueError, "head must be linear or mask_transformer for a VisionTransformer, got 'conv'"),
        (("vit", 4, 3), TypeError, "head must be linear or mask_transformer or a module, got int"),
    ],
    ids=str,
)
def test_wrong_parts_are_refused(make_vit, arguments, error, message):
    arguments = tuple(make_vit() if one == "vit" else one for one in arguments)
    with pytest.raises(error, match=message):
        Segmenter(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 60, 64), "multiples of the patch, 8 x 8, got 60 x 64; resize or pad them"),
        ((2, 3, 64, 0), "multiples of the patch, 8 x 8, got 64 x 0"),
        (
            (2, 3, 72, 64),
            "the encoder's own size, 64 x 64, got 72 x 64; make the encoder with img_size=..., or dynamic",
        ),
        ((3, 64, 64), r"images must be \[B, 3, H, W\], got \[3, 64, 64\]"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(make_segmenter, shape, message):
    with pytest.raises(ValueError, match=message):
        make_segmenter()(torch.zeros(shape))


def test_a_head_of_ones_own(make_segmenter):
    class Mean(torch.nn.Module):
        def forward(self, tokens):
            return torch.stack([tokens.mean(-1), -tokens.mean(-1)], -1)

    segmenter = Segmenter(make_segmenter().encoder, 2, Mean())
    logits = segmenter(images())
    torch.testing.assert_close(logits[:, 0], -logits[:, 1])
    assert isinstance(make_segmenter("linear").head, LinearHead)
