"""What the reproductions share: units that resume, statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import runner
from benchmarks.reproduce.spread import difference, paired

WORK = """
from pathlib import Path

def count(folder, step, fail=False):
    if fail and not (folder / "mended").exists():
        raise RuntimeError("broken")
    with open(folder / "calls", "a") as file:
        file.write(step + "\\n")
    return {"step": step}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "reproduce_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def unit(step: str, needs: tuple[str, ...] = (), **arguments: Any) -> runner.Unit:
    return runner.Unit(step, "reproduce_work:count", {"step": step, **arguments}, needs)


def test_a_stopped_run_goes_on_and_a_changed_unit_runs_again(work: Path) -> None:
    lines: list[str] = []
    units = [unit("late", ("early", "other")), unit("early"), unit("other", ("early",), fail=True)]
    with pytest.raises(RuntimeError, match="broken"):
        runner.run_units(work, units, 1, lines.append)
    assert (work / "calls").read_text().split() == ["early"]
    (work / "mended").touch()
    runner.run_units(work, units, 2, lines.append)
    assert (work / "calls").read_text().split() == ["early", "other", "late"]
    assert runner.load_result(work, "late") == {"step": "late"}
    assert "1 of 3 units are there already" in lines and lines[-1].startswith("[  3/3]")
    # Another argument of a unit: it and what needs it run again, the rest does not.
    units[2] = unit("other", ("early",))
    runner.run_units(work, units, 1, lines.append)
    assert (work / "calls").read_text().split() == ["early", "other", "late", "other", "late"]


def test_paired_differences() -> None:
    mean, half = paired([1.0, 2.0, 6.0], [0.0, 0.0, 0.0])
    assert mean == pytest.approx(3.0)
    # t(0.975, 2 degrees) = 4.303; the deviation is sqrt(7).
    assert half == pytest.approx(4.303 * 7**0.5 / 3**0.5)
    assert paired([2.0, 3.0], [1.0, 2.0]) == (1.0, 0.0)


def test_a_difference_as_printed() -> None:
    values = [1.0, 2.0, 6.0]
    assert difference(values, values) == ""
    assert difference(values, [0.0, 2.0, 9.0]) == "-0.67 ± 5.17 (1 of 3, 1 level)"
    assert difference([1.5], [1.0]) == "+0.50"
