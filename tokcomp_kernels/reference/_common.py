"""What several references share: sizes, order, cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._numbers import MIN_SIZE, accumulate_dtype


def head_mean(importance: Tensor) -> Tensor:
    """Importance [B, N] as it is; of heads, [B, H, N], their mean."""
    return importance if importance.dim() == 2 else importance.to(accumulate_dtype(importance)).mean(1)


def effective_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Sizes as every backend reads and writes them: NaN and whatever is not above the floor become the floor."""
    size = size.to(dtype)
    return torch.where(size > MIN_SIZE, size, MIN_SIZE)


def size_or_ones(size: Tensor | None, like: Tensor) -> Tensor:
    """[B, N] sizes in the accumulation type of ``like`` [B, N, C]."""
    if size is None:
        return like.new_ones(like.shape[:2], dtype=accumulate_dtype(like))
    return effective_size(size, accumulate_dtype(like))


def descending_order(scores: Tensor, num_prefix_tokens: int) -> Tensor:
    """[B, N] -> [B, N]: the prefix as it stands, then descending; ties by lower index, NaN after all else."""
    num_tokens = scores.shape[1]
    patches = scores[:, num_prefix_tokens:]
    is_nan = patches.isnan()
    # Adding 0.0 makes -0.0 and 0.0 one value for sorts that look at bits.
    by_score = torch.where(is_nan, float("-inf"), patches + 0.0).sort(dim=1, descending=True, stable=True).indices
    by_nan = is_nan.gather(1, by_score).to(torch.int32).sort(dim=1, stable=True).indices
    order = by_score.gather(1, by_nan) + num_prefix_tokens
    prefix = torch.arange(min(num_prefix_tokens, num_tokens), device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([prefix, order], dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[B, S, K], [B, M, K] -> [B, S, M]; 0 with a zero vector and wherever the value is not a number."""
    similarity = (a @ b.mT) * inverse_norm(a)[:, :, None] * inverse_norm(b)[:, None, :]
    return torch.where(similarity.isnan(), 0.0, similarity)


def inverse_norm(rows: Tensor) -> Tensor:
    """[..., K] -> [...]: 0 for a row of zeros and one that is not finite."""
    norm = rows.square().sum(-1).sqrt()
    return torch.where(norm > 0, 1.0 / norm, 0.0)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C], index [B, M] -> [B, M, C]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def scatter_add_rows(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """x [B, M, C] plus rows [B, S, C] added at index [B, S], in the order of S."""
    return x.scatter_add(1, index[:, :, None].expand(-1, -1, x.shape[2]), rows)


def sum_per_slot(values: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """values [B, N, ...], slot [B, N] -> [B, M, ...]: each slot's sum, in the order of N; slot -1 is left out."""
    if values.is_floating_point() and values.device.type == "cuda":
        return sorted_sums(values, slot, num_slots)  # scatter_add's atomics would add up in any order
    index = torch.where(slot < 0, num_slots, slot)
    index = index.view(*index.shape, *[1] * (values.dim() - 2)).expand_as(values)
    shape = (values.shape[0], num_slots + 1, *values.shape[2:])
    return values.new_zeros(shape).scatter_add(1, index, values)[:, :num_slots]


def sorted_sums(values: Tensor, slot: Tensor, num_slots: int) -> Tensor:
    """:func:`sum_per_slot` without atomics: the rows of a slot are brought together, and summed one after the other."""
    batch, num_rows = slot.shape
    index, order = torch.where(slot < 0, num_slots, slot).sort(dim=1, stable=True)
    lengths = index.new_zeros(batch, num_slots + 1).scatter_add(1, index, torch.ones_like(index))
    order = order + num_rows * torch.arange(batch, device=order.device)[:, None]
    rows = values.flatten(0, 1)[order.flatten()]
    sums = torch.segment_reduce(rows, "sum", lengths=lengths.flatten(), unsafe=True, initial=0)
    return sums.view(batch, num_slots + 1, *values.shape[2:])[:, :num_slots]


def log_size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    """log size [B, N] as a bias over keys, [B, 1, 1, N]."""
    return 0.0 if size is None else effective_size(size, dtype).log()[:, None, None, :]


def token_major(out: Tensor) -> Tensor:
    """[B, H, N, D] values as a view of contiguous [B, N, H, D]: joining the heads afterwards costs nothing."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
