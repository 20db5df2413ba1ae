"""A frozen timm ViT block under the search on CPU: packed linear layers that carry gradients to their inputs alone."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.adapters.timm_vit import fast
from tokcomp.adapters.timm_vit.fast import add_scaled, factor_of, norm
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp.fastpath import Layer, PackedWeights, packed_weights


def pack(model: Any, images: Tensor) -> PackedWeights | None:
    """Packed weights of the model if this module can run all of its blocks, else None."""
    if torch.compiler.is_compiling() or not all(_is_plain(block) for block in model.blocks):
        return None
    layers: list[Layer] = [layer for block in model.blocks for layer in fast.layers_of(block)]
    if fast.is_plain_embedding(model.patch_embed):
        layers.append(model.patch_embed.proj)
    return packed_weights(model, layers, images, frozen=True, autocast=True)


def embed_patches(patch_embed: Any, images: Tensor, packed: PackedWeights) -> Tensor:
    """``patch_embed(images)``, as a packed product where that is possible and no gradient to the images is wanted."""
    if patch_embed.proj not in packed or (images.requires_grad and torch.is_grad_enabled()):
        return patch_embed(images)
    return fast.embed_patches(patch_embed, images, packed)


def run_block(
    block: nn.Module, search: BlockSearch, x: Tensor, state: TokenState, packed: PackedWeights
) -> tuple[Tensor, TokenState]:
    """What timm_vit_search.run_block computes, for x [B, N, C] in ``packed.dtype``, or float32 under autocast."""
    parts: dict[str, Any] = block._modules
    attention, attn, mlp = parts["attn"], parts["attn"]._modules, parts["mlp"]._modules
    hidden = norm(parts["norm1"], x).to(packed.dtype)
    q, k, v = fastpath.linear_heads(packed, attn["qkv"], hidden, attention.num_heads)
    q, k = norm(attn["q_norm"], q), norm(attn["k_norm"], k)
    out, importance = search.attend(q, k, v, state, scale=attention.scale)
    x = search.read(x)
    out = out.transpose(1, 2).flatten(2)
    factor = _factor(parts["ls1"], parts["drop_path1"], x)
    if factor is None and x.dtype == packed.dtype:
        x = fastpath.linear_add(packed, attn["proj"], out, x)
    else:
        x = _join(x, fastpath.linear(packed, attn["proj"], out), factor)
    x, state = search.reduce(x, importance, state)
    factor = _factor(parts["ls2"], parts["drop_path2"], x)
    hidden = norm(parts["norm2"], x).to(packed.dtype)
    if type(mlp["act"]) is not nn.GELU:
        hidden = mlp["act"](fastpath.linear(packed, mlp["fc1"], hidden))
        return _join(x, fastpath.linear(packed, mlp["fc2"], hidden), factor), state
    fused = factor is None and x.dtype == packed.dtype
    out = fastpath.gelu_mlp(
        packed, mlp["fc1"], mlp["fc2"], hidden, x if fused else None, approximate=mlp["act"].approximate
    )
    return out if fused else _join(x, out, factor), state


def _join(x: Tensor, branch: Tensor, factor: Tensor | float | None) -> Tensor:
    """x + branch * factor, in x's type."""
    branch = branch.to(x.dtype)
    return x + branch if factor is None else add_scaled(x, branch, factor)


def _factor(scale: Any, drop_path: Any, x: Tensor) -> Tensor | float | None:
    """What a branch is multiplied by before it joins x [B, N, C], one number, [C] or [B, 1, 1 or C]; None for 1.

    DropPath draws one number an image, so it draws the same ones here for ones [B, 1, 1].
    """
    factor = factor_of(scale, x.dtype)
    if type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob:
        keep = drop_path(x.new_ones(x.shape[0], 1, 1))
        factor = keep if factor is None else keep * factor
    return factor


def _is_plain(block: nn.Module) -> bool:
    """Whether run_block computes just what this block's modules would, with nobody watching them."""
    parts: dict[str, Any] = block._modules
    if not fast.has_known_parts(block):
        return False
    if any(type(parts[name]) not in (DropPath, nn.Identity) for name in ("drop_path1", "drop_path2")):
        return False
    mlp = parts["mlp"]._modules
    return not any(drop.training and drop.p > 0 for drop in (parts["attn"].proj_drop, mlp["drop1"], mlp["drop2"]))
