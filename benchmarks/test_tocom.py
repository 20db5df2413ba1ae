"""ToCom's speed against r: ToMe at the degrees that the paper moves models between, in inference and in training.

The plugin itself costs nothing in inference: it is folded into the weights. The paper measures DeiT-B; so does a GPU
here, and a CPU DeiT-S.
"""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
from tokcomp.bench.models import Entry, create_model
from tokcomp.measure.provenance import find_device

from benchmarks.training_steps import PRECISIONS as TRAINING_PRECISIONS
from benchmarks.training_steps import Trainee, compare_training
from benchmarks.whole_model import batches, measure, share, times

#: Tokens merged per block. 0 is without compression, in our own stack.
DEGREES = (0, 4, 8, 12, 16)
#: r -> how many times faster than r = 0 the paper's DeiT-B runs, and trains.
PAPER = {12: 1.5, 16: 1.9}
MODEL = {"cpu": "deit_small_patch16_224", "cuda": "deit_base_patch16_224"}
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("float16",)}
BATCH = {"cpu": 16, "cuda": 256}
TRAINING_BATCH = {"cpu": 16, "cuda": 128}
TABLE = "ToMe against r: images per second; speed over r = 0, over the published pipeline at the same r, over timm"
HEAD = ["model", "entry", "r", "batch", "precision", "GFLOPs", "img/s", "over r = 0", "least", "most"]
HEAD += ["paper", "efficiency", "over published", "over timm"]
TRAINING_TABLE = "training with ToMe against r: images per second; speed over timm and over our own r = 0"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    training = metafunc.definition.name.startswith("test_training")
    metafunc.parametrize("precision", (TRAINING_PRECISIONS if training else PRECISIONS)[kind])
    metafunc.parametrize("batch", batches(metafunc.config, [(TRAINING_BATCH if training else BATCH)[kind]]))


def test_inference(batch: int, precision: str, timed: Any, results: Any) -> None:
    """Every degree in turns, ours and the published pipeline's."""
    name = MODEL[results.device.type]
    model = create_model(name, device=results.device)
    methods = {degree: tokcomp.ToMe(degree) for degree in DEGREES}
    entries = {"timm": Entry("timm")}
    for degree, method in methods.items():
        entries[f"published-r{degree}"] = Entry("published", method)
        entries[f"tokcomp-r{degree}"] = Entry("tokcomp", method)
        if results.device.type == "cuda":
            entries[f"tokcomp-graph-r{degree}"] = Entry("tokcomp-graph", method)
    if results.choice.clones:
        for competitor in ("published-code", "published-tocom"):
            entries[f"{competitor}-r16"] = Entry(competitor, methods[16], code=results.choice.clones)
    shown = f"tokcomp-r{DEGREES[-1]}"
    rows = measure(
        model, entries, batch, precision, timed, results, suite="tocom", name=name, shown=shown, baseline="timm"
    )
    for key, row in rows.items():
        who, _, degree = key.rpartition("-r")
        r = int(degree) if who else None
        whole, published = rows.get(f"{who}-r0"), rows.get(f"published-r{degree}")
        over = None if whole is None else row.speed_over(whole)
        efficiency = None if whole is None else row.efficiency(whole)
        over_published = None if published is None else row.speed_over(published)
        record = {
            "suite": "tocom",
            "model": name,
            "r": r,
            **row.to_json(),
            "speedup_over_r0": over,
            "speedup_over_published": over_published,
            "efficiency": efficiency,
            "paper_speedup": None if r is None else PAPER.get(r),
        }
        cells = [name, who or key, "" if r is None else str(r), str(batch), precision, f"{row.gflops:.2f}"]
        cells += [f"{row.images_per_second:.1f}", *([""] * 3 if over is None else [f"{ratio:.2f}x" for ratio in over])]
        cells += [f"{PAPER[r]}x" if r in PAPER else "", share(efficiency), times(over_published), times(row.speedup)]
        results.add(record, TABLE, HEAD, cells)


def test_training(batch: int, precision: str, timed: Any, results: Any) -> None:
    """A step of fine-tuning at each source degree."""
    name = MODEL[results.device.type]
    plain = create_model(name, device=results.device).train()
    trainees = {"timm": Trainee()}
    trainees |= {f"tokcomp-r{degree}": Trainee(tokcomp.ToMe(degree)) for degree in DEGREES}
    trainees |= {f"published-r{degree}": Trainee(tokcomp.ToMe(degree), published=True) for degree in DEGREES[-1:]}
    compare_training(
        plain,
        trainees,
        batch,
        precision,
        timed,
        results,
        suite="tocom-training",
        table=TRAINING_TABLE,
        name=name,
        shown=f"tokcomp-r{DEGREES[-1]}",
        uncompressed="tokcomp-r0",
        paper={f"{who}-r{degree}": ratio for who in ("published", "tokcomp") for degree, ratio in PAPER.items()},
    )
