"""Runtimes other than PyTorch: real ones on a small model where they are installed, and what becomes of absent ones."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from tokcomp.bench import rivals
from tokcomp.bench.entries import Entry, uncompressed_rivals
from tokcomp.bench.gate import DisagreementError, Gate
from tokcomp.bench.models import Row, compare_models
from tokcomp.bench.ratios import Ratios, best_rival
from tokcomp.bench.report import headline, table

from tests.bench.toys import CPU, METHOD, make_vit, seconds

UNDER_NO_LIMIT = pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ, reason="OpenVINO itself crashes on small models under a limit"
)


@pytest.fixture(autouse=True)
def at_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU from which nothing is withheld."""
    monkeypatch.setattr(rivals, "instruction_sets", lambda: {"cpu": "avx2", "torch": "avx2"})


@UNDER_NO_LIMIT
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"])
def test_a_real_rival_computes_what_timm_does(name: str) -> None:
    for module in ("onnx", "onnxruntime", *(["openvino"] if name.startswith("openvino") else [])):
        pytest.importorskip(module, reason="a part of tokcomp[bench]")
    rows, missing = compare_models(
        make_vit(), {name: Entry(name)}, batch_sizes=[4], precision="float32", device=CPU, measure=seconds()
    )
    assert not missing
    [row] = rows
    assert row.precision == ("int8" if name.endswith("-int8") else "float32")
    assert (row.same_answers is not None) == (row.precision == "int8")
    model, images = make_vit(), torch.randn(4, 3, 32, 32)
    run = rivals.build_rival(name, model, torch.float32, CPU, 4)
    with torch.inference_mode():
        want = model.double()(images.double())
    error = ((run(images) - want).norm() / want.norm()).item()
    # The gate has held the row to its bound; here, that int8 is really int8 and float32 really float32.
    assert (error > 1000 * torch.finfo(torch.float32).eps) == (row.precision == "int8")


def test_the_compressed_onnx_file_is_held_to_the_published_pipeline() -> None:
    name = "tokcomp-onnx-int8"
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="a part of tokcomp[bench]")
    rows, missing = compare_models(
        make_vit(), {name: Entry(name, METHOD)}, batch_sizes=[4], precision="float32", device=CPU, measure=seconds()
    )
    assert not missing and [row.precision for row in rows] == ["int8"] and rows[0].same_answers is not None
    assert not Entry(name, METHOD).is_ours  # so that a fault of another runtime is a line, not the end


@UNDER_NO_LIMIT
def test_openvino_reaches_bfloat16_by_itself_or_says_that_it_cannot() -> None:
    for module in ("onnx", "openvino"):
        pytest.importorskip(module, reason="a part of tokcomp[bench]")
    entries = {name: one for name, one in uncompressed_rivals(CPU, "bfloat16").items() if name.startswith("openvino")}
    rows, missing = compare_models(
        make_vit(), entries, batch_sizes=[2], precision="bfloat16", device=CPU, measure=seconds()
    )
    shown = {row.name: row.precision for row in [*rows, *missing]}
    assert shown == {"openvino": "bfloat16", "openvino-float32": "float32"} and "openvino-float32" in {
        row.name for row in rows
    }
    assert all("openvino has no bfloat16 on this CPU" in one.reason for one in missing)


def test_who_is_absent_or_cannot_is_a_line_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    entries = uncompressed_rivals(CPU, "float32", compiled=False, autotuned=True) | {"tensorrt": Entry("tensorrt")}
    monkeypatch.setattr(importlib, "import_module", absent)
    rows, missing = compare_models(
        make_vit(), entries, batch_sizes=[1], precision="float32", device=CPU, measure=seconds()
    )
    reasons = {one.name: one.reason for one in missing}
    assert [row.name for row in rows] == ["timm"] and set(reasons) == set(entries) - {"timm"}
    for name in ("onnxruntime", "onnxruntime-int8", "torchao-int8", "openvino"):
        assert "cannot be imported: pip install 'tokcomp[bench]'" in reasons[name]
    assert reasons["tensorrt"].endswith("tensorrt does not run a ViT in float32 on cpu")
    assert {one.precision for one in missing if one.name == "onnxruntime-int8"} == {"int8"}


