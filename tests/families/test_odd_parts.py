"""Parts that are not the family's own run as in the plain model, or are refused with their path."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from tokcomp.methods import scheduled
from torch import nn

from tests.families.test_families import build, images_for, logits


def replaced_forward(module: nn.Module) -> None:
    """As libraries do it that move weights around."""
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 1.3


def subclassed(module: nn.Module) -> None:
    cls = type(module)
    module.__class__ = type("Mine", (cls,), {"forward": lambda self, x: cls.forward(self, x) * 1.3})


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "path", "change"),
    [
        *(("timm: ViT", f"blocks.1.{part}", replaced_forward) for part in ("norm1", "attn.qkv", "mlp", "mlp.act")),
        *(("timm: ViT", f"blocks.1.{part}", subclassed) for part in ("attn.proj_drop", "drop_path1", "mlp.drop2")),
        ("timm: EVA, post-norm", "blocks.1.attn.qkv", replaced_forward),
        ("timm: BEiT", "blocks.1.attn.qkv", replaced_forward),
        ("torchvision: ViT", "encoder.layers.encoder_layer_1.self_attention.out_proj", replaced_forward),
    ],
)
def test_it_computes_what_the_plain_model_computes(name, path, change):
    """timm's EVA and BEiT, and nn.MultiheadAttention, read a layer's weight and never call it; so does ours."""
    model = build(name)
    change(model.get_submodule(path))
    images = images_for(model)
    want = logits(model, images)
    have = logits(tokcomp.compress(model, tokcomp.ToMe(0)), images)
    torch.testing.assert_close(have, want, rtol=0, atol=1e-5 * float(want.abs().max()))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output)


def test_what_a_compressed_block_cannot_run_is_refused_with_its_path():
    def refused(name, path, change, message):
        model = build(name)
        change(model.get_submodule(path))
        with pytest.raises(tokcomp.UnsupportedModelError, match=message):
            tokcomp.compress(model, tokcomp.ToMe(2))

    def mixing(block):
        block.ls1 = nn.Sequential(nn.BatchNorm1d(17))

    refused("timm: ViT", "blocks.1", mixing, r"blocks\.1\.ls1\.0: a BatchNorm1d mixes tokens")
    refused("timm: ViT", "blocks.1", lambda one: setattr(one, "mlp", None), r"blocks\.1: its mlp is None")
    parallel = "timm: ViT, parallel attentions"
    for path in ("blocks.1.attns.0", "blocks.1.attns.0.attn"):
        refused(parallel, path, hooked, rf"{path}: its hooks would not run")
    refused(parallel, "blocks.1.attns.0", subclassed, r"blocks\.1\.attns\.0: Mine is not understood, only torch's Seq")
    scaling = "timm: ViT, parallel scaling"
    refused(scaling, "blocks.1.in_proj", hooked, r"blocks\.1\.in_proj: its hooks would not run")
    refused(scaling, "blocks.1.in_proj", subclassed, r"blocks\.1\.in_proj: Mine is not understood, only torch's Linear")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "block", "attention"), [("timm: ViT", "blocks", "attn"), ("transformers: ViT", "vit.layers", "attention")]
)
def test_a_part_put_in_afterwards_is_named(name, block, attention):
    """transformers' layers take any argument, and would run uncompressed."""
    model = tokcomp.compress(build(name), tokcomp.ToMe(2))
    blocks, images = model.get_submodule(block), images_for(model)
    want = logits(model, images)
    blocks[1] = build(name).get_submodule(block)[1]
    with pytest.raises(RuntimeError, match=r"block 1 must be as compress left it, got .* call tokcomp.compress again"):
        logits(model, images)
    assert torch.equal(logits(tokcomp.compress(model, tokcomp.ToMe(2)), images), want)
    if name == "transformers: ViT":
        setattr(blocks[1], attention, getattr(build(name).get_submodule(block)[1], attention))
        with pytest.raises(RuntimeError, match="the attention of block 1 must be as compress left it"):
            logits(model, images)


def test_masked_patches_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
    )
    model, images = transformers.ViTModel(config, use_mask_token=True).eval(), torch.randn(1, 3, 32, 32)
    mask = torch.arange(16)[None] < 4
    with torch.no_grad():
        model.embeddings.mask_token.normal_()
        want = model(images, bool_masked_pos=mask).last_hidden_state
        have = tokcomp.compress(model, tokcomp.ToMe(0))(images, bool_masked_pos=mask).last_hidden_state
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("name", ["tome", "evit"])
def test_a_schedule_for_other_tokens_is_refused_whatever_its_method(name):
    schedule = tokcomp.CompressionSchedule(
        [10, 10, 8, 8], [10, 10, 8, 8], num_tokens=10, num_prefix_tokens=1, method={"name": name}
    )
    with pytest.raises(ValueError, match=r"for the 17 tokens that enter block 0, got one for 10; schedule\.rescaled"):
        tokcomp.compress(build("timm: ViT"), scheduled(schedule))
    tokcomp.compress(build("timm: ViT"), scheduled(schedule.rescaled(17)))
