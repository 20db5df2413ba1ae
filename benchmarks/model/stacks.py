"""Seconds that stacks of kernels would take on a GPU, from the bound to the published code.

A kernel takes as long as its slowest resource, at the share of the device's rate that such kernels are known to reach,
and a gap follows it. Rates and shares are assumptions, written into ``benchmarks/results/predictions.json``; the bytes
and multiply-adds that they are applied to are counted and tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokcomp.methods import Method
from tokcomp.schedule import CompressionSchedule

from benchmarks.model import roofline
from benchmarks.model.roofline import BlockTokens, ModelShape, token_counts
from benchmarks.model.traffic import KernelCost, ceil_div, elementwise, linear, plain_attention


@dataclass(frozen=True)
class Gpu:
    """A device's rates in float16: what large products, copies and exponentials reach, and what it is built of."""

    name: str
    matrix_flops_per_s: float
    copy_bytes_per_s: float
    exponentials_per_s: float
    cache_bytes_per_s: float  # out of the L2
    tile_flops_per_s: float  # of attention kernels at these widths, padded tiles counted
    processors: int
    product_share: float  # of the matrix rate, at which plain libraries run a model's products

    @property
    def rates(self) -> dict[str, float]:
        """As :func:`benchmarks.model.roofline.ideal_seconds` takes them."""
        names = ("matrix_flops_per_s", "copy_bytes_per_s", "exponentials_per_s")
        return {name: getattr(self, name) for name in names}


GPUS = {
    "H200": Gpu("H200", 790e12, 4.3e12, 132 * 16 * 1.755e9, 6.0e12, 340e12, 132, 0.70),
    "A100": Gpu("A100", 250e12, 1.6e12, 108 * 16 * 1.41e9, 4.0e12, 140e12, 108, 0.87),
}

#: Stack -> what it stands for. The names are those of the comparisons' entries where one measures the same.
STACKS = {
    "ideal": "the bound: everything fused, every rate reached in full",
    "tokcomp": "tokcomp's kernels, launched from one CUDA graph, with the bytes and tiles counted in them",
    "linear_gelu": "the same with GELU inside our own product",
    "planned": "six kernels a block, as designed: products at 80 % of the matrix rate, attention at 1.4 of its floor",
    "conventional": "a kernel per step, well made: FlashAttention, LayerNorm and residual passes, GELU in the product",
    "published": "the published code in eager PyTorch under autocast",
}

#: Tuned libraries' products, as a share of the matrix rate; and of the copy rate, what passes over memory reach.
PRODUCT_SHARE, MEMORY_SHARE, PRODUCT_MEMORY_SHARE = 0.80, 0.85, 0.90
#: Of the rate that a library's product reaches, what one in Triton does.
TRITON_PRODUCT_SHARE = 0.85
#: Seconds between kernels of one graph; between kernels of a well made eager stack; of one launch from Python.
GRAPH_GAP, STREAM_GAP, EAGER_LAUNCH = 1.2e-6, 1.5e-6, 6e-6
#: The least a kernel takes, however little it does.
LEAST_KERNEL = 2e-6
#: Launches of the published code per block that compresses and per block that does not (counted in the tests).
EAGER_LAUNCHES = (48, 22)
#: Tiles that libraries choose products from: rows, columns, and the share of the full rate.
_TILES = ((128, 256, 1.0), (128, 128, 1.0), (64, 128, 0.8), (64, 64, 0.65))
_SPLITS = (1, 2, 4, 8)


def product_seconds(cost: KernelCost, gpu: Gpu, share: float) -> float:
    """A matrix product: waves of tiles over the processors, with the best tile and split of the sum; or its bytes."""
    assert cost.matrix is not None
    rows, _, outputs = cost.matrix
    memory = cost.bytes_moved / (PRODUCT_MEMORY_SHARE * gpu.copy_bytes_per_s)
    best = math.inf
    for tile_rows, tile_columns, speed in _TILES:
        tiles = ceil_div(rows, tile_rows) * ceil_div(outputs, tile_columns)
        padded = cost.flops * tiles * tile_rows * tile_columns / (rows * outputs)
        for split in _SPLITS:
            used = tiles * split / (ceil_div(tiles * split, gpu.processors) * gpu.processors)
            best = min(best, padded / (share * speed * used * gpu.matrix_flops_per_s))
    return max(best, memory)


