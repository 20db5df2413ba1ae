"""The attention that each token receives (DiffRate's importance where there is no class token): mean over queries."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference.attention import probabilities_of


@checked
def attention_received_reference(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> Tensor:
    dtype = accumulate_dtype(q)
    batch, heads, num_tokens, width = q.shape
    scale = width**-0.5 if scale is None else scale
    total = torch.zeros(batch, num_tokens, dtype=dtype, device=q.device)
    for head in range(heads):  # one at a time, so that only [B, 1, N, N] is ever held
        one = slice(head, head + 1)
        total = total + probabilities_of(q[:, one].to(dtype), k[:, one].to(dtype), size, scale).mean(dim=(1, 2))
    return total / heads
