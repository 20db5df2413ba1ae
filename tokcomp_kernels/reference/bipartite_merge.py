"""Merging over any partition: sources join the destinations that they resemble most."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import (
    cosine,
    descending_order,
    effective_size,
    gather_rows,
    size_or_ones,
    sum_per_slot,
)

#: Rows of the similarity that are held at a time.
CHUNK = 256


@checked
def bipartite_merge_reference(
    x: Tensor,
    metric: Tensor,
    role: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    average: str = "size",
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    num_kept = x.shape[1] - r if threshold is None else x.shape[1]
    source, place, used = _matched(metric.detach(), role, r, threshold, num_kept)
    dtype = accumulate_dtype(x)
    token_size = size_or_ones(size, x)
    weight = token_size if average == "size" else torch.ones_like(token_size)
    total = sum_per_slot(x.to(dtype) * weight[:, :, None], source, num_kept)
    divisor = torch.ones_like(total[..., :1])
    if average != "sum":
        divisor = torch.where(used, sum_per_slot(weight, source, num_kept), 1)[:, :, None]
    # A token that took part in no merge is copied, not multiplied and divided.
    joined = sum_per_slot(torch.ones_like(source), source, num_kept) > 1
    x_out = torch.where(joined[:, :, None], total / divisor, gather_rows(x, place).to(dtype))
    x_out = x_out.masked_fill(~used[:, :, None], 0)
    size_out = effective_size(sum_per_slot(token_size, source, num_kept), dtype).masked_fill(~used, 0)
    return x_out.to(x.dtype), size_out, source


def _matched(
    metric: Tensor, role: Tensor, r: int, threshold: float | None, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """source [B, N], the token that every slot had before the merge [B, M], and which slots are no padding [B, M]."""
    batch, num_tokens, _ = metric.shape
    features = metric.to(accumulate_dtype(metric))
    is_destination = role == 2
    found = [features.new_zeros(2, batch, 0)]
    for start in range(0, num_tokens, CHUNK):
        rows = cosine(features[:, start : start + CHUNK], features)  # [B, CHUNK, N]
        best = rows.masked_fill(~is_destination[:, None], float("-inf")).max(2)  # the lowest index where several are
        found.append(torch.stack((best.values, best.indices.to(best.values.dtype))))
    best_similarity, best_token = torch.cat(found, 2).unbind()
    can_merge = (role == 1) & is_destination.any(1, keepdim=True)
    first = descending_order(torch.where(can_merge, best_similarity, float("-inf")), 0)[:, :r]
    merged = torch.zeros_like(can_merge).scatter(1, first, True) & can_merge
    if threshold is not None:
        merged &= best_similarity > threshold
    slots = (~merged).cumsum(1) - 1  # of the tokens that do not merge
    source = torch.where(merged, slots.gather(1, best_token.long()), slots)
    # Fewer sources than r: the last tokens find no slot.
    source = source.masked_fill(source >= num_kept, -1)
    used = torch.arange(num_kept, device=metric.device) < (~merged).sum(1, keepdim=True)
    return source, merged.to(torch.int32).sort(dim=1, stable=True).indices[:, :num_kept], used
