"""The notebooks run from their first cell to their last, on small models where the real ones are downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokcomp
import torch
from tokcomp.budgets import LatencyTable
from tokcomp.budgets.vit_parts import uniform_blocks

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
#: In tests/building/test_libtorch.py, beside the build that it needs.
WITH_A_BUILD = {"cpp"}
SMALL = "img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2"


def run(name: str, smaller: dict[str, str] | None = None, **names: Any) -> dict[str, Any]:
    """What a notebook's code leaves behind; ``smaller`` says what is written otherwise, and everything else is not."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all(cell.get("outputs", []) == [] for cell in notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for written, instead in (smaller or {}).items():
        assert any(written in cell for cell in cells), f"{name} no longer says {written}"
        cells = [cell.replace(written, instead) for cell in cells]
    found = dict(names)
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"{name}, cell {number}", "exec"), found)
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_notebook_has_a_test() -> None:
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == (tested | WITH_A_BUILD) - {"every-notebook-has-a-test"}


@pytest.mark.slow
def test_compress() -> None:
    pytest.importorskip("sklearn")
    found = run("compress")
    costs, scores = zip(*found["results"].values(), strict=True)
    assert len(costs) == 4 and max(costs[1:]) < 0.6 * costs[0] and min(scores) > 93


@pytest.mark.slow
def test_clip_zero_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": 99},
        vision_config={**shape, "image_size": 224, "patch_size": 32},
        projection_dim=16,
    )
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([[1, 2, 98], [1, 3, 98], [1, 4, 98]]),
        "pixel_values": torch.randn(3, 3, 224, 224),
    }
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", lambda name: transformers.CLIPModel(config))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: lambda **given: inputs)
    found = run("clip-zero-shot")
    costs = list(found["costs"].values())
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4
    assert tokcomp.flops(found["model"].vision_model) == costs[0]


def test_dinov2_features() -> None:
    found = run("dinov2-features", {"pretrained=True, img_size=448": "img_size=56, embed_dim=24, depth=3, num_heads=2"})
    assert found["dense"].shape == found["plain"].shape == (1, 16, 24) and found["tokens"].shape[1] == 17 - 3
    assert found["picture"].size == (64, 64) and found["similarity"].mean() > 0.5


def test_dinov2_segmentation() -> None:
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    smaller = {"pretrained=True, img_size=224": "img_size=70, embed_dim=48, depth=3, num_heads=2", "(64, t": "(16, t"}
    found = run("dinov2-segmentation", {**smaller, "(320, ": "(64, ", "range(300)": "range(100)"})
    costs, scores = zip(*found["results"].values(), strict=True)
    assert costs[0] > costs[1] > costs[2] and costs[3] < costs[0]
    # The background alone, everywhere, would have a sixth of its share.
    share = (torch.cat([masks for _, masks in found["held_out"]]) == 0).float().mean().item()
    assert min(scores) > 100 * share / 6 + 2 and max(scores) - min(scores) < 10
    assert len(found["painted"]) == 4 and len(found["classes"]) == 64


@pytest.mark.slow
def test_search_for_latency() -> None:
    pytest.importorskip("sklearn")
    from timm import create_model

    model = create_model("tokcomp_digits_vit")
    times = {f"{part}_ms": [1.0, 100.0] for part in ("attention", "mlp")}
    times |= {f"{part}_ms": [0.0, 0.0] for part in ("reduce", "head")}
    shape = dict(depth=6, num_tokens=65, num_prefix_tokens=1, block=uniform_blocks(model)._asdict())
    table = LatencyTable(**shape, batch_size=16, dtype="float32", embed_ms=0.0, counts=[1, 65], **times)
    table.save("latency.json")
    found = run("search-for-latency", {"steps=300": "steps=8", "batch_size=64": "batch_size=8"})
    assert found["whole"] == pytest.approx(1200) and found["found"] < 1200
    assert Path("digits-latency/README.md").exists()


def test_switch_under_load() -> None:
    pytest.importorskip("sklearn")
    smaller = {"(0.01, images[:40])": "(0.002, images[:20])", "(0.01, images[200:240])": "(0.002, images[200:220])"}
    found = run("switch-under-load", {**smaller, "images[40:200]": "images[40:120]"})
    answers = found["answers"]
    assert len(answers) == 120 and {answer.degree for answer in answers} <= {0, 8, 16}


@pytest.mark.slow
def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    method = 'tokcomp.DiffRate.published("deit_small_patch16_224", gflops=2.3)'
    smaller = {'"deit_small_patch16_224", pretrained=True': f'"deit_small_patch16_224", {SMALL}'}
    assert run("onnx", {**smaller, method: "tokcomp.ToMe(2)", "224, 224)": "32, 32)"})["difference"] < 1e-4
