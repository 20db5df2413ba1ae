"""docs/results.md is what its command draws from the committed records; and what it makes of records to come."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.model.predictions import ENTRIES, SUBJECTS, predictions
from benchmarks.model.stacks import GPUS, STACKS
from benchmarks.page import page as results_page
from benchmarks.page import speed
from benchmarks.page import tables as results_tables
from benchmarks.page.predicted import Predicted

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
AGAIN = f"run {results_page.COMMAND}"


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return json.loads(json.dumps(predictions()))


def test_the_page_is_drawn_from_the_records() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    assert text == results_page.page(RESULTS), AGAIN
    for picture in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (ROOT / "docs" / picture).stat().st_size > 1000
    readme = (ROOT / "README.md").read_text()
    assert readme == speed.replace_speed(readme, results_tables.read_records(RESULTS)), AGAIN


def test_predictions_are_of_this_code(fresh: dict[str, Any]) -> None:
    saved = json.loads((RESULTS / "predictions.json").read_text())
    assert {key: saved[key] for key in saved if key not in ("rows", "kernels", "operators")} == {
        key: fresh[key] for key in fresh if key not in ("rows", "kernels", "operators")
    }, AGAIN
    for key in ("rows", "kernels", "operators"):
        assert len(saved[key]) == len(fresh[key]), AGAIN
        for one, other in zip(saved[key], fresh[key], strict=True):
            assert one.keys() == other.keys(), AGAIN
            for name, value in other.items():
                assert one[name] == (pytest.approx(value, rel=2e-3) if isinstance(value, float) else value), AGAIN


def test_predictions_are_in_order(fresh: dict[str, Any]) -> None:
    """Nothing beats the bound, the planned stack stands between it and ours, and larger batches are never slower."""
    rates: dict[tuple[str, str, str], list[float]] = {}
    for row in fresh["rows"]:
        rates.setdefault((row["gpu"], row["title"], row["entry"]), []).append(row["images_per_second"])
    assert len(rates) == len(GPUS) * len(SUBJECTS) * len(ENTRIES)
    for (gpu, title, entry), values in rates.items():
        bound = rates[gpu, title, "ideal" if ENTRIES[entry].compressed else "ideal-uncompressed"]
        assert all(value <= limit for value, limit in zip(values, bound, strict=True)), (gpu, title, entry)
        assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(values))
    for gpu in GPUS:
        for subject in SUBJECTS:
            planned, ours = (rates[gpu, subject.title, entry][-1] for entry in ("planned", "tokcomp-graph"))
            assert ours < planned
    assert {entry.stack for entry in ENTRIES.values()} == set(STACKS)


@pytest.mark.parametrize(
    ("entry", "images_per_second"),
    [
        ("ideal", (360e3, 142e3, 41.8e3, 12.0e3, 4.1e3)),
        ("planned", (267e3, 107e3, 31.8e3, 9.2e3, 3.2e3)),
        ("conventional", (208e3, 80e3, 25.4e3, 7.5e3, 2.6e3)),
        ("published", (54e3, 26e3, 11.4e3, 3.9e3, 1.55e3)),
    ],
)
def test_figures_worked_out_beforehand(entry: str, images_per_second: tuple[float, ...], fresh: dict[str, Any]) -> None:
    """An H200 at batch 1024, float16. Tiles that do not fill the multiprocessors were left out there:"
    "DeiT-T feels it."""
    found = [
        row["images_per_second"]
        for row in fresh["rows"]
        if (row["gpu"], row["entry"], row["batch"]) == ("H200", entry, 1024)
    ]
    assert found[0] == pytest.approx(images_per_second[0], rel=0.08)
    assert found[1:] == pytest.approx(images_per_second[1:], rel=0.03)


def test_floors_worked_out_beforehand(fresh: dict[str, Any]) -> None:
    """Microseconds at C = 384 and 768; ours move more than the least, and at most a third more."""
    floors = {"class_attention_sort": (36, 73), "prune_merge": (68, 136), "prune_merge_norm": (136, 272)}
    floors |= {"attention": (145, 290), "attention_received": (73, 145)}
    for name, microseconds in floors.items():
        found = [row["floor_us"] for row in fresh["operators"] if row["operator"] == name]
        assert found == pytest.approx(microseconds, rel=0.03)
    for row in fresh["operators"]:
        assert row["least_megabytes"] <= row["moved_megabytes"] <= 1.34 * row["least_megabytes"]
        assert row["moved_megabytes"] <= 1.001 * row["cache_megabytes"] and row["floor_us"] < row["predicted_us"]


def test_the_published_code_runs_about_as_fast_as_its_paper_says(fresh: dict[str, Any]) -> None:
    rates = {
        row["title"]: row["images_per_second"]
        for row in fresh["rows"]
        if (row["gpu"], row["entry"], row["batch"]) == ("A100", "published", 1024)
    }
    for title, paper in fresh["paper"]["images_per_second"].items():
        assert rates[title] == pytest.approx(paper, rel=0.15)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    return folder


