"""What GPUs would show, as data: each figure stands until one is measured. ``benchmarks/results/predictions.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from tokcomp.methods import DiffRate, Method

from benchmarks.model import roofline, stacks, traffic_cuda, traffic_partition, traffic_triton
from benchmarks.model.roofline import ModelShape
from benchmarks.model.stacks import GPUS, STACKS, kernel_seconds, predicted_seconds
from benchmarks.model.traffic import KernelCost


@dataclass(frozen=True)
class Subject:
    """A published model and budget that is predicted."""

    title: str
    model: str  # timm's name
    budget: float
    paper: int | None  # images/s of the published code in DiffRate's Table 1, measured on an A100
    options: tuple[tuple[str, Any], ...] = ()


_MAE = (("global_pool", "avg"), ("num_classes", 1000))
SUBJECTS = (
    Subject("DeiT-T", "deit_tiny_patch16_224", 0.6, None),
    Subject("DeiT-S", "deit_small_patch16_224", 2.3, 8901),
    Subject("DeiT-B", "deit_base_patch16_224", 8.7, 4124),
    Subject("ViT-L", "vit_large_patch16_224.mae", 31.0, 1580, _MAE),
    Subject("ViT-H", "vit_huge_patch14_224.mae", 93.2, 504, _MAE),
)
BATCHES = tuple(1 << power for power in range(11))
PRECISION = "float16"


class PredictedEntry(NamedTuple):
    """A row of predictions: the stack that is modelled, and whether it compresses. Named as what would measure it."""

    stack: str
    compressed: bool


ENTRIES = {
    "ideal": PredictedEntry("ideal", True),
    "ideal-uncompressed": PredictedEntry("ideal", False),
    "tokcomp-graph": PredictedEntry("tokcomp", True),
    "tokcomp-graph-uncompressed": PredictedEntry("tokcomp", False),
    "tokcomp-graph-linear_gelu": PredictedEntry("linear_gelu", True),
    "planned": PredictedEntry("planned", True),
    "conventional": PredictedEntry("conventional", True),
    "timm-compiled": PredictedEntry("conventional", False),
    "published": PredictedEntry("published", True),
}


def predictions() -> dict[str, Any]:
    """Everything predicted, as JSON data: the devices' rates, the assumptions, images per second, shares of kernels."""
    dtype = getattr(torch, PRECISION)
    rows, parts = [], []
    for subject in SUBJECTS:
        shape = ModelShape.of(subject.model, **dict(subject.options))
        method = DiffRate.published(subject.model, subject.budget)
        for gpu in GPUS.values():
            for name, (stack, compressed) in ENTRIES.items():
                chosen = method if compressed else None
                gflops = sum(cost.multiply_adds for cost in roofline.ideal_kernels(shape, chosen, 1, dtype)) / 1e9
                for batch in BATCHES:
                    seconds = predicted_seconds(stack, shape, chosen, batch, dtype, gpu)
                    label = {"gpu": gpu.name, "title": subject.title, "model": subject.model, "budget": subject.budget}
                    rate = {"gflops": round(gflops, 3), "images_per_second": _rounded(batch / seconds)}
                    rows.append({**label, "entry": name, "batch": batch, "precision": PRECISION, **rate})
        parts += [{"gpu": "H200", "title": subject.title, **part} for part in shares(shape, method, 1024, dtype)]
    return {
        "note": "Predicted: no GPU has run this. Regenerate with python -m benchmarks.page.",
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "stacks": STACKS,
        "assumptions": {
            "product_share": stacks.PRODUCT_SHARE,
            "triton_product_share": stacks.TRITON_PRODUCT_SHARE,
            "memory_share": stacks.MEMORY_SHARE,
            "product_memory_share": stacks.PRODUCT_MEMORY_SHARE,
            "graph_gap_seconds": stacks.GRAPH_GAP,
            "stream_gap_seconds": stacks.STREAM_GAP,
            "least_kernel_seconds": stacks.LEAST_KERNEL,
            "eager_launch_seconds": stacks.EAGER_LAUNCH,
            "eager_launches_per_block": stacks.EAGER_LAUNCHES,
        },
        "paper": {"gpu": "A100", "images_per_second": {one.title: one.paper for one in SUBJECTS if one.paper}},
        "rows": rows,
        "kernels": parts,
        "operators": operators(),
    }


