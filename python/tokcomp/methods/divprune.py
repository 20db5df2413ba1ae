"""DivPrune (CVPR 2025) and CDPruner (NeurIPS 2025): keep tokens that are unlike each other, and drop the others."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp.methods.base import Assignment, Evidence, Geometry, Reduced, attention_of, fitted_to_class_token
from tokcomp.methods.keeping import KeepingMethod
from tokcomp.methods.partition import with_rank


class DivPrune(KeepingMethod):
    """Keep the patch tokens that lie farthest from each other, in 1 - cosine, chosen one by one.

    The first is the token whose nearest other is farthest; each next one the token whose nearest kept one is. Tokens
    are compared as they are after the block's attention.

    Args:
        keep_rate, blocks, num_kept: as for :class:`KeepingMethod`.
    """

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return x.detach()

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        kept = self._chosen(score, assignment.num_tokens_out, num_prefix_tokens).sort(1).values  # [B, M]
        slots = torch.arange(kept.shape[1], device=x.device).expand_as(kept)
        source = kept.new_full(x.shape[:2], -1).scatter(1, kept, slots)
        return Reduced(x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2])), None, source)

    def _chosen(self, score: Tensor, num_kept: int, num_prefix_tokens: int) -> Tensor:
        chosen: Tensor = torch.ops.tokcomp.select_diverse(score, num_kept, num_prefix_tokens=num_prefix_tokens)
        return chosen


class CDPruner(DivPrune):
    """Keep the patch tokens that are unlike each other and matter: the greedy maximum of a conditional DPP.

    What is maximised is the determinant, over the kept tokens, of diag(r) cos diag(r), where the relevance r is the
    class token's attention to each token, or without one the attention that it receives, scaled to [0, 1] in each
    image.

    Args:
        keep_rate, blocks, num_kept: as for :class:`KeepingMethod`. A determinant of more tokens than the model is wide
            is 0: of those, the tokens in front are kept.
    """

    needs = frozenset({"cls_attn"})

    def fitted(self, geometry: Geometry) -> CDPruner:
        return fitted_to_class_token(self, geometry)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return with_rank(x.detach(), attention_of(evidence))

    def _chosen(self, score: Tensor, num_kept: int, num_prefix_tokens: int) -> Tensor:
        attention = score[..., -1]
        patches = attention[:, num_prefix_tokens:]
        low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
        relevance = (attention - low + 1e-6) / (high - low + 1e-6)
        chosen: Tensor = torch.ops.tokcomp.select_diverse(
            score[..., :-1], num_kept, relevance=relevance, num_prefix_tokens=num_prefix_tokens, rule="dpp"
        )
        return chosen
