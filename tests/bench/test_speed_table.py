"""README's table of speed and the page's ratios, from made-up records of two classes of one CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import speed
from benchmarks.page.ratios import runs, with_ratios
from benchmarks.page.tables import not_measured, read_records, rows_by_suite

SWITCHED_OFF = {"cpu": "avx512", "torch": "avx2", "onednn": "avx2", "tokcomp": "avx2"}
AS_IT_IS = dict.fromkeys(SWITCHED_OFF, "avx512")


def row(name: str, precision: str, rate: float, **changes: Any) -> dict[str, Any]:
    measured = {"images_per_second": rate, "least_images_per_second": rate, "most_images_per_second": rate}
    whose = {"suite": "models", "model": speed.MODEL, "budget": speed.BUDGET, "name": name, "batch": 1}
    return {
        **whose,
        "precision": precision,
        "gflops": 2.3,
        **measured,
        "speedup": None,
        "seconds": [1 / rate],
        **changes,
    }


FLOAT32 = [row("published", "float32", 20), row("timm", "float32", 10), row("openvino", "float32", 25)]
FLOAT32 += [row("onnxruntime-int8", "int8", 40, same_answers=8 / 9), row("tokcomp", "float32", 50)]
BFLOAT16 = [row("published", "bfloat16", 5), row("published-float32", "float32", 22), row("timm", "bfloat16", 2)]
BFLOAT16 += [row("openvino-float32", "float32", 24), row("tokcomp", "bfloat16", 48)]


def save(folder: Path, sets: dict[str, str], rows: list[dict[str, Any]], day: int = 1, **more: Any) -> None:
    host = {"threads": 2, "capability": "X", "load": 0.0, **({"instruction_sets": sets} if sets else {})}
    provenance = {
        "date": f"2030-01-0{day}T00:00:00",
        "device": "AMD EPYC",
        "commit": None,
        "versions": {},
        "host": host,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{day}.json").write_text(json.dumps({"provenance": provenance, "rows": rows, **more}))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_machine_class_and_precision_has_a_line_with_its_best_rival(tmp_path: Path) -> None:
    save(tmp_path / "amd-epyc", AS_IT_IS, FLOAT32)
    save(tmp_path / "amd-epyc-avx2", SWITCHED_OFF, [*FLOAT32, *BFLOAT16], day=2)
    text = speed.speed_section(read_records(tmp_path))
    assert "**2.0x to 2.0x** on AMD EPYC, AVX-512 (measured there: timm, openvino, onnxruntime-int8)" in " ".join(
        text.split()
    )
    lines = [cells(line) for line in text.splitlines() if line.startswith("| AMD")]
    off = "AMD EPYC, AVX-512 switched off"
    assert lines == [
        ["AMD EPYC, AVX-512", "float32", "1", "20", "25, openvino", "50", "2.5x", "-", "2.0x"],
        ["AMD EPYC, AVX-512", "int8", "1", "-", "40, onnxruntime-int8", "-", "-", "-", "-"],
        [off, "float32", "1", "20", "25, openvino", "50", "2.5x", "-", "2.0x"],
        [off, "bfloat16", "1", "5", "24, openvino-float32", "48", "9.6x", "2.2x", "2.0x"],
        [off, "int8", "1", "-", "40, onnxruntime-int8", "-", "-", "-", "-"],
    ]


def test_without_records_it_says_so() -> None:
    assert speed.speed_section([]).startswith("Not measured yet.")
    with pytest.raises(ValueError, match="the page must hold the lines <!-- speed"):
        speed.replace_speed(f"{speed.END}{speed.BEGIN}", [])


def test_older_records_get_the_ratios_from_their_rounds(tmp_path: Path) -> None:
    """Theirs are over the published pipeline in float32, and know one rival."""
    old = [{**one, "speedup": [9, 9, 9], "over_timm": [9, 9, 9]} for one in BFLOAT16 if "openvino" not in one["name"]]
    save(tmp_path / "amd-epyc", {}, old)
    [record] = read_records(tmp_path)
    assert record.machine == "AMD EPYC"
    found = {one["name"]: one for _, one in rows_by_suite([record])["models"]}
    ours = found["tokcomp"]
    assert ours["over_published"] == pytest.approx((9.6,) * 3) and ours["best_rival"] == "timm"
    assert ours["over_published_float32"] == pytest.approx((48 / 22,) * 3)
    assert "speedup" not in ours and "over_timm" not in ours


def test_rows_that_took_turns_are_found_by_their_names() -> None:
    other = [{**one, "batch": 16} for one in FLOAT32]
    assert [len(run) for run in runs([*FLOAT32, *BFLOAT16, *other])] == [5, 5, 5] and not list(runs([]))
    assert [one["best_rival"] for one in with_ratios(FLOAT32) if one["name"] == "tokcomp"] == ["openvino"]


def test_what_was_measured_later_is_not_missing(tmp_path: Path) -> None:
    missing = {"suite": "models", "model": speed.MODEL, "batch": 1, "precision": "float32", "reason": "absent"}
    absent = [{**missing, "name": name} for name in ("openvino", "onnxruntime")]
    save(tmp_path / "amd-epyc", AS_IT_IS, [FLOAT32[1]], not_measured=absent)
    save(tmp_path / "amd-epyc", AS_IT_IS, FLOAT32, day=2, not_measured=absent[1:])
    assert [one["name"] for one in not_measured(read_records(tmp_path), "models")] == ["onnxruntime"]
