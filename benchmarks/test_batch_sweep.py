"""Every batch size from one image up: where launches weigh as much as arithmetic, and where they vanish."""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
from tokcomp.bench.models import Entry, create_model, keep_everything
from tokcomp.measure.provenance import find_device

from benchmarks.shapes import SUBJECTS, Subject
from benchmarks.whole_model import STACKS, add_rows, batches, measure

TABLE = "batch sweep: images per second, speed over the published pipeline (median, least, most of the rounds)"
#: The largest batch; on a GPU whoever runs out of memory below it is recorded so.
LARGEST = {"cpu": 64, "cuda": 1024}
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "bfloat16")}
#: Batches at which timm is compiled as well, unless all are asked for: a compilation takes longer than the rest.
COMPILED = (1, 16, 256)
#: Up to which launches can weigh, so that timm gets CUDA graphs too.
FEW_IMAGES = 32


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    kind = find_device(config.getoption("--device")).type
    sizes = batches(config, [1 << power for power in range(LARGEST[kind].bit_length())])
    subjects = ("deit-s",) if kind == "cpu" else ("deit-s", "deit-b", "deit-t", "vit-l", "vit-h")
    cases = [
        pytest.param(
            SUBJECTS[name],
            batch,
            precision,
            id=f"{name}-{batch}-{precision}",
            marks=[] if first else [pytest.mark.slow],
        )
        for name in subjects
        for precision in PRECISIONS[kind]
        for batch in sizes
        for first in [kind == "cpu" or (name == "deit-s" and precision == "float16")]
    ]
    metafunc.parametrize(("subject", "batch", "precision"), cases)


def test_batch(subject: Subject, batch: int, precision: str, timed: Any, results: Any) -> None:
    """One batch size: the published pipeline, timm, ours with and without compression."""
    choice = results.choice
    model = create_model(subject.name, device=results.device, **subject.options)
    method = tokcomp.DiffRate.published(subject.name, subject.budget)
    entries = {"published": Entry("published", method)}
    if results.device.type == "cpu" and precision != "float32":
        entries["published-float32"] = Entry("published", method, precision="float32")
    entries["timm"] = Entry("timm")
    if choice.compiled == "all" or (choice.compiled == "timm" and batch in COMPILED):
        entries["timm-compiled"] = Entry("timm-compiled")
        if results.device.type == "cuda" and batch <= FEW_IMAGES:
            entries["timm-reduce-overhead"] = Entry("timm-reduce-overhead")
    for stack in STACKS if results.device.type == "cuda" else STACKS[:1]:
        entries[f"{stack}-uncompressed"] = Entry(stack, keep_everything(model))
        entries[stack] = Entry(stack, method)
    rows = measure(model, entries, batch, precision, timed, results, suite="batch-sweep", name=subject.name)
    label = {"model": subject.name, "budget": subject.budget}
    add_rows(results, TABLE, "batch-sweep", model, label, rows, entries)
