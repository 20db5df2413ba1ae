"""Attention under a token mask that has a gradient: masked_softmax of scaled, size-biased scores, times v."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checks import check_masked_attention, check_masked_attention_backward
from tokcomp_kernels.reference._common import accumulate_dtype, log_size_bias, token_major
from tokcomp_kernels.reference.masked_softmax import masked_probabilities, masked_probabilities_backward


def _scores(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    return (q @ k.mT) * scale + log_size_bias(size, q.dtype)


def masked_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    check_masked_attention(q, k, v, token_mask, size=size, scale=scale, eps=eps)
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = masked_probabilities(_scores(q.to(dtype), k.to(dtype), size, scale), token_mask, eps)[0]
    out = (probabilities @ v.to(dtype)).to(q.dtype)
    return token_major(out), probabilities[:, :, 0].detach().mean(dim=1)


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
    check_masked_attention_backward(grad_out, q, k, v, token_mask, size=size, scale=scale, eps=eps)
    like = q.dtype
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad_out = (tensor.to(dtype) for tensor in (q, k, v, grad_out))
    scores = _scores(q, k, size, scale)
    probabilities = masked_probabilities(scores, token_mask, eps)[0]
    grad_v = probabilities.mT @ grad_out
    grad_scores, grad_mask = masked_probabilities_backward(grad_out @ v.mT, scores, token_mask, eps)
    grad_q, grad_k = (grad_scores @ k) * scale, (grad_scores.mT @ q) * scale
    grad_q, grad_k, grad_v = (grad.to(like).contiguous() for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_mask.to(token_mask.dtype)
