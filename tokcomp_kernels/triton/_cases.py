"""Calls of every operator that meet every kernel, for a driver that compiles what they would launch.

Shapes are those of real blocks: ViT-T, S, B, L and H at their published budgets, whose tensors' values are never looked
at. The others reach what those do not: entries of the tables of tile sizes for narrow, wide and long inputs, and blocks
further in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BATCH = 2


@dataclass(frozen=True)
class Case:
    """A call of one operator's Triton launcher."""

    op: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """A transformer block's heads, their width, and its tokens before pruning, after it, and after merging."""

    name: str
    heads: int
    width: int
    tokens: int
    pruned: int
    merged: int

    @property
    def channels(self) -> int:
        return self.heads * self.width


#: The first block of each model that drops tokens.
BLOCKS = (
    Block("T", 3, 64, 197, 196, 187),
    Block("S", 6, 64, 197, 192, 180),
    Block("B", 12, 64, 197, 192, 178),
    Block("L", 16, 64, 192, 176, 160),
    Block("H", 16, 80, 257, 248, 242),
)
LATE_BLOCKS = (
    Block("T late", 3, 64, 57, 51, 45),
    Block("S late", 6, 64, 112, 97, 92),
    Block("H late", 16, 80, 128, 120, 112),
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _qkv(dtype: torch.dtype, heads: int, tokens: int, width: int) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D] as a packed projection [B, N, 3, H, D] holds them."""
    return _rows(dtype, _BATCH, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)


def block_cases() -> Iterator[Case]:
    """Every operator, forward and backward, in BLOCKS and all dtypes; tokens have sizes."""
    for dtype in DTYPES:
        for block in BLOCKS:
            yield from _block_cases(block, dtype, sizes=True)


def cases() -> Iterator[Case]:
    """Calls that meet every entry of every table, and every kernel that a published schedule launches."""
    yield from block_cases()
    for dtype in DTYPES:
        for block in BLOCKS:
            yield from _block_cases(block, dtype, sizes=False)
        for block in LATE_BLOCKS:
            yield from _block_cases(block, dtype, sizes=True)
        yield from _attention_cases(dtype)
        yield from _other_cases(dtype)


def _block_cases(block: Block, dtype: torch.dtype, *, sizes: bool) -> Iterator[Case]:
    tokens, channels = block.tokens, block.channels
    x, kept = _rows(dtype, _BATCH, tokens, channels), _rows(dtype, _BATCH, block.merged, channels)
    vector, per_token = _rows(dtype, channels), _rows(torch.float32, _BATCH, tokens)
    source = torch.zeros(_BATCH, tokens, dtype=torch.int64)
    q, k, v = _qkv(dtype, block.heads, tokens, block.width)
    scores = _rows(dtype, _BATCH, block.heads, tokens, tokens)
    counts = torch.tensor([block.pruned, block.merged])
    grad_out = torch.zeros_like(q)
    name = f"{block.name} {_name(dtype)}" + ("" if sizes else " ones")
    size = per_token if sizes else None
    sized = {"size": size}
    call, norm = (per_token, block.pruned, block.merged), (vector, vector)
    yield Case("attention", name, (q, k, v), sized)
    yield Case("_attention_heads", name, (q, k, v), sized)
    yield Case("masked_attention", name, (q, k, v, per_token), sized)
    yield Case("_attention_backward", name, (grad_out, q, k, v), sized)
    yield Case("_masked_attention_backward", name, (grad_out, q, k, v, per_token), sized)
    yield Case("class_attention_sort", name, (q[:, :, 0], k, size))
    yield Case("attention_received", name, (q, k), sized)
    yield Case("prune_merge", name, (x, *call), sized)
    yield Case("prune_merge_norm", name, (x, x, *call, *norm), sized)
    by_heads = _rows(torch.float32, _BATCH, block.heads, tokens)
    yield Case("prune_merge_norm", f"{name} heads", (x, x, by_heads, *call[1:], *norm), sized)
    prunes = (per_token, block.merged, block.merged)
    yield Case("prune_merge_norm", f"{name} prunes", (x, x, *prunes, *norm), sized)
    yield Case("tome_merge", name, (x, k.mean(1), 13), sized)
    role, metric = torch.zeros(_BATCH, tokens, dtype=torch.int64), k.mean(1)
    yield Case("bipartite_merge", name, (x, metric, role, 13), sized)
    yield Case("select_diverse", name, (x, block.merged))
    relevance = {"rule": "dpp", "relevance": size}
    yield Case("select_diverse", f"{name} dpp", (x, block.merged), relevance)
    yield Case("_merge_backward", name, (kept, source, size))
    clamped = {**sized, "min_weighted_size": 1.0 if sizes else None}
    yield Case("masked_merge", name, (x, per_token, per_token, counts), clamped)
    if not sizes:
        for average in ("mean", "sum"):
            yield Case("bipartite_merge", f"{name} {average}", (x, metric, role, 13), {"average": average})
        yield Case("bipartite_merge", f"{name} threshold", (x, metric, role, 13), {"threshold": 0.5})
        return
    yield Case("prune_merge", f"{name} prunes", (x, *prunes), sized)
    yield Case("_masked_merge_backward", name, (x, source))
    yield Case("unmerge", name, (kept, source))
    yield Case("unmerge", f"{name} fill", (kept, source), {"pruned_fill": x})
    yield Case("_unmerge_backward", name, (x, source, block.merged))
    yield Case("masked_softmax", name, (scores, per_token))
    yield Case("_masked_softmax_backward", name, (scores, scores, per_token))
    yield Case("add_layer_norm", name, (x, x, *norm))
    side = 14 if block.name.startswith("H") else 16
    images, patches = _rows(dtype, _BATCH, 3, 224, 224), (224 // side) ** 2
    embedding = (_rows(dtype, channels, 3, side, side), vector)
    placed = (_rows(dtype, patches + 1, channels), _rows(dtype, 1, channels))
    yield Case("_embed_patches", name, (images, *embedding, *placed, *norm))
    weight = _rows(dtype, 4 * channels, channels)
    yield Case("linear_gelu", name, (x, weight, _rows(dtype, 4 * channels)))


def _attention_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every number of keys that a single pass is built for, long rows, and widths that no model above has."""
    shapes = [(tokens, 64) for tokens in (16, 32, 48, *range(64, 257, 16), 577)]
    for tokens, width in [*shapes, (32, 80), (64, 80), (128, 128), (577, 128), (197, 160)]:
        q, k, v = _qkv(dtype, 2, tokens, width)
        per_token, grad_out = _rows(torch.float32, _BATCH, tokens), torch.zeros_like(q)
        name = f"N{tokens} D{width} {_name(dtype)}"
        yield Case("attention", name, (q, k, v), {"size": per_token})
        yield Case("attention", f"{name} ones", (q, k, v))
        yield Case("masked_attention", name, (q, k, v, per_token), {"size": per_token})
        yield Case("_attention_backward", name, (grad_out, q, k, v), {"size": per_token})
        yield Case("_masked_attention_backward", name, (grad_out, q, k, v, per_token), {"size": per_token})
        yield Case("class_attention_sort", name, (q[:, :, 0], k, per_token))
        yield Case("attention_received", name, (q, k), {"size": per_token})


