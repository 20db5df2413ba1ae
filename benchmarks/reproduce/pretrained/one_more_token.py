"""The staircase rule of "Pruning One More Token is Enough" (WACV 2025), as its published code has it.

Tokens are pruned once, after the attention of the fourth block, and their mean stays. How many follows from two curves
over the number of tokens that all blocks see: measured latency, and accuracy with tokens left out at random before the
first block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokcomp.budgets import LatencyTable, TokenCounts
from tokcomp.methods import Assignment, Evidence, Geometry, Method, Reduced
from torch import Tensor, nn

#: The block that prunes, counted from 0.
BLOCK = 3


class AtRandom(nn.Module):
    """A timm VisionTransformer whose blocks see ``num_tokens`` tokens, the prefix and patches drawn at random."""

    def __init__(self, model: Any, num_tokens: int, seed: int = 0) -> None:
        super().__init__()
        self.model, self.num_tokens = model, num_tokens
        self._draw = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        model, prefix = self.model, self.model.num_prefix_tokens
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        drawn = torch.randperm(x.shape[1] - prefix, generator=self._draw)[: self.num_tokens - prefix] + prefix
        x = x[:, torch.cat([torch.arange(prefix), drawn])]
        return model.forward_head(model.norm(model.blocks(x)))


def tokens_of_most_use(table: LatencyTable, top1: Mapping[int, float], alpha: float = 0.5) -> int:
    """The number of tokens whose utility alpha (1 - L / max L) + (1 - alpha) A / max A is the greatest.

    Args:
        table: from which L follows, all blocks seeing as many tokens.
        top1: A by the numbers of tokens to choose from.
        alpha: weight of the latency; 0.5 as published.
    """

    def milliseconds(tokens: int) -> float:
        counts = torch.full((table.depth,), float(tokens), dtype=torch.float64)
        return table.milliseconds(TokenCounts(counts, counts))

    latency = {tokens: milliseconds(tokens) for tokens in top1}
    slowest, best = max(latency.values()), max(top1.values())
    return max(
        top1, key=lambda tokens: alpha * (1 - latency[tokens] / slowest) + (1 - alpha) * top1[tokens] / best
    )  # fmt: skip


class OneMoreToken(Method):
    """Prunes once, in :data:`BLOCK`, as many tokens as the rule says, and keeps their mean as the last token.

    A token's importance is the attention that it receives, as a share of the most, plus the softmax over the tokens of
    its value's sum. The published code reads the most that any head gives, and divides by the most in the batch; this
    one reads the mean of the heads, and divides by the most in the image.

    Args:
        num_tokens: from :func:`tokens_of_most_use`, the prefix included.
        patches, prefix: tokens of the model.
    """

    needs = frozenset({"image_attn", "values"})

    def __init__(self, num_tokens: int, patches: int, prefix: int = 1) -> None:
        self.num_left_out = max(0, patches - num_tokens - prefix)  # as published: the prefix counts twice

    def __repr__(self) -> str:
        return f"OneMoreToken({self.num_left_out} left out in block {BLOCK})"

    def validate(self, geometry: Geometry) -> None:
        if geometry.depth <= BLOCK:
            raise ValueError(f"model must have more than {BLOCK} blocks, got {geometry.depth}")

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        if block != BLOCK or not self.num_left_out:
            return None
        kept = num_tokens - self.num_left_out - 1  # their mean takes the place of one more
        return Assignment(kept, kept, kept + 1)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        received, values = evidence.require("image_attn"), evidence.require("values")
        return received / received.amax(1, keepdim=True) + values.float().amax(1).sum(-1).softmax(1)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        kept = assignment.num_prune_kept
        x_kept, _, source = torch.ops.tokcomp.prune_merge(x, score, kept, kept, num_prefix_tokens=num_prefix_tokens)
        dropped = source < 0  # [B, N]
        mean = dropped.to(x.dtype).unsqueeze(1) @ x / (x.shape[1] - kept)  # [B, 1, C]
        return Reduced(torch.cat((x_kept, mean), dim=1), None, source.masked_fill(dropped, kept))
