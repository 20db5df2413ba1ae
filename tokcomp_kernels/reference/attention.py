"""Proportional attention (ToMe; DiffRate, section 3): softmax(q k^T * scale + log size) v, and the class row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import log_size_bias, token_major


def probabilities_of(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    return torch.softmax((q @ k.mT) * scale + log_size_bias(size, q.dtype), dim=-1)


@checked
def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    out, cls_attn = attention_heads_reference(q, k, v, size=size, scale=scale)
    return out, cls_attn.mean(dim=1)


@checked
def attention_heads_reference(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = probabilities_of(q.to(dtype), k.to(dtype), size, scale)
    out = (probabilities @ v.to(dtype)).to(q.dtype)
    return token_major(out), probabilities[:, :, 0].detach().contiguous()