def shares(
    shape: ModelShape, method: Method, batch: int, dtype: torch.dtype, gpu: str = "H200"
) -> list[dict[str, Any]]:
    """Our kernels by name: launches, multiply-adds, bytes, predicted time and what bounds it, for a batch."""
    device = GPUS[gpu]
    found: dict[str, dict[str, Any]] = {}
    for cost in roofline.kernels(shape, method, batch, dtype, gpu=gpu):
        seconds, bound = kernel_seconds(cost, device)
        part = found.setdefault(
            cost.name, {"kernel": cost.name, "launches": 0, "gflop": 0.0, "megabytes": 0.0, "us": 0.0}
        )
        part["launches"] += 1
        part["gflop"] += 2 * max(cost.multiply_adds, cost.tile_multiply_adds) / 1e9
        part["megabytes"] += cost.bytes_moved / 1e6
        part["us"] += 1e6 * (max(seconds, stacks.LEAST_KERNEL) + stacks.GRAPH_GAP)
        part["bound"] = bound
    total = sum(part["us"] for part in found.values())
    return [
        {key: _rounded(value) if isinstance(value, float) else value for key, value in part.items()}
        | {"share": round(part["us"] / total, 4)}
        for part in found.values()
    ]


def operators(batch: int = 1024, item: int = 2, gpu: str = "H200") -> list[dict[str, Any]]:
    """The operators of a compressing block of 197 tokens, 192 after pruning, 180 after merging, at two widths.

    bipartite_merge makes 180 of the 197, of which 98 may leave and as many receive. select_diverse is not here: its
    time is that of its choices, one after another, which neither bytes nor products tell.

    Bytes that any kernel has to move (each row that is needed once), that ours move, and that ours ask of the caches;
    the time of the first at the full copy rate, and the time predicted of ours: Triton's, and the compiled one's where
    its design is another.
    """
    tokens, kept, slots, width = 197, 192, 180, 64
    found = []
    for heads in (6, 12):
        channels = heads * width
        row, scalars = batch * channels * item, batch * tokens * 4
        ours: dict[str, tuple[int, list[KernelCost]]] = {
            "attention": (
                4 * tokens * row + 2 * scalars,
                traffic_triton.attention(batch, heads, tokens, width, item, has_size=True, gpu=gpu),
            ),
            "class_attention_sort": (
                (tokens + 1) * row + 4 * scalars,
                traffic_triton.class_attention_sort(batch, heads, tokens, width, item, has_size=True),
            ),
            "attention_received": (
                2 * tokens * row + 2 * scalars,
                traffic_triton.attention_received(batch, heads, tokens, width, item, has_size=True, gpu=gpu),
            ),
            "add_layer_norm": (
                4 * tokens * row,
                traffic_triton.add_layer_norm(batch * tokens, channels, item),
            ),
        }
        merged = traffic_partition.bipartite_merge(
            batch, tokens, 98, 98, tokens - slots, channels, width, item, has_size=True, gpu=gpu
        )
        ours["bipartite_merge"] = ((tokens + slots) * row + tokens * row // heads + 2 * scalars, merged)
        for fused, name in ((False, "prune_merge"), (True, "prune_merge_norm")):
            costs = traffic_triton.prune_merge(
                batch, tokens, kept, slots, channels, item, has_size=True, fused=fused, gpu=gpu
            )
            ours[name] = ((1 + fused) * (kept + slots) * row, costs)
        compiled = {"attention": traffic_cuda.attention(batch, heads, tokens, width, item, has_size=True)}
        for name, (least, costs) in ours.items():
            floor = least / GPUS[gpu].copy_bytes_per_s
            found.append(
                {
                    "operator": name,
                    "channels": channels,
                    "kernels": len(costs),
                    "least_megabytes": _rounded(least / 1e6),
                    "moved_megabytes": _rounded(sum(cost.bytes_moved for cost in costs) / 1e6),
                    "cache_megabytes": _rounded(sum(cost.bytes_loaded + cost.bytes_stored for cost in costs) / 1e6),
                    "floor_us": _rounded(1e6 * floor),
                    "predicted_us": _microseconds(costs, gpu),
                    "predicted_cuda_us": _microseconds(compiled[name], gpu) if name in compiled else None,
                }
            )
    return found


def _microseconds(costs: list[KernelCost], gpu: str) -> float:
    """Of kernels one after another in a graph."""
    times = [max(kernel_seconds(cost, GPUS[gpu])[0], stacks.LEAST_KERNEL) for cost in costs]
    return _rounded(1e6 * (sum(times) + stacks.GRAPH_GAP * len(costs)))


def _rounded(value: float) -> float:
    """Four digits: more would say more than is known."""
    return float(f"{value:.4g}")
