"""masked_merge: prune_merge's merge for a search, in which every token stays at its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._fake import merged
from tokcomp_kernels.ops._register import Arguments, register


def masked_merge(
    x: Tensor,
    importance: Tensor,
    token_mask: Tensor,
    counts: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    min_weighted_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rank the live tokens and merge some of them into others, all of them staying where they are (DiffRate's search).

    The prefix tokens as they stand, then the other live tokens by descending importance (ties by lower index, NaN
    last), then the dead ones by index, give each token its rank. With P the smaller of num_before_merge and the number
    of live tokens, and K = num_merge_kept: where num_prefix_tokens < K < P, each token of rank K .. P - 1 merges into
    the one of rank num_prefix_tokens .. K - 1 to which its cosine similarity is largest (ties: lowest rank). Otherwise
    nothing merges.

    Args:
        x: Tokens, [B, N, C], of any floating dtype and any strides.
        importance: Score of each token, [B, N]; those of prefix and dead tokens are not looked at.
        token_mask: [B, N], floating; a token is alive where it is above 0. Prefix tokens always are.
        counts: num_before_merge and num_merge_kept, prefix included: [2] int64 on the device of x, and any values. No
            backend reads them on the host.
        size: Patches in each token, [B, N]; ones where None.
        num_prefix_tokens: Class, distillation and register tokens: never merged or a destination.
        similarity_weighted_size: Whether a merged token adds its size times its cosine similarity, or its whole size.
        min_weighted_size: Where given (the published search: 1), what a merged token adds becomes its own size too,
            and the sizes of all tokens of rank below P are at least this before they are added up.

    Returns:
        x [B, N, C], a destination being the plain mean of itself and what merged into it, every other token (those
        merged included) a copy; size [B, N] float32, at least 1e-6; rank [B, N] int64; destination [B, N] int64, the
        index of the token that each one merged into, and its own index for all others. Differentiable in x alone.

    Raises:
        ValueError: Wrong shapes or devices; min_weighted_size NaN.
        TypeError: counts not int64, or a dtype that is not floating.
    """
    return torch.ops.tokcomp.masked_merge(
        x,
        importance,
        token_mask,
        counts,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
        min_weighted_size=min_weighted_size,
    )


def _fake(x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_out, size, rank = merged(x, x.shape[1])
    return x_out, size, rank, rank.new_empty(rank.shape)


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class MaskedMerge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            x_out, size_out, rank, destination = arguments.redispatch(keyset, flat)
            ctx.save_for_backward(destination)
            ctx.mark_non_differentiable(size_out, rank, destination)
            return x_out, size_out, rank, destination

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            (destination,) = ctx.saved_tensors
            return (None, torch.ops.tokcomp._masked_merge_backward(grad, destination), *[None] * 7)

    return MaskedMerge


def _backward_fake(grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(grad.shape)


register(
    "_masked_merge_backward",
    fake=_backward_fake,
)
register(
    "masked_merge",
    fake=_fake,
    autograd=_autograd,
)
