"""Launches compile for GPUs that are not there: a block of ViT-S, and calls that meet every entry of every table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tokcomp_kernels._schema import OPERATORS
from tokcomp_kernels.triton import _configs

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "the report is out of date: run make kernel-report"
#: Every operator once, forward and backward, in a block of ViT-S.
QUICK = " S float16"


def run(*command: str) -> str:
    """A process of its own: under the interpreter, which the other tests ask for, there is nothing to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def committed() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "kernels" / "triton.json").read_text())


@pytest.fixture(scope="module")
def listing() -> dict[str, Any]:
    return json.loads(run(str(Path(__file__).with_name("launches.py"))).splitlines()[-1])


def test_a_block_s_launches_compile_and_are_fit_to_ship(tmp_path: Path) -> None:
    tool = str(ROOT / "tools" / "kernel_report.py")
    run(tool, "triton", "--only", QUICK, "--architectures", "90", "--out", str(tmp_path))
    report = json.loads((tmp_path / "triton.json").read_text())
    assert {row["operator"] for row in report["kernels"]} >= {"attention", "_attention_backward", "linear_gelu"}
    assert all(0 < row["registers"] <= 255 for row in report["kernels"])
    if report["versions"] == committed()["versions"]:
        ours = {(row["kernel"], row["dtype"], row["registers"], row["shared"]) for row in report["kernels"]}
        theirs = {(row["kernel"], row["dtype"], row["registers"], row["shared"]) for row in committed()["kernels"]}
        assert ours <= theirs, AGAIN


def test_cases_call_every_operator(listing: dict[str, Any]) -> None:
    from tokcomp_kernels.triton._cases import cases

    assert {case.op for case in cases()} == {operator.name for operator in OPERATORS}


def test_every_kernel_is_reported(listing: dict[str, Any]) -> None:
    rows = committed()["kernels"]
    for architecture in (80, 90):
        reported = sorted([r["operator"], r["case"], r["kernel"]] for r in rows if r["architecture"] == architecture)
        assert reported == sorted(listing["reported"]), AGAIN


def test_published_schedules_launch_nothing_else(listing: dict[str, Any]) -> None:
    assert listing["published"] > 40
    assert listing["unknown"] == []


def test_every_kernel_there_is_gets_compiled(listing: dict[str, Any]) -> None:
    folder = Path(_configs.__file__).parent
    sources = "".join(path.read_text() for path in folder.glob("*.py"))
    assert set(listing["kernels"]) == set(re.findall(r"^def (\w+_kernel)\(", sources, re.M))


def test_every_entry_of_every_table_is_met(listing: dict[str, Any]) -> None:
    met = set()
    for op, kernel, device, shape in listing["lookups"]:
        entries, values = _configs.load(op)[device][kernel], dict(shape)
        fits = (i for i, e in enumerate(entries) if all(values[n] <= bound for n, bound in e.get("when", {}).items()))
        met.add((op, kernel, next(fits)))
    tables = {path.stem: _configs.load(path.stem)["default"] for path in _configs.CONFIG_DIR.glob("*.json")}
    there = {
        (op, kernel, i) for op, table in tables.items() for kernel, rows in table.items() for i in range(len(rows))
    }
    assert there - met == set()


def test_a_launch_that_its_gpu_cannot_hold_is_a_failure(listing: dict[str, Any]) -> None:
    report = listing["too large"]
    assert report["kernels"] == []
    assert [row["operator"] for row in report["failures"]] == ["_merge_backward"]
    assert "out of resource: shared memory" in report["failures"][0]["error"]


def test_compiling_refuses_what_it_cannot_do() -> None:
    from tokcomp_kernels.triton._compile import compiling

    with pytest.raises(ValueError, match="capability must be one of 80, 90, 100, 120, got 75"), compiling(75):
        pass
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must be unset"), compiling(90):
        pass


def test_the_floor_is_the_oldest_triton_that_is_tried() -> None:
    floor = re.search(r'"triton>=([\d.]+);', (ROOT / "pyproject.toml").read_text())
    tried = re.search(r"^TRITONS \?= ([\d.]+)", (ROOT / "Makefile").read_text(), re.M)
    assert floor and tried
    assert tried[1] in (floor[1], f"{floor[1]}.0")
