"""A step of the DiffRate search, forward and backward: the published code's, the same with frozen weights, and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokcomp.bench.search import compare_search
from tokcomp.measure.provenance import find_device

TABLE = "search step, granularity 4: images per second, speed over the published search, memory of a step"
HEAD = ["model", "batch", "precision", "entry", "img/s", "speed", "least", "most", "MiB", "memory", "process MiB"]
MODELS = {"deit-s": "deit_small_patch16_224", "deit-b": "deit_base_patch16_224"}
#: Model, batch, precision.
CPU = (("deit-s", 4, "float32"), ("deit-s", 16, "float32"), ("deit-s", 16, "bfloat16"))
CUDA = (
    ("deit-s", 256, "bfloat16"),
    ("deit-b", 256, "bfloat16"),
    ("deit-s", 256, "float16"),
    ("deit-s", 256, "float32"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cuda = find_device(metafunc.config.getoption("--device")).type == "cuda"
    metafunc.parametrize(("model", "batch", "precision"), CUDA if cuda else CPU)


def test_step(model: str, batch: int, precision: str, device: torch.device, timed: Any, results: Any) -> None:
    """Gate, speed and memory. Goals: 3.5x on CPU at batch 16, 7.5x (DeiT-S) and 4.7x (DeiT-B) on a GPU at batch 256."""
    rows = compare_search(
        MODELS[model],
        batch=batch,
        precision=precision,
        device=device,
        # No gate here: compare_search has checked our entries by the time it calls measure.
        measure=lambda calls: timed(calls, gate=lambda: None, shown="tokcomp"),
    )
    for row in rows:
        cells = [model, str(batch), precision, row.name, f"{row.images_per_second:.1f}"]
        cells += [f"{ratio:.2f}x" for ratio in row.speedup]
        cells += [f"{row.memory / 2**20:.0f}", f"{row.memory / rows[0].memory:.2f}", f"{row.total_memory / 2**20:.0f}"]
        results.add({"suite": "search", "model": MODELS[model], "search": True, **row.to_json()}, TABLE, HEAD, cells)