def _other_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Entries of the tables for narrow, wide and long inputs."""
    name = _name(dtype)
    per_token = _rows(torch.float32, _BATCH, 197)
    for channels in (64, 1536, 2048):
        x, vector = _rows(dtype, _BATCH, 197, channels), _rows(dtype, channels)
        named = f"C{channels} {name}"
        for merged in (180, 160):  # enough sources to fill more than one tile
            call = (per_token, 192, merged)
            yield Case("prune_merge", f"{named} M{merged}", (x, *call), {"size": per_token})
            yield Case("prune_merge_norm", f"{named} M{merged}", (x, x, *call, vector, vector), {"size": per_token})
        yield Case("add_layer_norm", named, (x, x, vector, vector))
    x, vector = _rows(dtype, _BATCH, 9, 8192), _rows(dtype, 8192)
    yield Case("add_layer_norm", f"C8192 {name}", (x, x, vector, vector))
    for width in (16, 392):  # K of one small tile, and no multiple of its tile
        yield Case("linear_gelu", f"K{width} {name}", (_rows(dtype, 50, width), _rows(dtype, 4 * width, width)))
    for tokens in (577, 4096, 9000):
        scores, mask = _rows(dtype, 1, 1, tokens, tokens), _rows(torch.float32, 1, tokens)
        yield Case("masked_softmax", f"N{tokens} {name}", (scores, mask))
        yield Case("_masked_softmax_backward", f"N{tokens} {name}", (scores, scores, mask))
    # Values to rank in every type that they may have.
    x = _rows(dtype, _BATCH, 197, 384)
    for kind in (dtype, torch.float64):
        importance = _rows(kind, _BATCH, 197)
        named = f"{name} importance {_name(kind)}"
        yield Case("prune_merge", named, (x, importance, 192, 180))
        yield Case("masked_merge", named, (x, importance, importance, torch.tensor([192, 180])))
    # Above the tokens whose rank is counted, ranks come from a sort.
    tokens = 2600
    x = _rows(dtype, 1, tokens, 64)
    yield Case("tome_merge", f"N{tokens} {name}", (x, x, 13))
    role = torch.zeros(1, tokens, dtype=torch.int64)
    yield Case("bipartite_merge", f"N{tokens} {name}", (x, x, role, 13))
    for features in (x, x[:, :577]):
        for rule in ("farthest", "dpp"):
            yield Case("select_diverse", f"N{features.shape[1]} {rule} {name}", (features, 64), {"rule": rule})
