"""The kernels of prune_merge and prune_merge_norm, which differ by a residual sum before and a LayerNorm after.

After the order is known (``prune_merge.select``), two kernels:

- ``kept``: a program owns a block of slots of one image and holds their tokens' rows. It writes them (and their
  LayerNorm) as if nothing joined them, and finds for every source the most similar slot of its block.
- ``join``: a row belongs to the first source, in rank order, of a slot. It picks each source's slot among the blocks'
  candidates, and writes the slots that something joined once more.

Bytes, for M slots and S sources: kept reads M + S rows of x and of branch and writes M rows (and M normalized); join
reads the S sources and at most S destinations once more and writes at most S rows: a few percent of the whole, for S is
small beside M. The sources, which every block of an image needs, come from the L2 after the first: an image's blocks
run side by side. Reading all rows once to match them and once more to write them would take half as much again.

Both operators run this same code on the same tiles, so their bits are equal. What one thread writes another reads in a
later kernel, never in the same one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokcomp_kernels.triton._common import begin_grid, dot, effective_size, narrow
from tokcomp_kernels.triton._norm import channels_of, load_sum, store_normalized, store_tiles
from tokcomp_kernels.triton._similarity import inverse_norm

_UNSPECIALIZED = ["num_kept", "num_merged", "num_prefix_tokens", "stride_sb"]


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def merge_kept_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    size_ptr,
    order_ptr,
    x_out_ptr,
    normalized_ptr,
    size_out_ptr,
    best_ptr,
    best_slot_ptr,
    inv_src_ptr,
    num_kept,
    num_merged,
    num_prefix_tokens,
    norm_eps,
    stride_xb,
    stride_xn,
    stride_bb,
    stride_bn,
    stride_sb,
    stride_sn,
    HAS_BRANCH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    MERGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Beside the rows, best_slot_ptr and best_ptr [B, blocks, S]: each source's most similar slot of a block, the
    lowest on ties, and their cosine times the source's norm; and inv_src_ptr [B, S]: one over that norm.

    More sources than BLOCK_S are spread over programs, of which the first writes the rows.
    """
    begin_grid(DEPENDENT)
    num_blocks = tl.cdiv(num_kept, BLOCK_M)
    num_parts = tl.maximum(tl.cdiv(num_merged, BLOCK_S), 1)
    part = tl.program_id(0) % num_parts
    block = tl.program_id(0) // num_parts % num_blocks
    batch = (tl.program_id(0) // num_parts // num_blocks).to(tl.int64)
    x_ptr += batch * stride_xb
    branch_ptr += batch * stride_bb
    order_ptr += batch * (num_kept + num_merged)
    slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = slots < num_kept
    token = tl.load(order_ptr + slots, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    writes = slots < tl.where(part == 0, num_kept, 0)
    out_slots = batch * num_kept + slots
    offs_s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_merged
    src_token = tl.load(order_ptr + num_kept + offs_s, mask=mask_s, other=0).to(tl.int64)  # [BLOCK_S]
    rows_x, rows_branch = x_ptr + token * stride_xn, branch_ptr + token * stride_bn
    src_x, src_branch = x_ptr + src_token * stride_xn, branch_ptr + src_token * stride_bn
    dots = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
        tile = load_sum(
            rows_x[:, None] + offs_c[None, :],
            rows_branch[:, None] + offs_c[None, :],
            mask_m[:, None] & mask_c[None, :],
            HAS_BRANCH,
        )  # [BLOCK_M, BLOCK_C]
        tl.store(
            (x_out_ptr + out_slots * CHANNELS)[:, None] + offs_c[None, :],
            tile,
            mask=writes[:, None] & mask_c[None, :],
        )
        if MERGES:
            src = load_sum(
                src_x[:, None] + offs_c[None, :],
                src_branch[:, None] + offs_c[None, :],
                mask_s[:, None] & mask_c[None, :],
                HAS_BRANCH,
            )  # [BLOCK_S, BLOCK_C]
            dots = dot(src, tl.trans(tile), dots)  # [BLOCK_S, BLOCK_C] x [BLOCK_C, BLOCK_M]
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)

    if MERGES:
        squares = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            squares += tiles[chunk].to(tl.float32) * tiles[chunk].to(tl.float32)
        inv_dst = inverse_norm(tl.sum(squares, axis=1))  # [BLOCK_M]
        # An infinite or undefined product is a cosine of 0. A source's own norm, which changes no order, comes later.
        dots = tl.where(tl.abs(dots) < float("inf"), dots * inv_dst[None, :], 0.0)  # [BLOCK_S, BLOCK_M]
        dots = tl.where((mask_m & (slots >= num_prefix_tokens))[None, :], dots, float("-inf"))
        best = tl.max(dots, axis=1)
        best_slot = tl.min(tl.where(dots == best[:, None], slots[None, :], num_kept), axis=1)
        there = (batch * num_blocks + block) * num_merged + offs_s
        tl.store(best_ptr + there, best, mask=mask_s)
        tl.store(best_slot_ptr + there, best_slot, mask=mask_s)

    if HAS_NORM:
        store_normalized(
            tiles,
            normalized_ptr + out_slots * CHANNELS,
            writes,
            weight_ptr,
            bias_ptr,
            norm_eps,
            HAS_WEIGHT,
            HAS_BIAS,
            CHANNELS,
            BLOCK_C,
            CHUNKS,
        )
    if MERGES and block == 0:
        src_squares = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
            src = load_sum(
                src_x[:, None] + offs_c[None, :],
                src_branch[:, None] + offs_c[None, :],
                mask_s[:, None] & mask_c[None, :],
                HAS_BRANCH,
            )  # [BLOCK_S, BLOCK_C]
            src_squares += src.to(tl.float32) * src.to(tl.float32)
        inv_src = inverse_norm(tl.sum(src_squares, axis=1))  # [BLOCK_S]
        tl.store(inv_src_ptr + batch * num_merged + offs_s, inv_src, mask=mask_s)

    if HAS_SIZE:
        size = effective_size(tl.load(size_ptr + batch * stride_sb + token * stride_sn, mask=writes, other=1.0))
    else:
        size = tl.full([BLOCK_M], 1.0, tl.float32)
    tl.store(size_out_ptr + out_slots, size, mask=writes)


@triton.jit
def _choose(best_ptr, best_slot_ptr, inv_src_ptr, offs_s, num_merged, num_blocks, num_prefix_tokens):
    """The slot of each source, and its cosine: the best of all blocks, the lowest slot on ties; -1 beyond the last."""
    mask_s = offs_s < num_merged
    best = tl.full([offs_s.shape[0]], float("-inf"), tl.float32)
    slot = tl.where(mask_s, num_prefix_tokens, -1)
    for block in range(num_blocks):
        there = block * num_merged + offs_s
        value = tl.load(best_ptr + there, mask=mask_s, other=float("-inf"))
        # Blocks run upwards, so only a strictly better one takes over.
        better = value > best
        best = tl.where(better, value, best)
        slot = tl.where(better, tl.load(best_slot_ptr + there, mask=mask_s, other=-1), slot)
    # A source's norm scales all its products alike, so it need not have taken part in the choice.
    return slot, best * tl.load(inv_src_ptr + offs_s, mask=mask_s, other=0.0)


@triton.jit
def _divide(values, counts):
    """values [R, C] / counts [R, 1], rounded once: the equal rows of a group have themselves as their mean.

    By a reciprocal and what it leaves over: an IEEE division calls a slow path, for which registers are spilled.
    """
    inverse = 1.0 / counts
    quotient = values * inverse
    corrected = tl.fma(tl.fma(-quotient, tl.broadcast_to(counts, values.shape), values), inverse, quotient)
    return tl.where(tl.abs(quotient) < float("inf"), corrected, quotient)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "num_tokens", "num_blocks"])
