"""prune_merge: keep the important, merge the similar, drop the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._fake import merged
from tokcomp_kernels.ops._register import Arguments, register


def prune_merge(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prune and merge tokens (DiffRate, section 3, as its published inference does).

    The prefix tokens as they stand, then the others by descending importance (ties by lower index, NaN last), give each
    token its rank. The first M ranks are kept; each token ranked M .. P - 1 goes into the kept token, prefix excepted,
    to which its cosine similarity is largest; what ranks lower is pruned. P = min(N, num_prune_kept), M = min(P,
    num_merge_kept).

    Args:
        x: Tokens, [B, N, C], of any floating dtype and any strides.
        importance: Score of each token, [B, N], or by heads, [B, H, N], whose mean counts; the prefix's are not looked
            at.
        num_prune_kept: Tokens left by pruning, prefix included.
        num_merge_kept: Tokens left by merging, prefix included.
        size: Patches in each token, [B, N]; ones where None.
        num_prefix_tokens: Class, distillation and register tokens: never pruned, merged or a destination.
        similarity_weighted_size: Whether a merged token adds its size times its cosine similarity, or its whole size.

    Returns:
        x [B, M, C], the plain mean of each group, in the order of rank; size [B, M] float32, at least 1e-6;
        source [B, N] int64, the output slot each input token went to, -1 where it was pruned.
        Differentiable in x alone.

    Raises:
        ValueError: num_prune_kept below num_prefix_tokens; num_merge_kept not above it where tokens merge; wrong
        shapes. TypeError: A dtype that is not floating.
    """
    return torch.ops.tokcomp.prune_merge(
        x,
        importance,
        num_prune_kept,
        num_merge_kept,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
    )


def _fake(
    x: Tensor, importance: Tensor, num_prune_kept: int, num_merge_kept: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return merged(x, min(x.shape[1], num_prune_kept, num_merge_kept))


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class PruneMerge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
            x_out, size_out, source = arguments.redispatch(keyset, flat)
            ctx.save_for_backward(source)
            ctx.mark_non_differentiable(size_out, source)
            return x_out, size_out, source

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            (source,) = ctx.saved_tensors
            return (None, torch.ops.tokcomp._merge_backward(grad, source), *[None] * 6)

    return PruneMerge


def _merge_backward_fake(grad: Tensor, source: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(source.shape[0], source.shape[1], grad.shape[2])


register(
    "_merge_backward",
    fake=_merge_backward_fake,
)
register(
    "prune_merge",
    fake=_fake,
    autograd=_autograd,
)
