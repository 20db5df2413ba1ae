"""What the reproductions share: units that resume, a command that can be stopped, statistics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reproduce import runner
from benchmarks.reproduce.spread import difference, paired

ROOT = Path(__file__).parents[2]
WORK = """
import time

def count(folder, step, fail=False):
    if fail and not (folder / "mended").exists():
        raise RuntimeError("broken")
    with open(folder / "calls", "a") as file:
        file.write(step + "\\n")
    return {"step": step}

def wait(folder, seconds):
    time.sleep(seconds)
    return seconds
"""

STUDY = """
import sys
from benchmarks.reproduce.command import Study, run_command
from benchmarks.reproduce.runner import Unit

def units(settings):
    return [Unit(str(seconds), "reproduce_work:wait", {"seconds": seconds}) for seconds in (0, 300)]

if __name__ == "__main__":
    sys.exit(run_command(Study("toy", "", None, None, units, None, None, None), sys.argv[1:]))
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


@pytest.mark.slow
def test_ctrl_c_leaves_whole_files_and_no_process(work: Path) -> None:
    (work / "study.py").write_text(STUDY)
    command = [sys.executable, str(work / "study.py"), "--jobs", "1", "--output", str(work / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (work, ROOT, ROOT / "python")))}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("[  1/")
        process.send_signal(signal.SIGINT)
        # The pipes end when the last process that holds them has.
        error = process.stderr.read()
        assert process.wait(60) == 130 and "the same command goes on from here" in error
    (done,) = (work / "out" / "units").iterdir()
    assert done.name == "0.json" and json.loads(done.read_text())["key"]


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
