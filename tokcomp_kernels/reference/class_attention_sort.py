"""Class attention and the order it gives (DiffRate Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import descending_order, log_size_bias


@checked
def class_attention_sort_reference(
    q_cls: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(k)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    scores = (q_cls.to(dtype)[:, :, None, :] @ k.to(dtype).mT) * scale + log_size_bias(size, dtype)  # [B, H, 1, N]
    cls_attn = torch.softmax(scores, dim=-1).squeeze(2).mean(dim=1)  # [B, N]
    return cls_attn, descending_order(cls_attn, num_prefix_tokens)
