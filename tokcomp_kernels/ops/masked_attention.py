"""masked_attention: attention under a token mask that has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.ops._fake import token_major
from tokcomp_kernels.ops._register import Arguments, register


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """masked_softmax of q k^T * scale + log size, times v (DiffRate Eq. 10-12), and the first row of that softmax.

    Never holds the [B, H, N, N] map, forward or backward.

    Args:
        q, k, v: [B, H, N, D], any strides.
        token_mask: 0 .. 1 per token, [B, N].
        size: Patches in each token, [B, N]; no bias where None.
        scale: Factor of the scores; D ** -0.5 where None.
        eps: As in masked_softmax.

    Returns:
        out [B, H, N, D], a view of contiguous [B, N, H, D]; cls_attn [B, N] float32: row 0 averaged over heads, without
        a gradient. Differentiable in q, k, v and token_mask, also where the mask is 0.

    Raises:
        ValueError: Wrong shapes or devices, no token, eps not positive.
        TypeError: A dtype that is not floating, or not the same for q, k and v.
    """
    return torch.ops.tokcomp.masked_attention(q, k, v, token_mask, size=size, scale=scale, eps=eps)


def _fake(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return token_major(q), q.new_empty(q.shape[0], q.shape[2], dtype=accumulate_dtype(q))


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape))
    return *grads, token_mask.new_empty(token_mask.shape)


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class MaskedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor]:
            q, k, v, token_mask, size, ctx.scale, ctx.eps = flat
            out, cls_attn = arguments.redispatch(keyset, flat)
            ctx.save_for_backward(q, k, v, token_mask, size)
            ctx.mark_non_differentiable(cls_attn)
            return out, cls_attn

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
            q, k, v, token_mask, size = ctx.saved_tensors
            grads = torch.ops.tokcomp._masked_attention_backward(
                grad_out, q, k, v, token_mask, size=size, scale=ctx.scale, eps=ctx.eps
            )
            return None, *grads, None, None, None

    return MaskedAttention


register(
    "_masked_attention_backward",
    fake=_backward_fake,
)
register(
    "masked_attention",
    fake=_fake,
    autograd=_autograd,
    autocast=("q", "k", "v"),
)
