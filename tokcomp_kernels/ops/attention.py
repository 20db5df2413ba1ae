"""attention: proportional attention that also gives the class token's row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.ops._fake import token_major
from tokcomp_kernels.ops._register import Arguments, register


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale + log size) v, and the first row of that softmax (ToMe; DiffRate, section 3).

    Never holds the [B, H, N, N] map.

    Args:
        q, k, v: [B, H, N, D], any strides: views of a packed QKV tensor are read in place.
        size: Patches in each token, [B, N]; no bias where None.
        scale: Factor of the scores; D ** -0.5 where None.

    Returns:
        out [B, H, N, D], a view of contiguous [B, N, H, D]; cls_attn [B, N] float32: row 0 of the softmax averaged over
        heads, without a gradient. Differentiable in q, k, v.

    Raises:
        ValueError: Wrong shapes or devices, no token.
        TypeError: A dtype that is not floating, or not the same for all three.
    """
    return torch.ops.tokcomp.attention(q, k, v, size=size, scale=scale)


def _fake(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return token_major(q), q.new_empty(q.shape[0], q.shape[2], dtype=accumulate_dtype(q))


def _backward_fake(grad_out: Tensor, q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor]:
            q, k, v, size, ctx.scale = flat
            out, cls_attn = arguments.redispatch(keyset, flat)
            ctx.save_for_backward(q, k, v, size)
            ctx.mark_non_differentiable(cls_attn)
            return out, cls_attn

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
            q, k, v, size = ctx.saved_tensors
            grads = torch.ops.tokcomp._attention_backward(grad_out, q, k, v, size=size, scale=ctx.scale)
            return None, *grads, None, None

    return Attention


def _heads_fake(q: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return token_major(q), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q))


register(
    "_attention_heads",
    fake=_heads_fake,
    autocast=("q", "k", "v"),
)
register(
    "_attention_backward",
    fake=_backward_fake,
)
register(
    "attention",
    fake=_fake,
    autograd=_autograd,
    autocast=("q", "k", "v"),
)
