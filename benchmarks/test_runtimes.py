"""The model's own attention beside ours, and ONNX files of compressed models beside those of whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import tokcomp
from tokcomp.bench.entries import Entry
from tokcomp.bench.models import Row, create_model, keep_everything
from tokcomp.bench.transformers_twin import TRANSFORMERS
from tokcomp.equal_cost import tome_for_budget
from tokcomp.measure.provenance import find_device
from tokcomp.methods import Method
from torch import nn

from benchmarks.shapes import SUBJECTS, Subject
from benchmarks.whole_model import Choice, batches, measure, share, times

SUBJECT = SUBJECTS["deit-s"]
BATCHES = {"cpu": (1, 16), "cuda": (256,)}
PRECISION = {"cpu": "float32", "cuda": "float16"}
ATTENTIONS = "attention: images per second, over timm, over itself uncompressed"
FILES = "ONNX files: images per second, over timm, over itself uncompressed"
HEAD = ["model", "batch", "precision", "entry", "GFLOPs", "img/s", "over timm", "over itself, whole", "efficiency"]
#: Ours, attending by our kernels and by others: on timm's model, then as one of transformers.
ATTENDING = ("tokcomp", "tokcomp-stock", *TRANSFORMERS)
#: What runs a compressed model -> what runs the whole one in the same way, and whether that is a stack of ours.
RUNNING = {
    "tokcomp": ("tokcomp-uncompressed", True),
    "tokcomp-int8": ("tokcomp-int8-uncompressed", True),
    "tokcomp-onnx": ("onnxruntime", False),
    "tokcomp-onnx-int8": ("onnxruntime-int8", False),
    "tokcomp-openvino": ("openvino", False),
    "tokcomp-openvino-int8": ("openvino-int8", False),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    sizes = batches(metafunc.config, BATCHES[kind])
    if metafunc.function is test_files and kind != "cpu":
        sizes = ()
    metafunc.parametrize("batch", sizes)


def test_attention(batch: int, timed: Any, results: Any) -> None:
    """Our kernels against PyTorch's attention with the sizes as a mask on the keys, and against FlexAttention."""
    model, precision = _model(SUBJECT, results), PRECISION[results.device.type]
    method = tokcomp.DiffRate.published(SUBJECT.name, SUBJECT.budget)
    entries = attention_entries(model, method, results.choice)
    rows = measure(
        model, entries, batch, precision, timed, results,
        suite="stock-attention", name=SUBJECT.name, baseline="timm",
    )  # fmt: skip
    add_rows(results, ATTENTIONS, "stock-attention", rows, {name: f"{name}-uncompressed" for name in ATTENDING})


def test_files(batch: int, timed: Any, results: Any) -> None:
    """Whether a compressed file is as much faster than a whole one as our model is than itself."""
    model = _model(SUBJECT, results)
    methods = {
        "DiffRate": tokcomp.DiffRate.published(SUBJECT.name, SUBJECT.budget),
        "ToMe": tome_for_budget(model, SUBJECT.budget * 1e9),
    }
    entries = file_entries(model, methods)
    rows = measure(
        model, entries, batch, "float32", timed, results,
        suite="runtimes", name=SUBJECT.name, shown="tokcomp, DiffRate", baseline="timm",
    )  # fmt: skip
    whole = {f"{name}, {label}": there for name, (there, _) in RUNNING.items() for label in methods}
    add_rows(results, FILES, "runtimes", rows, whole)


def attention_entries(model: nn.Module, method: Method, choice: Choice) -> dict[str, Entry]:
    """timm, and who attends in ours, whole and compressed. FlexAttention is compiled, for each number of tokens."""
    entries, everything = {"timm": Entry("timm")}, keep_everything(model)
    for name in ATTENDING:
        if name.endswith("-flex") and choice.compiled == "none":
            continue
        entries[f"{name}-uncompressed"] = Entry(name, everything)
        entries[name] = Entry(name, method)
    return entries


def file_entries(model: nn.Module, methods: Mapping[str, Method]) -> dict[str, Entry]:
    """timm, and every runtime with the whole model and with a compressed one for each method, by "runtime, method"."""
    entries, everything = {"timm": Entry("timm")}, keep_everything(model)
    for name, (whole, ours) in RUNNING.items():
        entries[whole] = Entry(name, everything) if ours else Entry(whole)
        entries |= {f"{name}, {label}": Entry(name, method) for label, method in methods.items()}
    return entries


def add_rows(results: Any, table: str, suite: str, rows: Mapping[str, Row], whole: Mapping[str, str]) -> None:
    """Record and show every row; ``whole``: which entry is which one's uncompressed twin."""
    for name, row in rows.items():
        twin = rows.get(whole.get(name, ""))
        over = None if twin is None else row.speed_over(twin)
        efficiency = None if twin is None else row.efficiency(twin)
        cells = [SUBJECT.name, str(row.batch), row.precision, name, f"{row.gflops:.2f}", f"{row.images_per_second:.1f}"]
        cells += [times(row.speedup), times(over), share(efficiency)]
        record = {"suite": suite, "model": SUBJECT.name, "budget": SUBJECT.budget, **row.to_json()}
        results.add({**record, "over_itself": over, "efficiency": efficiency}, table, HEAD, cells)


def _model(subject: Subject, results: Any) -> nn.Module:
    return create_model(subject.name, device=results.device, **subject.options)
