"""masked_attention backward: the kernels of attention's, with a token mask and its gradient."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton.attention_backward import attention_backward


@checked
def masked_attention_backward_triton(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tokcomp::_masked_attention_backward`` in Triton, for float16, bfloat16 and float32."""
    grad_q, grad_k, grad_v, grad_mask = attention_backward(
        "masked_attention", grad_out, q, k, v, size=size, scale=scale, token_mask=token_mask, eps=eps
    )
    assert grad_mask is not None
    return grad_q, grad_k, grad_v, grad_mask
