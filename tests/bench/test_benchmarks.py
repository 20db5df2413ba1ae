"""`pytest benchmarks/` works: a row is gated, timed, shown and recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *options: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "--device", "cpu", "-p", "no:cacheprovider"]
    choice = ["-k", "unmerge and not backward and deit-s and float32", "--results", str(tmp_path / "results")]
    # pytest-benchmark times nothing where it believes itself to be a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, *choice, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_row_is_recorded(tmp_path: Path) -> None:
    text = run(tmp_path, "--benchmark-only", "--rounds", "2")
    assert "test_operator[unmerge-deit-s-2.3G-197to192to180-float32]" in text  # pytest-benchmark's own table
    assert "speed over the eager chain" in text
    [path] = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert record["provenance"]["versions"]["torch"]
    assert record["rates"]["float32"]["copy_bytes_per_s"] > 0
    assert {"dispatched", "reference", "eager"} <= {row["backend"] for row in record["rows"]}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in record["rows"])


def test_without_timing_nothing_is_recorded(tmp_path: Path) -> None:
    assert "1 passed" in run(tmp_path, "--benchmark-disable")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--device": "cuda:99"}, "--device must be one of the"),
        ({"--published-code": ["/nope"]}, "--published-code must be the folder of a clone of DiffRate"),
        ({"--batches": "8,x"}, "--batches must be numbers from 1"),
        ({"--rounds": 0}, "--rounds must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_is_a_mistake_in_usage(options: dict[str, Any], message: str) -> None:
    """pytest answers a UsageError in one line; any other exception is an INTERNALERROR with its traceback."""
    from benchmarks.conftest import pytest_configure

    values = {"--device": "cpu", "--published-code": [], "--batches": None, "--rounds": 5, "--results": None}
    values |= {"compiled": None, "--no-rivals": False, **options}
    with pytest.raises(pytest.UsageError, match=message):
        pytest_configure(SimpleNamespace(getoption=values.get, stash={}, invocation_params=SimpleNamespace(args=())))
