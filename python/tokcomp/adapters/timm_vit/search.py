"""timm's VisionTransformer under the search: every token stays, attention and reduction go by the token mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.blocks import search_block
from tokcomp.adapters.images import check_images
from tokcomp.adapters.timm_vit import search_fast
from tokcomp.adapters.tower import masked_weights
from tokcomp.blocks.places import Places
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp.fastpath import PackedWeights
from tokcomp_kernels.product_types import unless_emulated, widened


def run_search(adapter: Any, model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
    """Logits [B, classes] of images [B, 3, H, W], the model's blocks compressed as ``blocks`` say."""
    check_images(adapter.entry(model), images)
    with unless_emulated(images.device.type):
        x, state = _run_blocks(adapter, model, images, blocks)
    return adapter.head(model, model.norm(x), masked_weights(state))


def _run_blocks(adapter: Any, model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> tuple[Tensor, TokenState]:
    packed = adapter.pack_search(model, images)
    embed = adapter.entry(model)
    with widened(images):
        x = embed(images) if packed is None else search_fast.embed_patches(embed, images, packed)
    x, places = adapter.place(model, x)
    x = adapter.enter(model, x)
    wanted = blocks[0].num_tokens
    if x.shape[1] != wanted:
        raise ValueError(f"images must give {wanted} tokens as the model's own size does, got {x.shape[1]}")
    dtype = x.dtype
    x = x if packed is None or torch.is_autocast_enabled("cpu") else x.to(packed.dtype)
    state = TokenState.start(x)

    def run(block: Any, search: BlockSearch, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        return _run_block(adapter, block, search, x, state, places, packed)

    for block, search in zip(model.blocks, blocks, strict=True):
        if adapter.checkpoints(model):
            x, state = checkpoint(run, block, search, x, state, use_reentrant=False)
        else:
            x, state = run(block, search, x, state)
    return x.to(dtype), state


def _run_block(
    adapter: Any,
    block: Any,
    search: BlockSearch,
    x: Tensor,
    state: TokenState,
    places: Places | None,
    packed: PackedWeights | None,
) -> tuple[Tensor, TokenState]:
    if packed is not None:
        return search_fast.run_block(block, search, x, state, packed)
    with widened(x):
        return search_block(adapter.layout_of_block(block), block, search, x, state, places)
