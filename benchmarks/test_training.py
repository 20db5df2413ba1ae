"""Training steps of DeiT-S, compressed against uncompressed: what the DiffRate paper's Table 11 says of an A100.

"timm" and "published" are PyTorch's own steps; the others are tokcomp's, with oneDNN's linear layers in float32 on CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
from tokcomp.bench.models import create_model, keep_everything
from tokcomp.measure.provenance import find_device

from benchmarks.training_steps import PRECISIONS, Trainee, compare_training
from benchmarks.whole_model import batches

MODEL = "deit_small_patch16_224"
#: DiffRate's budget -> how many times faster than uncompressed its Table 11 trains (A100).
PAPER = {2.3: 1.8, 2.9: 1.4}
BATCH = {"cpu": 16, "cuda": 256}
TABLE = "training steps of DeiT-S: images per second; speed over uncompressed timm and over our own uncompressed"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    metafunc.parametrize("precision", PRECISIONS[kind])
    metafunc.parametrize("batch", batches(metafunc.config, [BATCH[kind]]))


def test_training_step(batch: int, precision: str, timed: Any, results: Any) -> None:
    """A whole step of the fine-tuning recipe: mixup, forward, backward, AdamW; precision by autocast."""
    plain = create_model(MODEL, device=results.device).train()
    methods = {budget: tokcomp.DiffRate.published(MODEL, budget) for budget in PAPER}
    trainees = {"timm": Trainee(), "tokcomp-uncompressed": Trainee(keep_everything(plain))}
    trainees |= {f"tokcomp-{budget}G": Trainee(method) for budget, method in methods.items()}
    trainees |= {f"published-{budget}G": Trainee(method, published=True) for budget, method in methods.items()}
    if results.choice.compiled != "none":
        trainees["timm-compiled"] = Trainee(compiled=True)
    if results.choice.compiled == "all":
        trainees["tokcomp-2.3G-compiled"] = Trainee(methods[2.3], compiled=True)
    compare_training(
        plain,
        trainees,
        batch,
        precision,
        timed,
        results,
        suite="training",
        table=TABLE,
        name=MODEL,
        shown="tokcomp-2.3G",
        uncompressed="tokcomp-uncompressed",
        paper={f"{who}-{budget}G": ratio for who in ("published", "tokcomp") for budget, ratio in PAPER.items()},
    )