def pass_seconds(cost: KernelCost, gpu: Gpu, share: float = MEMORY_SHARE) -> tuple[float, str]:
    """Any other kernel, and its slowest resource: memory, cache, products of padded tiles, exponentials."""
    # The last wave of programs leaves multiprocessors idle, and a single wave those that get none.
    filled = cost.programs / (ceil_div(cost.programs, gpu.processors) * gpu.processors) if cost.programs else 1.0
    times = {
        "memory": cost.bytes_moved / (share * gpu.copy_bytes_per_s),
        "cache": (cost.bytes_loaded + cost.bytes_stored) / gpu.cache_bytes_per_s,
        "tiles": 2 * cost.tile_multiply_adds / (filled * gpu.tile_flops_per_s),
        "exponentials": cost.exponentials / gpu.exponentials_per_s,
    }
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def kernel_seconds(
    cost: KernelCost, gpu: Gpu, product_share: float | None = None, memory_share: float = MEMORY_SHARE
) -> tuple[float, str]:
    """One kernel's time, without the gap after it, and what bounds it; products as tuned libraries run them."""
    if cost.matrix is None:
        return pass_seconds(cost, gpu, memory_share)
    share = max(PRODUCT_SHARE, gpu.product_share) if product_share is None else product_share
    if cost.tile_multiply_adds:  # a kernel of ours
        share *= TRITON_PRODUCT_SHARE
    return product_seconds(cost, gpu, share), "products"


def _run(
    costs: Iterable[KernelCost],
    gpu: Gpu,
    gap: float,
    product_share: float | None = None,
    memory_share: float = MEMORY_SHARE,
) -> float:
    """Kernels one after another."""
    return sum(max(kernel_seconds(cost, gpu, product_share, memory_share)[0], LEAST_KERNEL) + gap for cost in costs)


def tokcomp_seconds(
    shape: ModelShape,
    method: Method | CompressionSchedule | None,
    batch: int,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    fused_gelu: bool = False,
) -> float:
    """Our kernels in one CUDA graph."""
    costs = roofline.kernels(shape, method, batch, dtype, gpu=gpu.name, fused_gelu=fused_gelu)
    return _run(costs, gpu, GRAPH_GAP)


def planned_seconds(shape: ModelShape, blocks: list[BlockTokens], batch: int, item: int, gpu: Gpu) -> float:
    """Six kernels a block: residual, selection, merging and LayerNorm in one, the other residual in the product."""
    channels, hidden = shape.channels, shape.hidden
    costs, attention = _ends(shape, batch, item), 0.0
    for index, (num_in, num_read, num_out, _) in enumerate(blocks):
        rows, rows_out = batch * num_in, batch * num_out
        scores = batch * shape.heads * num_in**2
        floor = max(
            4 * scores * shape.head_width / gpu.matrix_flops_per_s,
            rows * (4 * channels * item + 4) / gpu.copy_bytes_per_s,
            scores / gpu.exponentials_per_s,
        )
        attention += max(1.4 * floor, LEAST_KERNEL) + GRAPH_GAP
        read, written = 2 * batch * num_read * channels, 2 * rows_out * channels
        costs += [
            linear("qkv", index, rows, channels, 3 * channels, item, bias=False),
            linear("proj", index, rows, channels, channels, item, bias=False),
            elementwise("prune_merge_norm", index, read, written, item),
            linear("fc1", index, rows_out, channels, hidden, item, bias=False),
            linear("fc2", index, rows_out, hidden, channels, item, bias=False, residual=True),
        ]
    return attention + _run(costs, gpu, GRAPH_GAP)


