"""docs/results-history.md: earlier versions of the records, from a small repository of made-up ones."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import page as results_page
from benchmarks.page.history import PICTURE, history_page, read_history, write_history
from tests.bench.test_speed_table import AS_IT_IS, FLOAT32, SWITCHED_OFF, cells, save

ROOT = Path(__file__).resolve().parents[2]


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def record(results: Path, day: int, rate: float, sets: dict[str, str] = AS_IT_IS, **more: Any) -> None:
    """What a run leaves in place of the one before."""
    folder = results / ("amd-epyc" if sets == AS_IT_IS else "amd-epyc-avx2")
    save(folder, sets, [*FLOAT32[:-1], FLOAT32[-1] | {"images_per_second": rate, "seconds": [1 / rate]}], day, **more)
    (folder / f"{day}.json").rename(folder / "deit.json")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Measured on three days, on the second with other instructions; one commit changes words, one spoils a file."""
    repository = tmp_path / "repository"
    results = repository / "benchmarks" / "results"
    results.mkdir(parents=True)
    git(repository, "init", "-q")

    def commit(subject: str) -> None:
        git(repository, "add", ".")
        git(repository, "commit", "-qm", subject)

    record(results, 1, 50)
    (results / "predictions.json").write_text("{}")
    commit("one")
    record(results, 2, 30, SWITCHED_OFF)
    commit("two")
    (results / "amd-epyc" / "deit.json").write_text("{")
    commit("a slip")
    record(results, 1, 50, command="another")
    commit("words")
    record(results, 3, 60)
    commit("three")
    return results


def lines(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("| 2030")]


def test_every_measurement_has_a_line(results: Path) -> None:
    history = read_history(results)
    assert history is not None and not history.shallow
    text = history_page(history)
    assert [[line[0][:10], *line[2:]] for line in lines(text)] == [
        ["2030-01-01", "AMD EPYC, AVX-512", "unknown", "float32", "50, 2.0x openvino"],
        ["2030-01-02", "AMD EPYC, AVX-512 switched off", "unknown", "float32", "30, 1.2x openvino"],
        ["2030-01-03", "AMD EPYC, AVX-512", "unknown", "float32", "60, 2.4x openvino"],
    ]
    [spoilt] = history.unreadable
    assert spoilt.endswith(":benchmarks/results/amd-epyc/deit.json") and f"`{spoilt}`" in text
    assert "shallow" not in text


def test_what_is_not_committed_yet_counts(results: Path) -> None:
    record(results, 4, 70)
    history = read_history(results)
    assert history is not None and [one.date[:10] for one in history.measurements][-1] == "2030-01-04"
    assert len(history.measurements) == 4


def test_a_shallow_clone_says_so(results: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{tmp_path / 'repository'}", "shallow")
    history = read_history(tmp_path / "shallow" / "benchmarks" / "results")
    assert history is not None and history.shallow
    text = history_page(history)
    assert "**Drawn in a shallow clone**" in text
    assert [line[0][:10] for line in lines(text)] == ["2030-01-02", "2030-01-03"]


def test_page_and_picture_are_written_where_git_is(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    outside = tmp_path / "outside"
    save(outside / "amd-epyc", AS_IT_IS, FLOAT32)
    assert not write_history(outside, docs) and not docs.exists()
    assert write_history(results, docs)
    assert f"](images/{PICTURE})" in (docs / "results-history.md").read_text()
    assert (docs / "images" / PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_nothing_measured_yet(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "results").mkdir()
    git(tmp_path, "commit", "-qm", "empty", "--allow-empty")
    history = read_history(tmp_path / "results")
    assert history is not None and "Nothing has been measured yet" in history_page(history)


def test_the_page_is_drawn_from_this_history() -> None:
    history = read_history(ROOT / "benchmarks" / "results")
    if history is None or history.shallow:
        pytest.skip("needs the whole history")
    text = (ROOT / "docs" / "results-history.md").read_text(encoding="utf-8")
    assert text == history_page(history), f"run {results_page.COMMAND}"
    assert (ROOT / "docs" / "images" / PICTURE).stat().st_size > 1000
