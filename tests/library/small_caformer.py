"""CAFormers small enough to test with."""

from __future__ import annotations

import timm
import tokcomp
import torch
from timm.layers import LayerNorm2d
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import nn

# Images of 64 x 96 give the third stage 4 x 6 = 24 tokens, the fourth 2 x 3.
HEIGHT, WIDTH, TOKENS = 64, 96, 24
PRUNE, MERGE = [24, 17, 15, 9], [20, 16, 12, 10]
SCHEDULE = tokcomp.CompressionSchedule(PRUNE, MERGE)
DIFFRATE = tokcomp.DiffRate(
    tokcomp.CompressionSchedule(None, MERGE), metric="image_attn", pipeline="merge", similarity_weighted_size=False
)
VARIANTS = {
    "plain": {},
    "layer scale": dict(layer_scale_init_values=[None, None, 0.3, 0.3]),
    "no residual scale": dict(res_scale_init_values=[None] * 4),
    "gelu, biases": dict(mlp_act=nn.GELU, mlp_bias=True, qkv_bias=True, proj_bias=True),
    "linear head": dict(use_mlp_head=False),
    "no head": dict(num_classes=0),
    "norms with bias": dict(norm_layers=[LayerNorm2d, LayerNorm2d, nn.LayerNorm, nn.LayerNorm]),
    "one head": dict(head_dim=32, dims=(8, 16, 32, 64)),
    "one channel": dict(in_chans=1),
    "convolutions after": dict(
        token_mixers=[SepConv, SepConv, Attention, SepConv],
        norm_layers=[LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNorm2dNoBias],
    ),
    "nothing after": dict(
        depths=(1, 1, 4),
        dims=(8, 16, 32),
        token_mixers=[SepConv, SepConv, Attention],
        norm_layers=[LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias],
        res_scale_init_values=[None, None, 1.0],
    ),
}


def caformer(seed=0, **options) -> MetaFormer:
    """A CAFormer of 8 blocks, 4 of them in the third stage, with random weights of which every one matters."""
    defaults = dict(
        depths=(1, 1, 4, 2),
        dims=(8, 16, 32, 48),
        token_mixers=[SepConv, SepConv, Attention, Attention],
        norm_layers=[LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias],
        head_dim=8,
        num_classes=5,
    )
    torch.manual_seed(seed)
    model = MetaFormer(**{**defaults, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias") or "scale" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_of(model: MetaFormer | None = None, batch=3, seed=0, height=HEIGHT, width=WIDTH) -> torch.Tensor:
    """Random images with the model's number of channels, 3 without a model."""
    generator = torch.Generator().manual_seed(seed)
    channels = 3 if model is None else model.stem.conv.in_channels
    return torch.randn(batch, channels, height, width, generator=generator)


def register_small() -> str:
    """Make timm know a small CAFormer by name, for what builds models by their names; returns that name."""

    def caformer_small(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
        return caformer(**options)

    caformer_small.__module__ = "timm.models.metaformer"
    if not timm.is_model(caformer_small.__name__):
        timm.models.register_model(caformer_small)
    return caformer_small.__name__
