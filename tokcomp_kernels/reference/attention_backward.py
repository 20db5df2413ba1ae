"""Gradient of attention; recomputes each row."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference.attention import probabilities_of


@checked
def attention_backward_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    like = q.dtype
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad_out = (tensor.to(dtype) for tensor in (q, k, v, grad_out))
    probabilities = probabilities_of(q, k, size, scale)
    grad_v = probabilities.mT @ grad_out
    grad_probabilities = grad_out @ v.mT
    mean = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - mean)
    grad_q, grad_k = (grad_scores @ k) * scale, (grad_scores.mT @ q) * scale
    grad_q, grad_k, grad_v = (grad.to(like).contiguous() for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v
