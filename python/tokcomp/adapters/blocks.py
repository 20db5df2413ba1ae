"""A compressing block and its attention, for every family: what is where, the family's layout says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters.layout import Layout
from tokcomp.adapters.swap import Swapped
from tokcomp.blocks.attention import attend, attend_each
from tokcomp.blocks.places import Places
from tokcomp.blocks.search import BlockSearch, TokenState
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import has_hooks
from tokcomp.fastpath.rows import Rows


class CompressedAttention(Swapped):
    """Attention that takes sizes into account and leaves evidence in the block's state."""

    def forward(self, x: Tensor, *args: Any, state: BlockState | None = None, **kwargs: Any) -> Tensor:
        return compressed_attention(self, x, require_state(state, args, kwargs))


class CompressedBlock(Swapped):
    """A block with the tokens reduced between attention and MLP."""

    def forward(self, x: Tensor, *args: Any, state: BlockState | None = None, **kwargs: Any) -> Tensor:
        state = require_state(state, args, kwargs)
        x = state.reduce(self.attention_half(x, state))
        rows = rows_alone(self, state) if state.layout.has_mlp else None
        if rows is None:
            return state.layout.add_mlp(self, x)
        return rows.padded(state.layout.add_mlp(self, rows.packed(x)[None])[0])

    def attention_half(self, x: Tensor, state: BlockState) -> Tensor:
        """x + attention: the block up to where the tokens are reduced. Leaves the evidence in ``state``."""
        layout: Layout = state.layout
        attn, normalized = layout.attention_of(self), layout.attention_input(self, x)
        require_swapped(attn, f"the attention of block {state.block}")
        attended = compressed_attention(self, normalized, state) if attn is self else attn(normalized, state=state)
        return layout.add_attention(self, x, attended)


def compressed_attention(attn: Any, x: Tensor, state: BlockState) -> Tensor:
    """Attention of normalised tokens x [B, N, C] by their sizes; leaves the evidence in ``state``."""
    layout: Layout = state.layout
    rows = rows_alone(attn, state)
    q, k, v = layout.project(attn, x, state.places, state.block, rows)
    settings: dict[str, Any] = {"scale": layout.score_scale(attn), "size": state.attention_size, "needs": state.needs}
    settings |= {"bias": layout.pair_bias(attn, state.places), "eps": state.mask_eps}
    if rows is not None:
        out, state.evidence = attend_each(q, k, v, rows.counts, mask=state.mask_of_rows, **settings)
        return rows.padded(layout.join(attn, rows.packed_heads(out), rows.packed(x)[None])[0])
    stock = partial(layout.stock_attention, attn) if state.stock else None
    settings |= {"dropout_p": layout.dropout_p(attn), "stock": stock, "mask": state.mask}
    out, state.evidence = attend(q, k, v, **settings)
    return layout.join(attn, out, x)


def rows_alone(module: nn.Module, state: BlockState) -> Rows | None:
    """The rows of a padded batch that are all a module in inference need compute; None: all, for whoever watches it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or module.training:
        return None
    rows = state.rows
    return None if rows is None or has_hooks(list(module.modules())) else rows


def search_block(
    layout: Layout,
    block: Any,
    search: BlockSearch,
    x: Tensor,
    state: TokenState,
    places: Places | None = None,
) -> tuple[Tensor, TokenState]:
    """A plain block under the search, for tokens x [B, N, C]: all of them stay, each at its place."""
    x, state = search_attention(layout, block, search, x, state, places)
    return layout.add_mlp(block, x), state


def search_attention(
    layout: Layout,
    block: Any,
    search: BlockSearch,
    x: Tensor,
    state: TokenState,
    places: Places | None = None,
    before: list[Tensor] | None = None,
) -> tuple[Tensor, TokenState]:
    """:func:`search_block` up to its MLP; ``before`` collects the tokens as they were before the reduction."""
    attn = layout.attention_of(block)
    normalized = layout.attention_input(block, x)
    q, k, v = layout.project(attn, normalized, places, search.block)
    bias = layout.pair_bias(attn, places)
    out, importance = search.attend(q, k, v, state, scale=layout.score_scale(attn), bias=bias)
    branch = layout.join(attn, out, search.read(normalized))
    x = layout.add_attention(block, search.read(x), branch)
    if before is not None:
        before.append(x)
    return search.reduce(x, importance, state)


def require_swapped(module: Any, what: str) -> None:
    """Raise RuntimeError for a block or an attention that took the place of a compressed one; it may be wrapped."""
    if not isinstance(module, Swapped) and not any(isinstance(part, Swapped) for part in module.modules()):
        raise RuntimeError(
            f"{what} must be as compress left it, got {type(module).__name__}, which was put in afterwards: call "
            "tokcomp.compress again"
        )


def require_state(state: BlockState | None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """The state that the model hands on to its blocks.

    Raises:
        ValueError: a mask came along.
        RuntimeError: the block was called by someone else.
    """
    refuse_mask(*args, **(kwargs or {}))
    if state is None:
        raise RuntimeError("a block of a compressed model cannot run on its own: call the model, or tokcomp.restore it")
    return state


def refuse_mask(*args: Any, **kwargs: Any) -> None:
    """Raise ValueError for any argument that says something: an attention mask, is_causal."""
    if any(value is not None and value is not False for value in (*args, *kwargs.values())):
        raise ValueError("attn_mask and is_causal cannot be used with a compressed model: its tokens are re-ordered")
