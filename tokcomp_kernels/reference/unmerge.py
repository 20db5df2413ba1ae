"""Token uncompression: every position takes the token of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import gather_rows, scatter_add_rows


@checked
def unmerge_reference(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> Tensor:
    batch, num_kept, channels = x.shape
    fill = x.new_zeros(batch, source.shape[1], channels) if pruned_fill is None else pruned_fill
    if num_kept == 0:
        return fill.clone(memory_format=torch.contiguous_format)
    alive = (source >= 0) & (source < num_kept)
    return torch.where(alive[:, :, None], gather_rows(x, torch.where(alive, source, 0)), fill)


@checked
def unmerge_backward_reference(grad: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    batch, _, channels = grad.shape
    alive = (source >= 0) & (source < num_tokens)
    # One slot more than there are tokens takes what was pruned, and is dropped.
    total = torch.zeros(batch, num_tokens + 1, channels, dtype=accumulate_dtype(grad), device=grad.device)
    total = scatter_add_rows(total, torch.where(alive, source, num_tokens), grad.to(total.dtype))
    return total[:, :num_tokens].to(grad.dtype).contiguous()
