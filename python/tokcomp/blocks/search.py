"""The tokens of one search forward: nothing is dropped, a mask says which are alive (DiffRate, Eq. 8-12).

The published code sorts tokens, sizes and mask in every block. Attention under a mask does not care about the order of
its keys, so here every token stays where it is and only its rank is computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcomp.blocks.attention import masked_attend, prefix_masked_attend
from tokcomp.methods.diffrate import METRICS, score_tokens

#: As published, a merging token's size times its similarity, and any size beside it, is at least this in the search.
MIN_WEIGHTED_SIZE = 1.0


class TokenState(NamedTuple):
    """What is known of the tokens on the way into a block."""

    mask: Tensor  # [B, N] 0 or 1, differentiable
    size: Tensor | None = None  # [B, N] patches per token; None before the first block that may merge
    place: Tensor | None = None  # [B, N] int64: where inference would have each token, for the metric that asks
    joined: Tensor | None = None  # [B, N] int64: the token that each one joined in the block before, itself if none

    @classmethod
    def start(cls, x: Tensor) -> TokenState:
        """Every token of x [B, N, C] alive and one patch large."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return cls(x.new_ones(x.shape[:2], dtype=dtype))


class BlockProxies(NamedTuple):
    """What the proxies say about one block; None where a proxy is fixed or the pipeline has no such step."""

    kept: tuple[Tensor | None, Tensor | None]  # 0-dim tokens to keep by pruning, by merging
    probability: tuple[Tensor | None, Tensor | None]  # [N] probability that the token of each rank is kept


class BlockSearch:
    """One block's part in a search forward: its attention and its reduction of the tokens.

    Args:
        block: index among the model's compressible blocks.
        proxies: what the block's proxies say, or None for a block whose tokens all stay.
        metric, pipeline, seed, similarity_weighted_size: as in :class:`tokcomp.DiffRate`.
        min_weighted_size: least size of the tokens in a merge, where a merged one's own size becomes what it adds; None
            for no bound, as in inference: a merged token keeps its size then.
        num_prefix_tokens: tokens that always stay.
        num_tokens: tokens of every block, prefix included.
        prefix_only: nothing reads the block's other tokens, as in the last block of a class-token model, so they are
            not computed: attention has prefix queries alone, nothing is pruned or merged.
    """

    def __init__(
        self,
        block: int,
        proxies: BlockProxies | None,
        *,
        metric: str,
        pipeline: str,
        seed: int,
        similarity_weighted_size: bool,
        min_weighted_size: float | None,
        num_prefix_tokens: int,
        num_tokens: int,
        prefix_only: bool = False,
    ) -> None:
        self.block = block
        self.proxies = proxies
        self.metric = metric
        self.pipeline = pipeline
        self.seed = seed
        self.similarity_weighted_size = similarity_weighted_size
        self.min_weighted_size = min_weighted_size
        self.num_prefix_tokens = num_prefix_tokens
        self.num_tokens = num_tokens
        self.prefix_only = prefix_only

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: TokenState, *, scale: float, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention under the mask: out [B, H, N, D], and the importance [B, N] of each token (no gradient).

        The importance is empty ([B, 0]) where this block keeps every token; ``prefix_only`` gives [B, H, prefix, D].
        """
        if self.prefix_only:
            out = prefix_masked_attend(self._read(q, 2), k, v, state.mask, scale=scale, size=state.size, bias=bias)
            return out, q.new_empty(q.shape[0], 0)
        needs = METRICS[self.metric] if self.proxies is not None else frozenset[str]()
        out, evidence = masked_attend(q, k, v, state.mask, scale=scale, size=state.size, needs=needs, bias=bias)
        if self.proxies is None:
            return out, q.new_empty(q.shape[0], 0)
        with torch.no_grad():
            return out, score_tokens(self.metric, evidence, self.block, k[:, 0], self.seed)

    def read(self, x: Tensor) -> Tensor:
        """Those of the tokens x [B, N, C] that something reads after this block's attention."""
        return self._read(x, 1)

    def _read(self, x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, 0, self.num_prefix_tokens) if self.prefix_only else x

    def reduce(self, x: Tensor, importance: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Prune and merge the tokens x [B, N, C] by the mask: x with merged destinations, and the new state."""
        if self.proxies is None or self.prefix_only:
            return x, state._replace(joined=None)
        mask = state.mask
        if self.metric == "random" and state.place is not None:
            importance = importance.gather(1, state.place)  # inference scores the places, not the tokens
        everything = importance.new_full((), x.shape[1], dtype=torch.int64)
        prune, merge = (everything if kept is None else kept.detach().long() for kept in self.proxies.kept)
        before_merge = everything if self.pipeline == "merge_prune" else prune
        merged, size, rank, joined = torch.ops.tokcomp.masked_merge(
            x,
            importance,
            mask.detach(),
            torch.stack([before_merge, merge]),
            size=state.size,
            num_prefix_tokens=self.num_prefix_tokens,
            similarity_weighted_size=self.similarity_weighted_size,
            min_weighted_size=self.min_weighted_size,
        )
        if self.proxies.kept[1] is not None:
            x = merged
        else:
            size = state.size  # pruning alone leaves sizes as they are
        mask = self._masked(mask, rank)
        return x, TokenState(mask, size, self._place(state, rank, mask), joined)

    def _masked(self, mask: Tensor, rank: Tensor) -> Tensor:
        """The mask times each step's 0/1 mask, whose gradient goes straight to the token probability (Eq. 9-10, 14)."""
        assert self.proxies is not None
        ranks = torch.arange(mask.shape[1], device=mask.device)  # [N]
        alive = (mask[:1].detach() > 0).sum()  # the same in every image
        steps = list(zip(self.proxies.kept, self.proxies.probability, strict=True))
        for kept, probability in reversed(steps) if self.pipeline == "merge_prune" else steps:
            if kept is None or probability is None:
                continue
            kept = kept.detach()
            stays = (ranks < kept) | (ranks >= alive)  # tokens that died earlier are no business of this step
            takes_part = (kept < alive).to(mask.dtype)  # a kept number that is not below the live tokens has no say
            probability = probability.to(mask.dtype) * takes_part
            factor = stays.to(mask.dtype) + (probability - probability.detach())
            mask = mask * factor.expand(mask.shape[0], -1).gather(1, rank)
            alive = torch.minimum(alive, kept.to(alive.dtype))
        return mask

    def _place(self, state: TokenState, rank: Tensor, mask: Tensor) -> Tensor | None:
        """Inference re-orders the tokens in each block that drops any."""
        if self.metric != "random":
            return None
        before = torch.arange(rank.shape[1], device=rank.device) if state.place is None else state.place
        drops = (mask[:1].detach() > 0).sum() < (state.mask[:1].detach() > 0).sum()
        return torch.where(drops, rank, before)
