"""What tests of the measuring share: a small model, entries whose times are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import tokcomp
import torch
from tokcomp.bench.models import NotMeasured
from tokcomp.measure.timing import Samples

from benchmarks.whole_model import Choice

CPU = torch.device("cpu")
METHOD = tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 13, 9], [17, 11, 7]))


class FakeResults:
    """What the fixture ``results`` offers, rates made up: 1 TFLOP/s and 100 GB/s."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self.device = choice, choice.device
        self.rows: list[dict[str, Any]] = []
        self.shown: list[list[str]] = []
        self.missing: list[NotMeasured] = []

    def rates_of(self, dtype: torch.dtype) -> dict[str, float]:
        return {"matrix_flops_per_s": 1e12, "copy_bytes_per_s": 1e11}

    def add(self, row: Mapping[str, Any], table: str, head: Sequence[str], cells: Sequence[str]) -> None:
        assert len(head) == len(cells)
        json.dumps(row, allow_nan=False)
        self.rows.append(dict(row))
        self.shown.append(list(cells))

    def add_not_measured(self, suite: str, model: str, missing: NotMeasured) -> None:
        self.missing.append(missing)


def timed(calls: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, Samples]:
    """The fixture ``timed`` with made-up seconds: the gate and one call of each run."""
    options.get("gate", lambda: None)()
    assert options["shown"] in calls
    return seconds()(calls)


def make_vit(**options: Any) -> Any:
    """Three blocks of 17 tokens; random weights large enough that every block matters."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def seconds(**named: float) -> Callable[[Mapping[str, Callable[[], Any]]], dict[str, Samples]]:
    """A ``measure`` that runs each call once and answers made-up seconds, 1 for those not named."""

    def measure(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Samples]:
        for call in calls.values():
            call()
        return {name: Samples((named.get(name.replace("-", "_"), 1.0),) * 3) for name in calls}

    return measure
