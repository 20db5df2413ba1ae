"""bipartite_merge: merging over a partition that the caller makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._fake import merged
from tokcomp_kernels.ops._register import Arguments, refuse_second_order, register


def bipartite_merge(
    x: Tensor,
    metric: Tensor,
    role: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    average: str = "size",
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r sources of each image that resemble a destination most, each into its most similar one.

    ToMe's soft matching with the sets left to the caller: of every token it says whether it may leave, receive, or
    stands aside. The similarity of all sources with all destinations is never held whole.

    Args:
        x: Tokens, [B, N, C].
        metric: Features whose cosine is the similarity, [B, N, K].
        role: [B, N] int64: 1 a source, 2 a destination, anything else a token that is neither.
        r: Sources to merge in each image, 0 .. N - 1; r = the number of sources merges all.
        size: Patches in each token, [B, N]; ones where None.
        average: What a destination and the sources that joined it become: ``size``, their mean weighted by size;
            ``mean``, the plain mean; ``sum``.
        threshold: A cosine, -1 .. 1: of those r only the sources that resemble their destination more than this merge,
            so that every image keeps as many tokens as it needs.

    Returns:
        x [B, M, C], M = N - r: the tokens that did not merge, in the order of position; size [B, M] float32, the sum of
        each group's; source [B, N] int64, each token's slot. Ties go to the lower position. An image with fewer than r
        sources, or without a destination, loses its last tokens, whose source is -1. With a threshold M = N: behind an
        image's own tokens comes padding, zeros of size 0, and no token is lost. Differentiable in x alone.

    Raises:
        ValueError: r outside 0 .. N - 1; an unknown average; a threshold outside -1 .. 1; wrong shapes or devices.
        TypeError: role not int64; a dtype that is not floating.
    """
    return torch.ops.tokcomp.bipartite_merge(x, metric, role, r, size=size, average=average, threshold=threshold)


def _fake(
    x: Tensor, metric: Tensor, role: Tensor, r: int, *, threshold: float | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return merged(x, x.shape[1] - r if threshold is None else x.shape[1])


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class BipartiteMerge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
            x_out, size_out, source = arguments.redispatch(keyset, flat)
            *_, size, ctx.average, _ = flat
            ctx.save_for_backward(source, size)
            ctx.mark_non_differentiable(size_out, source)
            return x_out, size_out, source

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            source, size = ctx.saved_tensors
            if ctx.average == "sum":
                refuse_second_order("bipartite_merge", grad)
                grad_x = torch.ops.tokcomp.unmerge(grad, source)
            else:
                grad_x = torch.ops.tokcomp._merge_backward(grad, source, size if ctx.average == "size" else None)
            return (None, grad_x, *[None] * 6)

    return BipartiteMerge


register("bipartite_merge", fake=_fake, autograd=_autograd)