def conventional_kernels(shape: ModelShape, blocks: list[BlockTokens], batch: int, item: int) -> list[KernelCost]:
    """LayerNorms, residuals and compression as passes of their own, attention at FlashAttention's published rates."""
    channels, hidden = shape.channels, shape.hidden
    costs = _ends(shape, batch, item)
    for index, (num_in, num_read, num_out, _) in enumerate(blocks):
        x, out = batch * num_in * channels, batch * num_out * channels
        costs += [
            elementwise("norm1", index, x, x, item),
            linear("qkv", index, batch * num_in, channels, 3 * channels, item),
            plain_attention(batch, shape.heads, num_in, shape.head_width, item, index, tile=(64, 16)),
            linear("proj", index, batch * num_in, channels, channels, item),
            elementwise("residual1", index, 2 * x, x, item),
        ]
        if num_out < num_in:
            costs += [
                elementwise("class_attention", index, x, batch * num_in, item),
                elementwise("sort", index, batch * num_in, batch * num_in, 4),
                elementwise("compress", index, batch * num_read * channels, out, item),
            ]
        costs += [
            elementwise("norm2", index, out, out, item),
            linear("fc1", index, batch * num_out, channels, hidden, item),
            linear("fc2", index, batch * num_out, hidden, channels, item),
            elementwise("residual2", index, 2 * out, out, item),
        ]
    return costs


def conventional_seconds(shape: ModelShape, blocks: list[BlockTokens], batch: int, item: int, gpu: Gpu) -> float:
    """The kernels of :func:`conventional_kernels` one after another, products as libraries run them."""
    costs = conventional_kernels(shape, blocks, batch, item)
    return _run(costs, gpu, STREAM_GAP, gpu.product_share, PRODUCT_MEMORY_SHARE)


def published_seconds(shape: ModelShape, blocks: list[BlockTokens], batch: int, item: int, gpu: Gpu) -> float:
    """The published code under autocast: a float32 residual stream, attention maps in memory, each step a launch.

    Bytes per element are tallied from its source: half precision in products, float32 in the residual stream and the
    softmax. Products and copies reach what eager PyTorch reaches; the host's launches bound small batches.
    """
    compressing = any(block.compresses for block in blocks)
    device, launches = _run(_ends(shape, batch, item), gpu, 0.0), 20
    channels = shape.channels
    for num_in, num_read, num_out, _ in blocks:
        x, out = batch * num_in * channels, batch * num_out * channels
        scores = batch * shape.heads * num_in**2
        products = 8 * x * channels + 4 * out * shape.hidden
        maps = 4 * scores * shape.head_width
        moved = (
            40 * x
            + 40 * out
            + (28 if compressing else 20) * scores
            + 2 * batch * channels * (6 * num_in + 10 * num_out)
        )
        if num_out < num_in:
            moved += 8 * x + 18 * batch * num_read * channels + 32 * out + 24 * (batch * num_read * channels - out)
        elif compressing:
            moved += 8 * x
        device += products / (0.8 * gpu.matrix_flops_per_s) + maps / (0.4 * gpu.matrix_flops_per_s)
        device += moved / (MEMORY_SHARE * gpu.copy_bytes_per_s) + 60e-6 * compressing
        launches += EAGER_LAUNCHES[0] if compressing else EAGER_LAUNCHES[1]
    return max(device, launches * EAGER_LAUNCH)


def _ends(shape: ModelShape, batch: int, item: int) -> list[KernelCost]:
    """Patch embedding and classifier, as products."""
    patches, classes = batch * shape.num_patches, max(1, shape.head_multiply_adds // shape.channels)
    unfolded = 2 * batch * shape.image_elements
    return [
        elementwise("patches", None, unfolded // 2, unfolded // 2, item),
        linear("patch_embed", None, patches, shape.patch_inputs, shape.channels, item),
        linear("head", None, batch, shape.channels, classes, item),
    ]


_SECONDS = {
    "planned": planned_seconds,
    "conventional": conventional_seconds,
    "published": published_seconds,
}


def predicted_seconds(
    stack: str,
    model: ModelShape,
    method: Method | CompressionSchedule | None,
    batch: int,
    dtype: torch.dtype,
    gpu: Gpu,
) -> float:
    """Seconds for a batch of images by one of :data:`STACKS`.

    Raises:
        ValueError: no such stack, or a dtype that the rates are not for.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float16 or bfloat16, which the rates are of, got {dtype}")
    if stack == "ideal":
        return roofline.ideal_seconds(model, method, batch, dtype, gpu.rates)
    if stack in ("tokcomp", "linear_gelu"):
        return tokcomp_seconds(model, method, batch, dtype, gpu, fused_gelu=stack == "linear_gelu")
    if stack not in _SECONDS:
        raise ValueError(f"stack must be one of {', '.join(STACKS)}, got {stack!r}")
    return _SECONDS[stack](model, token_counts(model, method), batch, dtype.itemsize, gpu)
