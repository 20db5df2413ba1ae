"""tome_merge: ToMe's bipartite soft matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._fake import merged
from tokcomp_kernels.ops._register import Arguments, register


def tome_merge(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r most similar pairs of tokens (ToMe's bipartite soft matching).

    Tokens at even positions each find the odd-positioned token with the largest cosine similarity of ``metric``; the r
    best pairs become size-weighted means. Prefix tokens stand aside on both sides. Ties go to the lower position.

    Args:
        x: Tokens, [B, N, C].
        metric: Features that are compared, [B, N, K]; in ToMe the keys averaged over heads.
        r: Tokens to merge; at most (N - num_prefix_tokens) // 2 are.
        size: Patches in each token, [B, N]; ones where None.
        num_prefix_tokens: Class, distillation and register tokens: never merged, never a destination.

    Returns:
        x [B, M, C], M = N - r: the prefix, the other unmerged tokens of even position, then those of odd position, each
        in the order of position (r = 0: as given); size [B, M] float32; source [B, N] int64, each input token's output
        slot. Differentiable in x alone.

    Raises:
        ValueError: r below 0; wrong shapes.
        TypeError: A dtype that is not floating.
    """
    return torch.ops.tokcomp.tome_merge(x, metric, r, size=size, num_prefix_tokens=num_prefix_tokens)


def _fake(
    x: Tensor, metric: Tensor, r: int, *, num_prefix_tokens: int = 1, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = x.shape[1]
    return merged(x, num_tokens - min(r, (num_tokens - num_prefix_tokens) // 2))


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class ToMeMerge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
            x_out, size_out, source = arguments.redispatch(keyset, flat)
            _x, _metric, _r, size, _num_prefix_tokens = flat
            ctx.save_for_backward(source, size)
            ctx.mark_non_differentiable(size_out, source)
            return x_out, size_out, source

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            source, size = ctx.saved_tensors
            return (None, torch.ops.tokcomp._merge_backward(grad, source, size), *[None] * 4)

    return ToMeMerge


register("tome_merge", fake=_fake, autograd=_autograd)