def merge_join_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    size_ptr,
    order_ptr,
    best_ptr,
    best_slot_ptr,
    inv_src_ptr,
    x_out_ptr,
    normalized_ptr,
    size_out_ptr,
    source_ptr,
    num_tokens,
    num_kept,
    num_merged,
    num_prefix_tokens,
    num_blocks,
    norm_eps,
    stride_xb,
    stride_xn,
    stride_bb,
    stride_bn,
    stride_sb,
    stride_sn,
    HAS_BRANCH: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    WEIGHTED_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    num_parts = tl.cdiv(num_merged, BLOCK_R)
    part = tl.program_id(0) % num_parts
    batch = (tl.program_id(0) // num_parts).to(tl.int64)
    x_ptr += batch * stride_xb
    branch_ptr += batch * stride_bb
    order_ptr += batch * (num_kept + num_merged)
    best_ptr += batch * num_blocks * num_merged
    best_slot_ptr += batch * num_blocks * num_merged
    inv_src_ptr += batch * num_merged
    if HAS_SIZE:
        size_ptr += batch * stride_sb

    rows = part * BLOCK_R + tl.arange(0, BLOCK_R)
    slot, _own = _choose(
        best_ptr, best_slot_ptr, inv_src_ptr, rows, num_merged, num_blocks, num_prefix_tokens
    )  # [BLOCK_R]
    row_token = tl.load(order_ptr + num_kept + rows, mask=rows < num_merged, other=0).to(tl.int64)
    tl.store(source_ptr + batch * num_tokens + row_token, slot.to(tl.int64), mask=rows < num_merged)
    earlier = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, part * BLOCK_R + BLOCK_R, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        dst, _cosine = _choose(best_ptr, best_slot_ptr, inv_src_ptr, offs_s, num_merged, num_blocks, num_prefix_tokens)
        same = (dst[None, :] == slot[:, None]) & (offs_s[None, :] < rows[:, None])  # [BLOCK_R, BLOCK_S]
        earlier += tl.sum(same.to(tl.int32), axis=1)
    # One source of each slot does the work: the first.
    leads = (rows < num_merged) & (earlier == 0)

    offs_c, mask_c = channels_of(0, CHANNELS, BLOCK_C)
    token = tl.load(order_ptr + slot, mask=leads, other=0).to(tl.int64)  # [BLOCK_R]
    tile = load_sum(
        (x_ptr + token * stride_xn)[:, None] + offs_c[None, :],
        (branch_ptr + token * stride_bn)[:, None] + offs_c[None, :],
        leads[:, None] & mask_c[None, :],
        HAS_BRANCH,
    )  # [BLOCK_R, BLOCK_C]
    total = tile.to(tl.float32)
    total_size = tl.full([BLOCK_R], 1.0, tl.float32)
    if HAS_SIZE:
        total_size = effective_size(tl.load(size_ptr + token * stride_sn, mask=leads, other=1.0))
    count = tl.full([BLOCK_R], 1, tl.int32)
    # Every slot takes its next source in turn, so each sum runs in the order of rank.
    for start in range(0, num_merged, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        dst, cosine = _choose(
            best_ptr, best_slot_ptr, inv_src_ptr, offs_s, num_merged, num_blocks, num_prefix_tokens
        )  # [BLOCK_S]
        mine = (dst[None, :] == slot[:, None]) & leads[:, None]  # [BLOCK_R, BLOCK_S]
        longest = tl.max(tl.sum(mine.to(tl.int32), axis=1), axis=0)
        taken = tl.full([BLOCK_R], -1, tl.int32)
        for _ in range(longest):
            left = mine & (offs_s[None, :] > taken[:, None])
            following = tl.min(tl.where(left, offs_s[None, :], num_merged), axis=1)  # [BLOCK_R]
            found = following < num_merged
            src_token = tl.load(order_ptr + num_kept + following, mask=found, other=0).to(tl.int64)
            src = load_sum(
                (x_ptr + src_token * stride_xn)[:, None] + offs_c[None, :],
                (branch_ptr + src_token * stride_bn)[:, None] + offs_c[None, :],
                found[:, None] & mask_c[None, :],
                HAS_BRANCH,
            )
            total += src.to(tl.float32)
            src_size = tl.full([BLOCK_R], 1.0, tl.float32)
            if HAS_SIZE:
                src_size = effective_size(tl.load(size_ptr + src_token * stride_sn, mask=found, other=1.0))
            if WEIGHTED_SIZE:
                own = offs_s[None, :] == following[:, None]
                src_size *= tl.sum(tl.where(own, cosine[None, :], 0.0), axis=1)
            total_size += tl.where(found, src_size, 0.0)
            count += found.to(tl.int32)
            taken = tl.where(found, following, taken)

    mean = narrow(_divide(total, count.to(tl.float32)[:, None]), x_out_ptr.dtype.element_ty)
    out_slots = batch * num_kept + slot
    store_tiles((mean,), x_out_ptr + out_slots * CHANNELS, leads, CHANNELS, BLOCK_C, 1)
    tl.store(size_out_ptr + out_slots, effective_size(total_size), mask=leads)
    if HAS_NORM:
        store_normalized(
            (mean,),
            normalized_ptr + out_slots * CHANNELS,
            leads,
            weight_ptr,
            bias_ptr,
            norm_eps,
            HAS_WEIGHT,
            HAS_BIAS,
            CHANNELS,
            BLOCK_C,
            1,
        )
