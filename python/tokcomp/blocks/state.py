"""What one block of one forward pass knows about its tokens. Passed through calls, never kept on a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp.blocks.attention import MASK_EPS, NO_EPS
from tokcomp.blocks.places import Places
from tokcomp.fastpath import Products
from tokcomp.fastpath.rows import Rows
from tokcomp.methods.base import Assignment, Evidence, Method, Norm, reduces_in_one
from tokcomp.methods.learned import Standing


def compose_sources(first: Tensor, then: Tensor) -> Tensor:
    """The source map [B, N] of one step after another: ``first`` [B, N] leads into ``then`` [B, M]; -1 stays -1."""
    return then.gather(1, first.clamp(min=0)).masked_fill(first < 0, -1)


class BlockState:
    """The tokens' sizes on the way into a block and, once it has run, on the way out.

    A fresh one is made per block and forward pass, so threads, replicas and recomputation never share any.
    """

    def __init__(
        self,
        method: Method,
        block: int,
        num_tokens: int,
        num_prefix_tokens: int,
        size: Tensor | None,
        products: Products | None = None,
        layout: Any = None,
        places: Places | None = None,
        stock: bool = False,
        standing: Standing | None = None,
    ) -> None:
        self.method = method
        self.block = block
        self.num_prefix_tokens = num_prefix_tokens
        self.size = size  # [B, N] float32, None before the first merge; 0 for padding
        self.source: Tensor | None = None  # [B, N] int64 once the block has compressed
        self.assignment: Assignment | None = method.assign(block, num_tokens, num_prefix_tokens)
        self.evidence = Evidence()
        self.products = products  # weights for the fast path, None where the ordinary path runs
        self.layout = layout  # where the block keeps its parts: adapters.layout.Layout
        self.places = places  # of the tokens, for a family whose attention goes by them
        self.stock = stock  # whether the model's own attention runs, not ours
        self.standing = standing  # what a learned method says, which acts between the blocks
        #: The next block's first norm, where the fast path may apply it, and what came of it; see timm_vit/fast.py.
        self.following: Norm | None = None
        self.normalized: Tensor | None = None  # on the way in: this block's first norm of x, where that is done

    @property
    def needs(self) -> frozenset[str]:
        """What the block's attention has to deliver; nothing where the block drops nothing."""
        if self.standing is not None:
            return self.standing.needs
        return self.method.needs if self.assignment is not None else frozenset()

    @property
    def attention_size(self) -> Tensor | None:
        """Sizes for proportional attention, or None where attention has no bias."""
        return self.size if self.method.proportional_attention else None

    @property
    def takes_heads(self) -> bool:
        """Whether attention may leave its class row by heads, [B, H, N]: its reader averages it, or there is none."""
        if "cls_attn" not in self.needs:
            return True
        return self.method.averages_heads and reduces_in_one(type(self.method)) and self.places is None

    @property
    def mask(self) -> Tensor | None:
        """1 for tokens and 0 for padding, [B, N]; None where there is none. A learned method's may have a gradient."""
        if self.standing is not None and self.standing.mask is not None:
            return self.standing.mask
        return (self.size > 0).float() if self.method.varies and self.size is not None else None

    @property
    def rows(self) -> Rows | None:
        """Where the batch holds tokens, if enough of it is padding to leave that out; not where there are gradients."""
        filled = self.size if self.standing is None else self.standing.filled
        return Rows.of(filled) if self.method.varies and filled is not None else None

    @property
    def mask_of_rows(self) -> Tensor | None:
        """:attr:`mask` where :attr:`rows` are computed alone; None where that only hides padding."""
        return None if self.standing is None else self.mask

    @property
    def mask_eps(self) -> float:
        """The eps of the softmax under :attr:`mask`."""
        return NO_EPS if self.standing is None or self.standing.mask is None else MASK_EPS

    def reduce(self, x: Tensor) -> Tensor:
        """Compress the tokens x [B, N, C] as this block's assignment says; x itself where it drops nothing."""
        if self.assignment is None:
            return x
        score = self.method.score(self.evidence, self.block, x)
        self.evidence = Evidence()
        x, self.size, self.source = self.method.reduce(
            x, score, self.assignment, size=self.size, num_prefix_tokens=self.num_prefix_tokens
        )
        if self.places is not None:
            kept = self.method.kept_places(score, self.source, x.shape[1], self.num_prefix_tokens)
            self.places = self.places.follow(kept)
        return x

    def reduce_norm(self, x: Tensor, branch: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """:meth:`reduce` of x + branch, both [B, N, C], and ``norm`` of what is left, in as few passes as can be."""
        if self.assignment is None:
            x, normalized = torch.ops.tokcomp.add_layer_norm(x, branch, *norm)
            return x, normalized
        if not reduces_in_one(type(self.method)):
            x = self.reduce(x + branch)
            return x, norm(x)
        score = self.method.score(self.evidence, self.block, x)
        self.evidence = Evidence()
        reduced, normalized = self.method.reduce_norm(
            x,
            branch,
            score,
            self.assignment,
            size=self.size,
            num_prefix_tokens=self.num_prefix_tokens,
            norm=norm,
        )
        x, self.size, self.source = reduced
        return x, normalized
