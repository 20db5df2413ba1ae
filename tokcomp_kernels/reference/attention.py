"""Proportional attention (ToMe; DiffRate, section 3): softmax(q k^T * scale + log size) v, and the class row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checks import check_attention, check_attention_backward
from tokcomp_kernels.reference._common import accumulate_dtype, log_size_bias, token_major


def _probabilities(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    return torch.softmax((q @ k.mT) * scale + log_size_bias(size, q.dtype), dim=-1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, size=size, scale=scale)
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = _probabilities(q.to(dtype), k.to(dtype), size, scale)
    out = (probabilities @ v.to(dtype)).to(q.dtype)
    return token_major(out), probabilities[:, :, 0].detach().mean(dim=1)


def attention_backward_reference(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_attention_backward(grad_out, q, k, v, size=size, scale=scale)
    like = q.dtype
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, grad_out = (tensor.to(dtype) for tensor in (q, k, v, grad_out))
    probabilities = _probabilities(q, k, size, scale)
    grad_v = probabilities.mT @ grad_out
    grad_probabilities = grad_out @ v.mT
    mean = (grad_probabilities * probabilities).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - mean)
    grad_q, grad_k = (grad_scores @ k) * scale, (grad_scores.mT @ q) * scale
    grad_q, grad_k, grad_v = (grad.to(like).contiguous() for grad in (grad_q, grad_k, grad_v))
    return grad_q, grad_k, grad_v
