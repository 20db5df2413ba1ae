"""timm's VisionTransformer under the search: every token stays, attention and reduction go by the token mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.images import check_images
from tokcomp.adapters.timm_vit import search_fast
from tokcomp.adapters.timm_vit.modules import join_heads, split_heads
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp.fastpath import PackedWeights
from tokcomp_kernels.product_types import unless_emulated, widened

#: Weight of a masked token in map pooling: nothing in the result, but the mask's gradient flows.
_MASKED_WEIGHT = 1e-20


def check_search(model: Any) -> None:
    """Raise unless the model ends in a classifier or pooled features that a loss can be taken of."""
    if model.global_pool == "" and model.attn_pool is None:
        raise UnsupportedModelError("global_pool='' leaves the tokens unpooled, so a search has no logits to go by")


def reads_patches(model: Any) -> bool:
    """Whether the head reads patch tokens, so that the last block's compression would cost what it saves no one."""
    return model.attn_pool is not None or model.global_pool != "token"


def run_search(model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
    """Logits [B, classes] of images [B, 3, H, W], the model's blocks compressed as ``blocks`` say."""
    check_images(model.patch_embed, images)
    with unless_emulated(images.device.type):
        x, state = _run_blocks(model, images, blocks)
    return _head(model, model.norm(x), state)


def _run_blocks(model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> tuple[Tensor, TokenState]:
    packed = search_fast.pack(model, images)
    embed = model.patch_embed
    with widened(images):
        x = embed(images) if packed is None else search_fast.embed_patches(embed, images, packed)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    wanted = blocks[0].num_tokens
    if x.shape[1] != wanted:
        raise ValueError(f"images must give {wanted} tokens as the model's own size does, got {x.shape[1]}")
    dtype = x.dtype
    x = x if packed is None or torch.is_autocast_enabled("cpu") else x.to(packed.dtype)
    state = TokenState.start(x)
    for block, search in zip(model.blocks, blocks, strict=True):
        if model.grad_checkpointing and torch.is_grad_enabled():
            x, state = checkpoint(_run_block, block, search, x, state, packed, use_reentrant=False)
        else:
            x, state = _run_block(block, search, x, state, packed)
    return x.to(dtype), state


def _run_block(
    block: Any, search: BlockSearch, x: Tensor, state: TokenState, packed: PackedWeights | None
) -> tuple[Tensor, TokenState]:
    if packed is not None:
        return search_fast.run_block(block, search, x, state, packed)
    with widened(x):
        y = block.norm1(x)
        q, k, v = split_heads(block.attn, y)
        out, importance = search.attend(q, k, v, state, scale=block.attn.scale)
        x = search.read(x)
        x = x + block.drop_path1(block.ls1(join_heads(block.attn, out, search.read(y))))
        x, state = search.reduce(x, importance, state)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), state


def _head(model: Any, x: Tensor, state: TokenState) -> Tensor:
    if not reads_patches(model):
        return model.forward_head(x)
    mask = state.mask
    size = torch.ones_like(mask) if state.size is None else state.size
    if not getattr(model, "pool_include_prefix", False):
        x, mask, size = (tensor[:, model.num_prefix_tokens :] for tensor in (x, mask, size))
    if model.attn_pool is not None:
        bias = size.log() + (mask + _MASKED_WEIGHT).log()  # [B, P]
        pooled = model.attn_pool(x, attn_mask=bias.to(x.dtype)[:, None, None])
    else:
        weight = size * mask
        weight = (weight / weight.detach().sum(1, keepdim=True)).to(x.dtype)
        pooled = (x * weight.unsqueeze(-1)).sum(1)
        if model.global_pool in ("max", "avgmax"):
            largest = x.masked_fill((mask.detach() <= 0).unsqueeze(-1), float("-inf")).amax(1)
            pooled = largest if model.global_pool == "max" else 0.5 * (largest + pooled)
    return model.head(model.head_drop(model.fc_norm(pooled)))
