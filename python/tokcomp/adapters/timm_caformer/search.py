"""timm's CAFormer under the search: the third stage's tokens stay, masked, and are spread over the grid by the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.blocks import search_attention
from tokcomp.adapters.images import check_images
from tokcomp.adapters.timm_caformer.modules import LAYOUT, join_grid, split_grid
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp_kernels.product_types import unless_emulated, widened


class _Positions(NamedTuple):
    """What each position of the grid reads at the end of the stage."""

    token: Tensor  # [B, N] int64: the token that the position is in
    fill: Tensor  # [B, N, C]: what it had when it was pruned; read where that has happened
    pruned: Tensor  # [B, N] bool


def check_search(model: Any) -> None:
    """Raise unless the model ends in a classifier or pooled features that a loss can be taken of."""
    if not model.head.global_pool.pool_type:
        raise UnsupportedModelError("global_pool='' leaves the positions unpooled, so a search has no logits to go by")


def run_search(model: Any, stage_index: int, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
    """Logits [B, classes] of images [B, 3, H, W], the blocks of one stage compressed as ``blocks`` say."""
    check_images(model.stem, images)
    with unless_emulated(images.device.type), widened(images):
        x = _run_stages(model, stage_index, images, blocks)
        return model.forward_head(x)


def _run_stages(model: Any, stage_index: int, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
    x = model.stem(images)
    for stage in model.stages[:stage_index]:
        x = stage(x)
    stage = model.stages[stage_index]
    x, height, width = split_grid(stage.downsample(x))
    wanted = blocks[0].num_tokens
    if x.shape[1] != wanted:
        raise ValueError(f"images must give {wanted} tokens as the model's own size does, got {x.shape[1]}")
    state = TokenState.start(x)
    every = torch.arange(wanted, device=x.device).expand(x.shape[:2])
    positions = _Positions(every, x, torch.zeros_like(every, dtype=torch.bool))
    for block, search in zip(stage.blocks, blocks, strict=True):
        if stage.grad_checkpointing and torch.is_grad_enabled():
            x, state, positions = checkpoint(_run_block, block, search, x, state, positions, use_reentrant=False)
        else:
            x, state, positions = _run_block(block, search, x, state, positions)
    x = join_grid(_spread(x, state, positions), height, width)
    for stage in model.stages[stage_index + 1 :]:
        x = stage(x)
    return x


def _run_block(
    block: Any, search: BlockSearch, x: Tensor, state: TokenState, positions: _Positions
) -> tuple[Tensor, TokenState, _Positions]:
    before: list[Tensor] = []
    x, state = search_attention(LAYOUT, block, search, x, state, before=before)
    positions = _follow(positions, before[0], state, prunes="prune" in search.pipeline)
    return LAYOUT.add_mlp(block, x), state, positions


def _follow(positions: _Positions, before: Tensor, state: TokenState, *, prunes: bool) -> _Positions:
    """Where the positions are once a block's tokens ``before`` [B, N, C] have been pruned and merged."""
    if state.joined is None:
        return positions
    token = state.joined.gather(1, positions.token)
    if not prunes:
        return positions._replace(token=token)
    # A token that was merged away left its positions to a live one; where none is alive, they were pruned.
    pruned = state.mask.detach().gather(1, token) <= 0
    newly = (pruned & ~positions.pruned).unsqueeze(-1)
    fill = torch.where(newly, _rows(before, positions.token), positions.fill.to(before.dtype))
    return _Positions(token, fill, pruned)


def _spread(x: Tensor, state: TokenState, positions: _Positions) -> Tensor:
    """The value of every position: its group's token, or what it had when it was pruned.

    The mask's gradient is the difference between that and the position's own token, had it stayed.
    """
    read = torch.where(positions.pruned.unsqueeze(-1), positions.fill.to(x.dtype), _rows(x, positions.token))
    mask = state.mask.to(x.dtype).unsqueeze(-1)  # [B, N, 1]
    return mask * x + (1 - mask) * read


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] at index [B, M]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))
