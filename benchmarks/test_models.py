"""Whole models: the published pipeline, timm and ours. On a GPU, the rows of the DiffRate paper's Table 1."""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
import torch
from tokcomp.bench.models import Entry, Row, compare_models, create_model, keep_everything
from tokcomp.bench.provenance import find_device
from tokcomp.equal_cost import evit_for_budget, tome_for_budget
from tokcomp.methods import Method
from torch import nn

from benchmarks.shapes import TABLE_1, PaperModel, PaperRow

CPU_TABLE = "models: images per second, speed over the published pipeline (median, least, most of the rounds)"
CPU_HEAD = ["model", "batch", "precision", "entry", "GFLOPs", "img/s", "speed", "least", "most", "of matrix rate"]
PAPER_TABLE = "DiffRate's Table 1: batch 1024, float16; the paper's images/s are an A100's, the others this GPU's"
PAPER_HEAD = [
    "model",
    "method",
    "GFLOPs",
    "paper GFLOPs",
    "paper img/s",
    "paper speed-up",
    "published img/s",
    "img/s",
    "over timm",
    "over published",
]
PAPER_BATCH = 1024


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    if "paper" in metafunc.fixturenames:
        rows = [
            pytest.param(paper, budget, id=f"{paper.title}-{budget}G", marks=[] if main else [pytest.mark.slow])
            for paper in TABLE_1
            for budget in paper.budgets
            for main in [budget == min(paper.budgets) and paper.title != "ViT-B (MAE)"]
        ]
        metafunc.parametrize(("paper", "budget"), rows if kind == "cuda" else [])
    else:
        batches = (1, 16) if kind == "cpu" else (1, 64, 1024)
        precisions = ("float32", "bfloat16") if kind == "cpu" else ("float16",)
        metafunc.parametrize("batch", batches)
        metafunc.parametrize("precision", precisions)


def with_compiled(entries: dict[str, Entry], config: pytest.Config) -> dict[str, Entry]:
    """The entries, and where asked torch.compile of timm and of ours."""
    if config.getoption("--torchcompile"):
        entries["timm-compiled"] = Entry("timm-compiled")
        entries["tokcomp-compiled"] = Entry("tokcomp-compiled", entries["tokcomp"].method)
    return entries


def test_deit_small(
    batch: int, precision: str, device: torch.device, timed: Any, results: Any, request: pytest.FixtureRequest
) -> None:
    """DeiT-S at the published 2.3 GFLOPs: what the speed goals are stated for."""
    model = create_model("deit_small_patch16_224", device=device)
    method = tokcomp.DiffRate.published("deit_small_patch16_224", 2.3)
    entries = {
        "published": Entry("published", method),
        "timm": Entry("timm"),
        "tokcomp-uncompressed": Entry("tokcomp", keep_everything(model)),
        "tokcomp": Entry("tokcomp", method),
    }
    baseline = "published"
    if device.type == "cpu" and precision != "float32":
        # The goal in half precision on CPU is stated over the published pipeline in float32.
        baseline = "published-float32"
        entries[baseline] = Entry("published", method, precision="float32")
    entries = with_compiled(entries, request.config)
    for row in _measure(model, entries, batch, precision, device, timed, shown="tokcomp", baseline=baseline):
        dtype = getattr(torch, row.precision)
        share = 2e9 * row.gflops * row.images_per_second / results.rates_of(dtype)["matrix_flops_per_s"]
        cells = ["deit-s-2.3G", str(batch), row.precision, row.name]
        cells += [f"{row.gflops:.2f}", f"{row.images_per_second:.1f}"]
        results.add(
            {"model": "deit_small_patch16_224", "share_of_matrix_rate": share, **row.to_json()},
            CPU_TABLE,
            CPU_HEAD,
            [*cells, *(f"{ratio:.2f}x" for ratio in row.speedup or ()), f"{share:.0%}"],
        )


def test_table_1(paper: PaperModel, budget: float, device: torch.device, timed: Any, results: Any) -> None:
    """A model's lines at one budget: our EViT, ToMe and DiffRate at the paper's FLOPs, and the published pipelines."""
    model = create_model(paper.name, device=device, **paper.options)
    lines = paper.budgets[budget]
    methods = {line.method: _method(line, paper, model, budget) for line in lines}
    entries = {"timm": Entry("timm")}
    for name, method in methods.items():
        entries[f"published {name}"] = Entry("published", method)
        entries[name] = Entry("tokcomp", method)
    rows = {
        row.name: row
        for row in _measure(model, entries, PAPER_BATCH, "float16", device, timed, shown="DiffRate", baseline="timm")
    }
    if not rows:
        return
    rate = paper.images_per_second
    timm_row = rows["timm"]
    speeds = [f"{rate}", "1.00x", "", f"{timm_row.images_per_second:.0f}", "1.00x", ""]
    results.add(
        {"model": paper.name, "paper_images_per_second": rate, **timm_row.to_json()},
        PAPER_TABLE,
        PAPER_HEAD,
        [paper.title, "baseline", f"{timm_row.gflops:.1f}", f"{paper.gflops}", *speeds],
    )
    for line in lines:
        ours, published = rows[line.method], rows[f"published {line.method}"]
        over_published = ours.images_per_second / published.images_per_second
        cells = [paper.title, line.method, f"{ours.gflops:.1f}", f"{line.gflops}", f"{line.images_per_second}"]
        cells += [f"{line.images_per_second / rate:.2f}x", f"{published.images_per_second:.0f}"]
        cells += [f"{ours.images_per_second:.0f}", f"{ours.speedup[0]:.2f}x" if ours.speedup else ""]
        for row in (published, ours):
            record = {"model": paper.name, "paper_images_per_second": line.images_per_second, **row.to_json()}
            if row is ours:
                results.add(record, PAPER_TABLE, PAPER_HEAD, [*cells, f"{over_published:.2f}x"])
            else:
                results.rows.append(record)


def _measure(
    model: nn.Module,
    entries: dict[str, Entry],
    batch: int,
    precision: str,
    device: torch.device,
    timed: Any,
    *,
    shown: str,
    baseline: str = "published",
) -> list[Row]:
    # No gate here: compare_models has checked every entry by the time it calls measure.
    return compare_models(
        model,
        entries,
        batch_sizes=[batch],
        precision=precision,
        device=device,
        baseline=baseline,
        measure=lambda calls: timed(calls, gate=lambda: None, shown=shown),
    )


def _method(line: PaperRow, paper: PaperModel, model: nn.Module, budget: float) -> Method:
    """The paper's method at its FLOPs: DiffRate's published schedule; ToMe and EViT as they come nearest."""
    if line.method == "DiffRate":
        return tokcomp.DiffRate.published(paper.name, budget)
    find = tome_for_budget if line.method == "ToMe" else evit_for_budget
    return find(model, line.gflops * 1e9)