def test_onnx_runtime_stays_out_where_instructions_are_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would use them all the same, and stand above everyone who may not."""
    held = {"cpu": "avx512", "torch": "avx2", "onednn": "avx2", "tokcomp": "avx2"}
    monkeypatch.setattr(rivals, "instruction_sets", lambda: held)
    with pytest.raises(rivals.RivalError, match="cannot be kept from avx512"):
        rivals.build_rival("onnxruntime", make_vit(), torch.float32, CPU, 1)


def test_a_rival_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gate = make_vit(), Gate(make_vit(), "float32", CPU)
    with torch.inference_mode():
        for name, fault in (("openvino", lambda logits: logits * 1.01), ("onnxruntime-int8", lambda logits: -logits)):
            entry = Entry(name)
            with pytest.raises(DisagreementError, match=name):
                gate.check(lambda images, fault=fault: fault(model(images)), None, entry=entry)
            gate.check(model, None, entry=entry)
        # Rounding to 8 bits is no fault in int8, and one in float32.
        coarse = lambda images: torch.round(model(images) * 64) / 64  # noqa: E731
        assert gate.check(coarse, None, entry=Entry("onnxruntime-int8"))["same_answers"] >= 0.5
        with pytest.raises(DisagreementError, match="more than twice as far"):
            gate.check(coarse, None, entry=Entry("onnxruntime"))


def row(name: str, precision: str, rate: float) -> Row:
    return Row(name, 8, precision, 1.0, rate, rate, rate, None, (8 / rate,) * 3)


RUN = {
    one.name: one
    for one in (
        row("published", "bfloat16", 20.0),
        row("published-float32", "float32", 40.0),
        row("timm", "bfloat16", 5.0),
        row("openvino-float32", "float32", 50.0),
        row("onnxruntime-int8", "int8", 200.0),
        row("tokcomp-uncompressed", "bfloat16", 400.0),
        row("tokcomp", "bfloat16", 100.0),
    )
}


def test_like_is_compared_with_like() -> None:
    """bfloat16 with bfloat16, its float32 beside; rivals of like precision or finer, so int8 is not among them."""
    found = Ratios.of(RUN["tokcomp"], RUN)
    assert found.over_published == pytest.approx((5, 5, 5)) and found.over_published_float32 == pytest.approx([2.5] * 3)
    assert found.best_rival == "openvino-float32" and found.over_best_rival == pytest.approx((2, 2, 2))
    in_float32 = Ratios.of(RUN["published-float32"], RUN)
    assert in_float32.over_published is None and in_float32.best_rival == "openvino-float32"
    assert best_rival("int8", RUN.values()).name == "onnxruntime-int8"
    assert Ratios.of(RUN["tokcomp"], {"tokcomp": RUN["tokcomp"]}) == Ratios(None, None, None, None)


def test_the_headline_names_the_best_rival() -> None:
    rows = [one for name, one in RUN.items() if name != "tokcomp-uncompressed"]
    assert headline(rows) == (
        "batch 8: tokcomp (bfloat16) at 100.0 images/s, 2.00x the best uncompressed rival, "
        "openvino-float32 (float32) at 50.0 images/s"
    )
    assert headline([RUN["tokcomp"]]).endswith("no uncompressed rival was measured") and headline([RUN["timm"]]) == ""
    last = table(rows).splitlines()[-1].split()
    assert last[:3] == ["8", "tokcomp", "bfloat16"] and last[-5:] == ["5.00x", "5.00x", "5.00x", "2.50x", "2.00x"]


def test_rivals_take_no_method() -> None:
    with pytest.raises(ValueError, match="all but uncompressed rivals"):
        Entry("openvino", METHOD)
