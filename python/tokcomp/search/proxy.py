"""The differentiable discrete proxy: one logit per candidate number of tokens to keep (DiffRate, section 4.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Relaxed(NamedTuple):
    """The values of several proxies, which are the first dimension."""

    kept: Tensor  # [K] float64 tokens to keep, prefix included: a whole number, with the gradient of the expectation
    probability: Tensor  # [K, N] float64 probability that the token of each rank is kept (1 - pi of Eq. 8)


class KeptNumber(nn.Module):
    """A learned number of tokens to keep in one block, by pruning or by merging.

    The candidates are P, P - g, P - 2g, ... patch tokens, for P patches and a granularity of g tokens; rho =
    softmax(logits) is their probability (Eq. 7). A fixed proxy's only candidate is P.

    Args:
        num_patches: patch tokens of the model, P.
        granularity: step between two candidates, g.
        num_prefix_tokens: class, distillation and register tokens, which are always kept.
        fixed: keep every token.
    """

    def __init__(self, num_patches: int, granularity: int, num_prefix_tokens: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.num_patches = num_patches
        self.granularity = granularity
        self.num_prefix_tokens = num_prefix_tokens
        self.fixed = fixed
        self.logits = nn.Parameter(torch.zeros(1 if fixed else -(-num_patches // granularity)))

    def extra_repr(self) -> str:
        return f"num_patches={self.num_patches}, granularity={self.granularity}, fixed={self.fixed}"

    def forward(self) -> Tensor:
        """Tokens to keep, prefix included: 0-dim float64, rounded up, with a straight-through gradient."""
        return relax(self.logits.unsqueeze(0), self.num_patches, self.granularity, self.num_prefix_tokens).kept[0]


def relax(logits: Tensor, num_patches: int, granularity: int, num_prefix_tokens: int) -> Relaxed:
    """Kept numbers and token probabilities of K proxies at once: logits [K, candidates].

    In float64 whatever the logits' type, so that an integral expectation is not rounded up to the next integer.
    """
    rho = logits.double().softmax(-1)  # [K, candidates], most tokens first
    steps = torch.arange(rho.shape[-1], device=rho.device, dtype=rho.dtype)
    expected = (rho * (num_patches - granularity * steps)).sum(-1) + num_prefix_tokens
    kept = expected + (expected.ceil() - expected).detach()
    # The last rank is kept only by the first candidate, the g ranks before it by the first two, and so on.
    rising = rho.cumsum(-1).unsqueeze(-1).expand(-1, -1, granularity).flatten(1)[:, :num_patches]
    if rising.shape[1] < num_patches:  # a fixed proxy's only candidate keeps every rank
        rising = rising[:, -1:].expand(-1, num_patches)
    prefix = rho.new_ones(rho.shape[0], num_prefix_tokens)
    return Relaxed(kept, torch.cat([prefix, rising.flip(-1)], dim=1))
