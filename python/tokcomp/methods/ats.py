"""ATS (ECCV 2022): sample tokens by their share of the class attention, as many as differ from each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcomp.methods.base import Assignment, Evidence, Geometry, Reduced, integer, require_class_token
from tokcomp.methods.diffrate import score_tokens
from tokcomp.methods.keeping import parse_blocks
from tokcomp.methods.varying import Packed, VaryingMethod, alive_tokens
from tokcomp_kernels._numbers import accumulate_dtype


class ATS(VaryingMethod):
    """Inverse-transform sampling of the patch tokens, without training; the others are dropped.

    A token's significance is the class token's attention to it times the norm of its value vector over all heads. The
    cumulative sum of the significances in ascending order, scaled to [0, 1], is cut at ``num_samples`` equal steps, and
    at each the token with the nearest sum is taken. Significant tokens are taken many times, so that an image with few
    of them keeps few.

    Args:
        num_samples: how often is sampled, and so the most patch tokens kept; as many as the model has patches, as
            published, drop only what is never taken.
        blocks: indices (from 0) of the blocks that sample; None: every one from 3 on, as published.

    Raises:
        TypeError, ValueError: num_samples is not a whole number above 0; blocks are not block numbers.
    """

    needs = frozenset({"cls_attn", "values"})

    def __init__(self, num_samples: int, blocks: Sequence[int] | None = None) -> None:
        self.num_samples = integer("num_samples", num_samples)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.blocks = None if blocks is None else parse_blocks(blocks)

    def __repr__(self) -> str:
        return f"ATS(num_samples={self.num_samples}, blocks={self.blocks})"

    def validate(self, geometry: Geometry) -> None:
        super().validate(geometry)
        require_class_token("ATS", geometry, "ToMe or DToMe")
        if any(block >= geometry.depth for block in self.blocks or ()):
            raise ValueError(f"blocks must be below the model's depth {geometry.depth}, got {self.blocks}")

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        """At most so many: how many differ, only the images say."""
        if block < 3 if self.blocks is None else block not in self.blocks:
            return None
        most = min(num_tokens, num_prefix_tokens + self.num_samples)
        return Assignment(most, most, most)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return score_tokens("cls_attn_v", evidence, block, x)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        alive = alive_tokens(x, size)
        stay = torch.ones_like(alive)
        stay[:, num_prefix_tokens:] = sampled(
            score[:, num_prefix_tokens:].to(accumulate_dtype(score)),
            alive[:, num_prefix_tokens:],
            self.num_samples,
        )
        packed = Packed.of(stay)
        x = x.gather(1, packed.kept[:, :, None].expand(-1, -1, x.shape[2]))
        source = packed.slot.masked_fill(~stay, -1)
        return Reduced(x * packed.alive[:, :, None], packed.alive.to(accumulate_dtype(x)), source)


def sampled(significance: Tensor, alive: Tensor, num_samples: int) -> Tensor:
    """Which of the tokens [B, P] are taken at least once, [B, P] bool; padding never is."""
    if significance.shape[1] == 0:
        return alive
    score = torch.where(alive, significance, float("inf"))  # padding comes last
    order = score.sort(dim=1, stable=True).indices
    share = significance.masked_fill(~alive, 0).gather(1, order)
    share = share / share.sum(1, keepdim=True)
    total = share.cumsum(1)
    low, high = total[:, :1], total[:, -1:]
    total = ((total - low) / (high - low).clamp_min(torch.finfo(total.dtype).tiny)).contiguous()
    start = torch.where(total > 0, total, 1.0).amin(1, keepdim=True)
    # From the first sum above 0 to 1, at one sample 1 alone.
    steps = torch.arange(1 - num_samples, 1, device=total.device) / max(num_samples - 1, 1) + 1
    levels = start + (1 - start) * steps.to(total.dtype)  # [B, S]
    total = total.masked_fill(~alive.gather(1, order), float("inf"))
    above = torch.searchsorted(total, levels.contiguous())
    above = above.minimum(alive.sum(1, keepdim=True) - 1)
    below = (above - 1).clamp_min(0)
    nearer_below = levels - total.gather(1, below) <= (total.gather(1, above) - levels).abs()
    taken = order.gather(1, torch.where(nearer_below, below, above))
    return torch.zeros_like(alive).scatter(1, taken, True) & alive