def add_gpu_record(results: Path, file: str = "a.json", **changes: Any) -> dict[str, Any]:
    """A record such as a GPU's run leaves behind."""
    [saved] = (RESULTS / "amd-epyc").glob("deit-small.json")
    record = json.loads(saved.read_text())
    record["provenance"] |= {"device": "NVIDIA H200", "gpu": {"driver_version": "580.1", "memory_bytes": 1}}
    record["provenance"] |= changes.pop("provenance", {})
    row = {**record["rows"][0], "name": "tokcomp-graph", "batch": 1024, "precision": "float16", **changes}
    record["rows"] = [row]
    (results / "nvidia-h200").mkdir(exist_ok=True)
    (results / "nvidia-h200" / file).write_text(json.dumps(record))
    return record


def test_measurements_stand_beside_predictions(results: Path) -> None:
    before = " ".join(results_page.page(results).split())  # wherever its lines end
    assert "No GPU has run this package's kernels yet" in before and "No GPU has run any of these kernels" in before
    add_gpu_record(results, images_per_second=70_123.0)
    after = results_page.page(results)
    assert "GPUs that ran it: NVIDIA H200." in " ".join(after.split()) and "## Measured on NVIDIA H200" in after
    assert "No GPU has run" not in after
    [line] = [line for line in after.splitlines() if line.startswith("| DeiT-S, 2.3 G") and "70,123" in line]
    predicted = Predicted(json.loads((results / "predictions.json").read_text()), []).rate(
        "H200", "deit_small_patch16_224", "tokcomp-graph", 1024
    )
    assert line.endswith(f"| 70,123 | {70_123 / predicted:.2f} |")


def test_measurements_of_something_else_do_not(results: Path) -> None:
    for number, changes in enumerate(({"gflops": 4.6}, {"batch": 512}, {"name": "tokcomp"}, {"precision": "bfloat16"})):
        add_gpu_record(results, f"{number}.json", images_per_second=70_123.0, **changes)
    section = results_page.page(results).split("## Predicted for GPUs")[1]
    assert "70,123" not in section


def test_the_latest_measurement_counts(results: Path) -> None:
    add_gpu_record(results, "b.json", images_per_second=70_123.0)
    add_gpu_record(results, "a.json", images_per_second=71_234.0, provenance={"date": "2099-01-01T00:00:00+00:00"})
    text = results_page.page(results)
    assert "70,123" not in text and text.count("71,234") == 3


def test_records_of_other_benchmarks_are_shown(results: Path) -> None:
    record = add_gpu_record(
        results, suite="batch-sweep", budget=2.3, efficiency=[0.9, 0.8, 0.95], tax=[0.01, -0.002, 0.02]
    )
    record["not_measured"] = [
        {
            "suite": "batch-sweep",
            "model": "m",
            "name": "timm",
            "batch": 4,
            "precision": "float16",
            "reason": "no memory",
        }
    ]
    other = copy.deepcopy(record["rows"][0]) | {"suite": "something-new", "name": "other"}
    record["rows"].append(other)
    (results / "nvidia-h200" / "a.json").write_text(json.dumps(record))
    text = results_page.page(results)
    assert "### Batch sizes" in text and "images/results-nvidia-h200-batch-sweep.png" in text
    assert "| 90.0 % (80.0 % - 95.0 %) | 1.0 % (-0.2 % - 2.0 %) |" in text
    assert "- m, timm, float16, batch 4: no memory" in text
    assert "### Something new" in text


def test_the_command(
    results: Path,
    tmp_path: Path,
    fresh: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results_page, "predictions", lambda: copy.deepcopy(fresh))
    add_gpu_record(results, suite="batch-sweep", images_per_second=5.0)
    docs = tmp_path / "docs"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{speed.BEGIN}\nold\n{speed.END}\nafter\n")
    assert results_page.main(["--results", str(results), "--docs", str(docs), "--readme", str(readme)]) == 0
    assert readme.read_text() == speed.replace_speed(readme.read_text(), results_tables.read_records(results))
    assert readme.read_text().startswith("before\n") and "old" not in readme.read_text()
    drawn = re.findall(r"\]\((images/[^)]+)\)", (docs / "results.md").read_text())
    assert len(drawn) >= 3 and all((docs / picture).read_bytes()[:4] == b"\x89PNG" for picture in drawn)
    assert "results.md" in capsys.readouterr().out
    (results / "kernels" / "cuda.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cuda\.json is missing: python tools/kernel_report\.py makes it"):
        results_page.page(results)
    with pytest.raises(ValueError, match="--results must be a folder of records"):
        results_page.main(["--results", str(tmp_path / "nowhere")])
    (results / "amd-epyc" / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not a JSON file"):
        results_tables.read_records(results)
