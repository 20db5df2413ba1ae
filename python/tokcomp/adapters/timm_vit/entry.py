"""How images enter a plain timm ViT where that is fused: patches as one product, positions and first norm in one pass.

Bytes of tokens [B, N, C] beside the product's own: the class token is put before them, and one pass adds positions and
writes the sum and its norm. Apart, the convolution's output changes its layout too, and sum and norm are two passes.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokcomp.adapters.timm_vit import fast
from tokcomp.fastpath import Products, has_hooks


def embed_normed(model: Any, images: Tensor, products: Products) -> tuple[Tensor, Tensor] | None:
    """The tokens [B, N, C] that enter block 0, and its first norm of them; None for a model that this is not for.

    The tokens are those of the steps apart to the bit, given the product; the norm is ``add_layer_norm``'s.
    """
    if images.dtype != products.dtype or not _is_plain_entry(model, products):
        return None
    norm = fast.as_norm(model.blocks[0].norm1, images)
    if norm is None or images.shape[2:] != tuple(model.patch_embed.img_size):
        return None
    patches = fast.embed_patches(model.patch_embed, images, products)
    prefix = [token.expand(len(images), -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
    tokens = torch.cat([*prefix, patches], dim=1) if prefix else patches
    x, normalized = torch.ops.tokcomp.add_layer_norm(tokens, model.pos_embed.expand_as(tokens), *norm)
    return x, normalized


def _is_plain_entry(model: Any, products: Products) -> bool:
    """Whether the tokens are what timm's VisionTransformer makes of its patches, every step known and unwatched."""
    if getattr(type(model), "_pos_embed", None) is not VisionTransformer._pos_embed or model.pos_embed is None:
        return False
    if model.patch_embed.proj not in products or not fast.is_plain(model.blocks[0]):
        return False
    if not fast.has_products(model.blocks[0], products) or model.no_embed_class or model.dynamic_img_size:
        return False
    steps = [step for step in (model.pos_drop, model.patch_drop, model.norm_pre) if step is not None]
    known = all(type(step) is nn.Identity or (type(step) is nn.Dropout and not step.training) for step in steps)
    return known and not has_hooks(steps) and model.pos_embed.dtype == products.dtype
