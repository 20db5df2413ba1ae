"""masked_attention forward: the kernel of attention, with a token mask."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton.attention import attention_forward, mean_of_heads


@checked
def masked_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``tokcomp::masked_attention`` in Triton, for float16, bfloat16 and float32; see ``ops/masked_attention.py``."""
    op = "masked_attention"
    out, cls_rows = attention_forward(op, q, k, v, size=size, scale=scale, token_mask=token_mask, eps=eps)
    return out, mean_of_heads(cls_rows)
