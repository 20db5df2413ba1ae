"""How images enter a plain timm ViT where that is fused: patches, prefix tokens, positions and first norm together."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokcomp.adapters.timm_vit import fast
from tokcomp.fastpath import Products, has_hooks


def embed_normed(model: Any, images: Tensor, products: Products) -> tuple[Tensor, Tensor] | None:
    """The tokens [B, N, C] that enter block 0, and its first norm of them; None for a model that this is not for."""
    if images.dtype != products.dtype or not _is_plain_entry(model, products):
        return None
    norm = fast.as_norm(model.blocks[0].norm1, images)
    if norm is None or images.shape[2:] != tuple(model.patch_embed.img_size):
        return None
    first = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
    prefix = torch.cat(first) if len(first) > 1 else first[0] if first else None
    proj = model.patch_embed.proj
    x, normalized = torch.ops.tokcomp._embed_patches(images, proj.weight, proj.bias, model.pos_embed[0], prefix, *norm)
    return x, normalized


def _is_plain_entry(model: Any, products: Products) -> bool:
    """Whether the tokens are what timm's VisionTransformer makes of its patches, every step known and unwatched."""
    if getattr(type(model), "_pos_embed", None) is not VisionTransformer._pos_embed or model.pos_embed is None:
        return False
    if model.patch_embed.proj not in products or type(model.patch_embed.norm) is not nn.Identity:
        return False
    if not fast.is_plain(model.blocks[0]):
        return False
    if not fast.has_products(model.blocks[0], products) or model.no_embed_class or model.dynamic_img_size:
        return False
    steps = [step for step in (model.pos_drop, model.patch_drop, model.norm_pre) if step is not None]
    known = all(type(step) is nn.Identity or (type(step) is nn.Dropout and not step.training) for step in steps)
    return known and not has_hooks(steps) and model.pos_embed.dtype == products.dtype
