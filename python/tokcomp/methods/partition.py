"""Methods that say of each token whether it may leave, receive or stands aside; bipartite_merge does the rest."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from tokcomp.methods.base import Assignment, Method, Reduced

#: What a token's role is in bipartite_merge.
ASIDE, SOURCE, DESTINATION = 0, 1, 2


class PartitionMethod(Method):
    """Merging over a partition: :meth:`score` gives :func:`with_rank`, and a subclass makes roles of the rank."""

    #: How a destination and the sources that joined it become one token: see ``bipartite_merge``.
    average: ClassVar[str] = "size"

    @abstractmethod
    def roles(self, rank: Tensor, num_dropped: int, num_prefix_tokens: int) -> Tensor:
        """[B, N] int64: what each token is, so that ``num_dropped`` of each image merge.

        Args:
            rank: [B, N], as :meth:`score` gave it.
            num_dropped: tokens that are to leave.
            num_prefix_tokens: tokens in front, which must stand aside.
        """

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        features, rank = score[..., :-1], score[..., -1]
        num_dropped = x.shape[1] - assignment.num_tokens_out
        role = self.roles(rank, num_dropped, num_prefix_tokens)
        merged = torch.ops.tokcomp.bipartite_merge(x, features, role, num_dropped, size=size, average=self.average)
        return Reduced(*merged)

    def kept_places(self, score: Tensor, source: Tensor, num_tokens_out: int, num_prefix_tokens: int) -> Tensor:
        """A destination keeps its place."""
        batch, num_tokens = source.shape
        role = self.roles(score[..., -1], num_tokens - num_tokens_out, num_prefix_tokens)
        every = torch.arange(num_tokens, device=source.device).expand(batch, -1)
        yielding = every + num_tokens * (role == SOURCE)  # a source has its slot's place only where it is alone
        first = source.new_full((batch, num_tokens_out), 2 * num_tokens)
        return first.scatter_reduce(1, source, yielding, "amin") % num_tokens


def with_rank(features: Tensor, rank: Tensor) -> Tensor:
    """Features [B, N, D] with one more number per token [B, N] after them: [B, N, D + 1]."""
    return torch.cat((features, rank.unsqueeze(-1).to(features.dtype)), -1)


def order_of(rank: Tensor, num_prefix_tokens: int) -> Tensor:
    """The patch tokens [B, P] int64 from the highest rank to the lowest; ties by position, NaN last."""
    patches = rank[:, num_prefix_tokens:].nan_to_num(nan=float("-inf"))
    return patches.sort(dim=1, descending=True, stable=True).indices + num_prefix_tokens
