"""Token order: descending values, ties by lower index, NaN after everything else."""

from __future__ import annotations

import triton
import triton.language as tl

#: Up to this many tokens a rank is found by counting the tokens before it; above, by the reference's stable sort.
MAX_COUNTED = 1024


@triton.jit
def descending_key(values):
    """Integers that compare as the values do: -0.0 equals 0.0, NaN is below -inf, and the lowest integer is left free.

    float64 keeps its precision in int64; the other types are exact in float32 and give int32.
    """
    if values.dtype == tl.float64:
        bits = tl.where(values == 0.0, 0.0, values).to(tl.int64, bitcast=True)
        key = tl.where(values != values, -0x7FFFFFFFFFFFFFFF, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    else:
        wide = values.to(tl.float32)
        bits = tl.where(wide == 0.0, 0.0, wide).to(tl.int32, bitcast=True)
        key = tl.where(wide != wide, -0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return key


@triton.jit
def load_mean(values_ptr, offs, inside, stride, num_heads, stride_h, HEADS: tl.constexpr):
    """Values by token; with HEADS their mean over heads, added up in their order."""
    ptrs = values_ptr + offs.to(tl.int64) * stride
    values = tl.load(ptrs, mask=inside, other=0.0)
    if HEADS:
        values = values if values.dtype == tl.float64 else values.to(tl.float32)
        for _ in range(1, num_heads):
            ptrs += stride_h
            values += tl.load(ptrs, mask=inside, other=0.0).to(values.dtype)
        values = values / num_heads
    return values


@triton.jit
def count_before(
    values_ptr,
    offs_i,
    begin,
    end,
    stride,
    BLOCK_J: tl.constexpr,
    num_heads=1,
    stride_h=0,
    HEADS: tl.constexpr = False,
):
    """For each index of ``offs_i``, how many of ``begin .. end - 1`` come before it: larger, or equal and lower.

    With HEADS the values are means over ``num_heads`` rows that lie ``stride_h`` apart.
    """
    key_i = descending_key(load_mean(values_ptr, offs_i, offs_i < end, stride, num_heads, stride_h, HEADS))  # [BLOCK_I]
    before = tl.zeros([offs_i.shape[0], BLOCK_J], tl.int32)
    for start in range(begin, end, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < end
        key_j = descending_key(load_mean(values_ptr, offs_j, mask_j, stride, num_heads, stride_h, HEADS))  # [BLOCK_J]
        # j is before i where key_j > key_i, or key_j == key_i and j < i: for integers, where key_j > key_i - (j < i).
        threshold = key_i[:, None] - (offs_j[None, :] < offs_i[:, None]).to(key_i.dtype)
        before += ((key_j[None, :] > threshold) & mask_j[None, :]).to(tl.int32)  # [BLOCK_I, BLOCK_J]
    return tl.sum(before, axis=1)


@triton.jit
def count_before_live(
    values_ptr,
    mask_ptr,
    offs_i,
    begin,
    end,
    stride,
    stride_mask,
    BLOCK_J: tl.constexpr,
):
    """As count_before, tokens whose mask is not above 0 coming after all others, by index; and how many are live."""
    key_i = _live_key(values_ptr, mask_ptr, offs_i, offs_i < end, stride, stride_mask)  # [BLOCK_I]
    before = tl.zeros([offs_i.shape[0], BLOCK_J], tl.int32)
    live = tl.zeros([BLOCK_J], tl.int32)
    for start in range(begin, end, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        mask_j = offs_j < end
        key_j = _live_key(values_ptr, mask_ptr, offs_j, mask_j, stride, stride_mask)  # [BLOCK_J]
        # The lowest key has nothing below it to compare with, as count_before does.
        earlier = (key_j[None, :] == key_i[:, None]) & (offs_j[None, :] < offs_i[:, None])
        ahead = (key_j[None, :] > key_i[:, None]) | earlier
        before += (ahead & mask_j[None, :]).to(tl.int32)  # [BLOCK_I, BLOCK_J]
        mask_value = tl.load(mask_ptr + offs_j.to(tl.int64) * stride_mask, mask=mask_j, other=0.0).to(tl.float32)
        live += (mask_value > 0.0).to(tl.int32)
    return tl.sum(before, axis=1), tl.sum(live, axis=0)


@triton.jit
def _live_key(values_ptr, mask_ptr, offs, inside, stride, stride_mask):
    """descending_key of live tokens, and for dead ones the integer that it leaves free."""
    key = descending_key(tl.load(values_ptr + offs.to(tl.int64) * stride, mask=inside, other=0.0))
    mask_value = tl.load(mask_ptr + offs.to(tl.int64) * stride_mask, mask=inside, other=0.0).to(tl.float32)
    return tl.where(mask_value > 0.0, key, -0x7FFFFFFFFFFFFFFF - 1 if key.dtype == tl.int64 else -0x7FFFFFFF - 1)
