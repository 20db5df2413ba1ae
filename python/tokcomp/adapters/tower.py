"""A module that embeds images and runs the blocks, compressing them or under a search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.blocks import require_swapped, search_block
from tokcomp.adapters.images import refuse_symbols
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.swap import Swapped
from tokcomp.blocks.passages import note_passage
from tokcomp.blocks.places import Places
from tokcomp.blocks.positions import Positions
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import Products, has_hooks
from tokcomp.methods.base import Method
from tokcomp.methods.learned import Passage, PassageMethod, Standing
from tokcomp.methods.varying import without_padding
from tokcomp_kernels.product_types import unless_emulated, widened

if TYPE_CHECKING:
    from tokcomp.adapters.isotropic import IsotropicAdapter


class Tower(Swapped):
    """A family's module that embeds images, runs the blocks and finishes as the family does."""

    _tokcomp_adapter: Any  # an IsotropicAdapter; libraries evaluate annotations, where that name is not known

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        refuse_symbols(args[0] if args else next(iter(kwargs.values()), None))
        x, weights = self.tokens(*args, **kwargs)
        with widened(x):
            return self._tokcomp_adapter.finish(self, x, weights, **kwargs)

    def tokens(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Weights | None]:
        """Tokens [B, M, C] after the last block, and what each counts for; None: all the same."""
        raise NotImplementedError


class CompressedTower(Tower):
    """A tower that compresses its tokens by ``_tokcomp_method``."""

    _tokcomp_method: Method

    def tokens(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Weights | None]:
        x, size = self.traced(None, *args, **kwargs)
        return x, None if size is None else Weights(size)

    def traced(
        self, sources: list[Tensor | None] | None, *args: Any, maps: list[Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens after the last block and their sizes [B, M].

        ``sources`` collects each block's source map, ``maps`` every position's token [B, N, C] on the way into block 0
        and out of each block.
        """
        adapter = self._tokcomp_adapter
        x, places = adapter.embed(self, *args, **kwargs)
        self._tokcomp_method.check_tokens(x.shape[1], adapter.num_prefix_tokens(self))
        with unless_emulated(x.device.type):
            return run_blocks(adapter, self, self._tokcomp_method, x, places, sources=sources, maps=maps)


class SearchTower(Tower):
    """A twin of a plain tower, whose blocks go by a token mask."""

    _tokcomp_search: Sequence[BlockSearch]

    def tokens(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Weights | None]:
        adapter, searches = self._tokcomp_adapter, self._tokcomp_search
        x, places = adapter.embed(self, *args, **kwargs)
        wanted = searches[0].num_tokens
        if x.shape[1] != wanted:
            raise ValueError(f"images must give {wanted} tokens as the model's own size does, got {x.shape[1]}")
        layout, state = adapter.layout_of(self), TokenState.start(x)
        with unless_emulated(x.device.type):
            for block, search in zip(adapter.blocks(self), searches, strict=True):
                with widened(x):
                    if adapter.checkpoints(self):
                        x, state = checkpoint(
                            search_block, layout, block, search, x, state, places, use_reentrant=False
                        )
                    else:
                        x, state = search_block(layout, block, search, x, state, places)
        return x, masked_weights(state)


def masked_weights(state: TokenState) -> Weights:
    """What each token counts for at the end of a search forward."""
    return Weights(torch.ones_like(state.mask) if state.size is None else state.size, state.mask)


def run_blocks(
    adapter: IsotropicAdapter,
    tower: Any,
    method: Method,
    x: Tensor,
    places: Places | None,
    *,
    products: Products | None = None,
    normalized: Tensor | None = None,
    sources: list[Tensor | None] | None = None,
    maps: list[Tensor] | None = None,
    depth: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a compressed tower's blocks on the tokens x [B, N, C] that enter block 0.

    Args:
        adapter, tower: whose blocks.
        method: that compresses them.
        x: the tokens.
        places: theirs, where the family's attention goes by them.
        products: those of the blocks that the fast path can run.
        normalized: block 0's first norm of x, where there is one already.
        sources: collects each block's source map.
        maps: collects every position's token [B, N, C] on the way into block 0 and out of each block.
        depth: blocks to run; None: all.

    Returns:
        The tokens left [B, M, C] and their sizes [B, M], None while all are one patch.
    """
    blocks, layout = adapter.blocks(tower), adapter.layout_of(tower)
    prefix = adapter.num_prefix_tokens(tower)
    checkpoints, dtype, stock = adapter.checkpoints(tower), x.dtype, adapter.keeps_attention(tower)
    passage: Passage | None = None
    if isinstance(method, PassageMethod):
        passage = method.begin(x, tower._modules.get(method.name), prefix, len(blocks), tower.training)
    # A hook or a passage may change what leaves a block, so nothing is computed of that beforehand.
    ahead = products is not None and passage is None and not checkpoints and not has_hooks(blocks)

    def run(index: int, x: Tensor, before: BlockState | None, standing: Standing | None) -> tuple[Tensor, BlockState]:
        """One block after the one whose state is ``before``; ``standing``: what a passage tells it."""
        block, own = blocks[index], None
        require_swapped(block, f"block {index}")
        if products is not None:
            own = products if adapter.has_products(block, products) else None
            x = x.to(dtype if own is None else own.dtype)
        size, here = (None, places) if before is None else (before.size, before.places)
        if standing is not None:
            size, here = standing.size, places
            if places is not None and standing.origin is not None:
                here = places.follow(standing.origin)
        state = BlockState(method, index, x.shape[1], prefix, size, own, layout, here, stock, standing)
        if own is not None and ahead:
            state.normalized = normalized if before is None else before.normalized
            if index + 1 < len(blocks) and adapter.has_products(blocks[index + 1], own):
                state.following = adapter.first_norm(blocks[index + 1], x)
        with widened(x):
            return block(x, state=state), state

    state: BlockState | None = None
    positions = None if maps is None else Positions(x)
    for index in range(len(blocks) if depth is None else depth):
        standing: Standing | None = None
        if passage is not None:
            x = passage.enter(index, x.to(dtype))
            standing = passage.standing
        if checkpoints:
            x, state = checkpoint(run, index, x, state, standing, use_reentrant=False)
        else:
            x, state = run(index, x, state, standing)
        source = state.source
        if passage is not None:
            source, x = passage.source, passage.leave(index, x, state.evidence)
        if sources is not None:
            sources.append(source)
        if positions is not None:
            everywhere = None if passage is None else passage.positions(x)
            if everywhere is None:
                positions.follow(x.to(dtype), source)
            else:
                positions.maps.append(everywhere.to(dtype))
    if maps is not None and positions is not None:
        maps.extend(positions.maps)
    size = None if state is None else state.size
    if passage is not None:
        x, size = passage.finish(x), passage.size
        if tower.training:
            note_passage(passage)
    if method.varies and size is not None:
        x = without_padding(x, size)
    return x.to(dtype), size
