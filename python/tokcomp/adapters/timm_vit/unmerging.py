"""Mixins for methods that merge for the MLP alone: every block sees all tokens, so the model keeps its feature maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcomp.adapters.blocks import refuse_mask
from tokcomp.adapters.layout import Layout
from tokcomp.adapters.timm_vit import fast
from tokcomp.adapters.timm_vit.modules import CompressedModel, CompressedTimmBlock
from tokcomp.blocks.state import BlockState
from tokcomp.methods.base import Evidence, Method, Reduced


class Place(NamedTuple):
    """What a block has to know to run on its own, which forward_intermediates of timm lets it do."""

    method: Method
    block: int
    num_prefix_tokens: int
    layout: Layout


class UnmergingBlock(CompressedTimmBlock):
    """timm's Block whose MLP runs on merged tokens."""

    _tokcomp_place: Place

    def forward(self, x: Tensor, *args: Any, state: BlockState | None = None, **kwargs: Any) -> Tensor:
        refuse_mask(*args, **kwargs)
        if state is None:
            method, block, prefix, layout = self._tokcomp_place
            state = BlockState(method, block, x.shape[1], prefix, None, layout=layout)
        if state.assignment is None:
            return super().forward(x, state=state)
        if state.products is not None:
            with torch._C._AutoDispatchBelowAutograd():  # as in fast.run_block
                x = fast.attention_half(self, x, state, state.products)
                merged = _merge(x, state)
                branch = fast.mlp_branch(self, merged.x, state.products)
                return state.method.spread(x, merged.x, branch, merged.source)
        x = self.attention_half(x, state)
        merged = _merge(x, state)
        branch = state.layout.mlp_branch(self, merged.x)
        return state.method.spread(x, merged.x, branch, merged.source)


class UnmergingModel(CompressedModel):
    """timm's VisionTransformer with a token for every position after each block."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of tokens [B, N, C]; none of them stands for more than one patch."""
        return self._head(x, None, pre_logits)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm's own: tokens or feature maps after chosen blocks, without the packed weights of the CPU path."""
        return super(CompressedModel, self).forward_intermediates(*args, **kwargs)  # type: ignore[misc]


def _merge(x: Tensor, state: BlockState) -> Reduced:
    """The tokens for the MLP. Sizes end with the block, and so does the map: after it, each position has its own."""
    assert state.assignment is not None
    score = state.method.score(state.evidence, state.block, x)
    state.evidence = Evidence()
    return state.method.reduce(x, score, state.assignment, size=None, num_prefix_tokens=state.num_prefix_tokens)
