"""Gradient of a group mean, for prune_merge (plain) and tome_merge (size-weighted)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import effective_size, gather_rows


@checked
def merge_backward_reference(grad: Tensor, source: Tensor, size: Tensor | None = None) -> Tensor:
    batch, num_kept, channels = grad.shape
    if num_kept == 0:
        return grad.new_zeros(batch, source.shape[1], channels)
    dtype = accumulate_dtype(grad)
    alive = (source >= 0) & (source < num_kept)  # [B, N]
    slot = torch.where(alive, source, 0)
    weight = torch.ones_like(source, dtype=dtype) if size is None else effective_size(size, dtype)
    weight = torch.where(alive, weight, 0.0)
    total = torch.zeros(batch, num_kept, dtype=dtype, device=grad.device).scatter_add(1, slot, weight)
    share = weight / total.gather(1, slot)
    grad_x = gather_rows(grad, slot).to(dtype) * share[:, :, None]
    return torch.where(alive[:, :, None], grad_x, 0.0).to(grad.dtype)
