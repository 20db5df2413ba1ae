"""The CUDA kernels have no races, and each of their barriers is there for a reason: no GPU, no nvcc."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cuda import shim_build

pytestmark = pytest.mark.slow  # builds the kernels once for each state of their sources


@pytest.fixture(scope="module")
def race_library() -> tuple[Path, dict[str, int]]:
    return shim_build.race_library()


def reports(library: Path, *sites: str) -> list[dict[str, Any]]:
    paths = [str(shim_build.ROOT), str(shim_build.ROOT / "python")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(paths)}
    command = [sys.executable, str(Path(__file__).with_name("race_suite.py")), str(library), *sites]
    run = subprocess.run(command, env=environment, cwd=shim_build.ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def with_lines(report: str, library: Path) -> str:
    """The report with source lines in place of addresses."""
    addresses = re.findall(r"0x[0-9a-f]+", report)
    if not addresses or shutil.which("addr2line") is None:
        return report
    for address in addresses:
        command = ["addr2line", "-i", "-s", "-e", str(library), address]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        report = report.replace(address, " in ".join(filter(None, lines)))
    return report


def test_no_races(race_library: tuple[Path, dict[str, int]]) -> None:
    library, _ = race_library
    found = reports(library)
    assert len(found) > 15
    assert not [with_lines(case["report"], library) for case in found if case["report"]]


def test_without_any_one_barrier_there_is_a_report(race_library: tuple[Path, dict[str, int]]) -> None:
    """A barrier that can go unnoticed is one too many, or the cases above do not see what it is for."""
    library, without = race_library
    assert len(without) > 25
    given = [f"{bits}={site}" for site, bits in without.items()]
    found = {one["site"]: one["report"] for one in reports(library, *given)}
    assert found.keys() == without.keys()
    assert not [site for site, report in found.items() if not report]
    # No race, but memory of a block that may not run yet, or no longer.
    said = " ".join(report for site, report in found.items() if " and " in site)
    assert "memory before the cluster's first barrier" in said and "memory after the cluster's last barrier" in said
