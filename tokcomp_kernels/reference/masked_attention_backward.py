"""Gradient of masked_attention; recomputes each row."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference.masked_attention import biased_scores
from tokcomp_kernels.reference.masked_softmax import masked_probabilities, masked_probabilities_backward


@checked
def masked_attention_backward_reference(
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
    like = q.dtype
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad_out = (tensor.to(dtype) for tensor in (q, k, v, grad_out))
    scores = biased_scores(q, k, size, scale)
    probabilities = masked_probabilities(scores, token_mask, eps)[0]
    grad_v = probabilities.mT @ grad_out
    grad_scores, grad_mask = masked_probabilities_backward(grad_out @ v.mT, scores, token_mask, eps)
    grad_q, grad_k = (grad_scores @ k) * scale, (grad_scores.mT @ q) * scale
    grad_q, grad_k, grad_v = (grad.to(like).contiguous() for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_mask.to(token_mask.dtype)
