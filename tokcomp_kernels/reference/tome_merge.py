"""ToMe's bipartite soft matching with a size-weighted mean."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import cosine, effective_size, gather_rows, scatter_add_rows, size_or_ones


@checked
def tome_merge_reference(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _ = x.shape
    dtype = accumulate_dtype(x)
    token_size = size_or_ones(size, x)
    positions = torch.arange(num_tokens, device=x.device)
    r = min(r, (num_tokens - num_prefix_tokens) // 2)
    if r == 0:
        return x.clone(memory_format=torch.contiguous_format), token_size, positions.repeat(batch, 1)

    a = positions[num_prefix_tokens + num_prefix_tokens % 2 :: 2]  # unprotected even positions
    b = positions[num_prefix_tokens + 1 - num_prefix_tokens % 2 :: 2]  # unprotected odd positions
    features = metric.detach().to(accumulate_dtype(metric))
    similarity = cosine(features[:, a], features[:, b])  # [B, A, B]
    best = similarity.argmax(dim=2)  # the lowest index where several are best
    best_similarity = similarity.gather(2, best[:, :, None]).squeeze(2)  # [B, A]
    edges = best_similarity.sort(dim=1, descending=True, stable=True).indices
    merged = edges[:, :r].sort(dim=1).values  # [B, r], in position order
    unmerged = edges[:, r:].sort(dim=1).values
    dst = best.gather(1, merged)  # [B, r] into b
    merged, unmerged = a[merged], a[unmerged]

    prefix = positions[:num_prefix_tokens].expand(batch, -1)
    kept = torch.cat([prefix, unmerged, b.expand(batch, -1)], dim=1)  # [B, M] positions, in output order
    dst = dst + num_prefix_tokens + unmerged.shape[1]
    source = torch.empty(batch, num_tokens, dtype=torch.int64, device=x.device)
    source = source.scatter(1, kept, torch.arange(kept.shape[1], device=x.device).expand(batch, -1))
    source = source.scatter(1, merged, dst)

    size_out = token_size.gather(1, kept).scatter_add(1, dst, token_size.gather(1, merged))
    weighted = x.to(dtype) * token_size[:, :, None]
    mean = scatter_add_rows(gather_rows(weighted, kept), dst, gather_rows(weighted, merged)) / size_out[:, :, None]
    # A token that took part in no merge is copied, not multiplied and divided.
    took_part = torch.zeros_like(size_out, dtype=torch.bool).scatter(1, dst, True)
    x_out = torch.where(took_part[:, :, None], mean, gather_rows(x, kept).to(dtype))
    return x_out.to(x.dtype), effective_size(size_out, dtype), source
