"""Whole models: the published pipeline, timm and ours. On a GPU, the rows of the DiffRate paper's Table 1 as well."""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
from tokcomp.bench.models import Entry, Row, create_model
from tokcomp.equal_cost import Ruler, evit_for_budget, tome_for_budget, uniform
from tokcomp.measure.provenance import find_device
from tokcomp.methods import Method
from tokcomp.schedule import published_budgets
from torch import nn

from benchmarks.shapes import SUBJECTS, TABLE_1, PaperModel, PaperRow, Subject
from benchmarks.whole_model import add_rows, all_entries, batches, measure

TABLE = "models: images per second, speed over the published pipeline in the same precision (median, least, most of"
TABLE += " the rounds), over its float32, over the best uncompressed rival"
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
#: Model and batch, the most telling first: a run may be cut short.
CUDA = (
    ("deit-s", 1024),
    ("deit-b", 512),
    ("vit-l", 256),
    ("vit-h", 256),
    ("deit-s", 256),
    ("deit-b", 1024),
    ("vit-l", 1024),
    ("vit-h", 1024),
    ("deit-t", 1024),
)
CPU = (("deit-s", 1), ("deit-s", 16))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    kind = find_device(config.getoption("--device")).type
    if "paper" in metafunc.fixturenames:
        rows = [
            pytest.param(paper, budget, id=f"{paper.title}-{budget}G", marks=[] if main else [pytest.mark.slow])
            for paper in TABLE_1
            for budget in paper.budgets
            for main in [budget == min(paper.budgets) and paper.title != "ViT-B (MAE)"]
        ]
        metafunc.parametrize(("paper", "budget"), rows if kind == "cuda" else [])
        metafunc.parametrize("batch", batches(config, [PAPER_BATCH]))
        return
    precisions = ("float32", "bfloat16") if kind == "cpu" else ("float16",)
    pairs = CPU if kind == "cpu" else CUDA
    if config.getoption("--batches"):
        pairs = tuple((name, batch) for name in dict(pairs) for batch in batches(config, ()))
    cases = [
        pytest.param(SUBJECTS[name], batch, precision, id=f"{name}-{batch}-{precision}")
        for name, batch in pairs
        for precision in precisions
    ]
    metafunc.parametrize(("subject", "batch", "precision"), cases)


def test_model(subject: Subject, batch: int, precision: str, timed: Any, results: Any) -> None:
    """A model at the budget that the speed goals are stated for, against everyone who can run it."""
    model = create_model(subject.name, device=results.device, **subject.options)
    method = tokcomp.DiffRate.published(subject.name, subject.budget)
    entries = all_entries(model, method, precision, results.choice)
    rows = measure(model, entries, batch, precision, timed, results, suite="models", name=subject.name)
    label = {"model": subject.name, "budget": subject.budget}
    add_rows(results, TABLE, "models", model, label, rows, entries)


def test_table_1(paper: PaperModel, budget: float, batch: int, timed: Any, results: Any) -> None:
    """A model's lines at one budget: our EViT, ToMe and DiffRate at the paper's FLOPs, and the published pipelines."""
    model = create_model(paper.name, device=results.device, **paper.options)
    lines = paper.budgets[budget]
    methods = {line.method: _method(line, paper, model, budget) for line in lines}
    entries = table_1_entries(methods, results.choice)
    rows = measure(
        model,
        entries,
        batch,
        "float16",
        timed,
        results,
        suite="table-1",
        name=paper.name,
        shown="DiffRate",
        baseline="timm",
    )
    add_table_1(results, paper, budget, rows)


def table_1_entries(methods: dict[str, Method], choice: Any) -> dict[str, Entry]:
    """timm, and per method the published pipeline and ours."""
    entries = {"timm": Entry("timm")}
    if choice.compiled == "all":
        entries["timm-compiled"] = Entry("timm-compiled")
    for name, method in methods.items():
        entries[f"published {name}"] = Entry("published", method)
        if choice.clones and name != "EViT":
            entries[f"published code {name}"] = Entry("published-code", method, code=choice.clones)
        entries[name] = Entry("tokcomp", method)
    return entries


def add_table_1(results: Any, paper: PaperModel, budget: float, rows: dict[str, Row]) -> None:
    """Record every row, the paper's figure beside it, and show those of timm and ours."""
    lines = {line.method: line for line in paper.budgets[budget]}
    whole = paper.images_per_second
    for name, row in rows.items():
        line = lines.get(name.removeprefix("published ").removeprefix("code "))
        record = {
            "suite": "table-1",
            "model": paper.name,
            "budget": budget,
            "method": "baseline" if line is None else line.method,
            "paper_gflops": paper.gflops if line is None else line.gflops,
            "paper_images_per_second": whole if line is None else line.images_per_second,
            **row.to_json(),
        }
        if name not in ("timm", *lines):
            results.rows.append(record)
            continue
        published = rows.get(f"published {name}")
        rate = record["paper_images_per_second"]
        cells = [paper.title, record["method"], f"{row.gflops:.1f}", f"{record['paper_gflops']}", f"{rate}"]
        cells += [f"{rate / whole:.2f}x", "" if published is None else f"{published.images_per_second:.0f}"]
        cells += [f"{row.images_per_second:.0f}", f"{row.speedup[0]:.2f}x" if row.speedup else ""]
        over = "" if published is None else f"{row.speed_over(published)[0]:.2f}x"
        results.add(record, PAPER_TABLE, PAPER_HEAD, [*cells, over])


def _method(line: PaperRow, paper: PaperModel, model: nn.Module, budget: float) -> Method:
    """The paper's method at its FLOPs: DiffRate's published schedule, uniform counts for LV-ViT-S, which has none; ToMe
    and EViT as they come nearest."""
    if line.method == "DiffRate":
        if paper.name not in published_budgets():
            return uniform(Ruler(model), budget * 1e9)
        return tokcomp.DiffRate.published(paper.name, budget)
    find = tome_for_budget if line.method == "ToMe" else evit_for_budget
    return find(model, line.gflops * 1e9)
