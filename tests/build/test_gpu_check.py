"""The GPU check's bookkeeping: limits are kept, and what failed is said first."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools/gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("pass", 60, "passed"),
        ("raise SystemExit(3)", 60, "failed (exit status 3)"),
        ("import time; time.sleep(600)", 1, "stopped after 1 s"),
    ],
)
def test_a_step(gpu_check: ModuleType, tmp_path: Path, code: str, limit: int, status: str):
    step = gpu_check.Step("a step", [sys.executable, "-c", code])
    assert gpu_check.run(step, tmp_path / "log", limit, dict(os.environ)).status == status
    assert step.seconds < 60


def test_an_interrupted_pytest_still_reports(gpu_check: ModuleType, tmp_path: Path):
    tests = tmp_path / "test_slow.py"
    tests.write_text(
        "import time\n\ndef test_a():\n    assert 1 == 2, 'one is not two'\n\ndef test_b():\n    time.sleep(600)\n"
    )
    report = tmp_path / "report.xml"
    command = gpu_check.pytest_command(str(tests), f"--junitxml={report}", f"--rootdir={tmp_path}", "-c", os.devnull)
    step = gpu_check.run(gpu_check.Step("tests", command), tmp_path / "log", 20, dict(os.environ))
    gpu_check.read_junit(step, report)
    assert step.status == "stopped after 20 s", (tmp_path / "log").read_text()
    assert step.counts["failures"] == 1
    assert "one is not two" in step.failures[0]


def test_what_failed_is_said_first(gpu_check: ModuleType):
    facts = {"gpu": "a GPU", "packages": {"torch": "2.11.0", "triton": "3.6.0"}, "commit": "abc"}
    build = gpu_check.Step("build", [], status="passed")
    tests = gpu_check.Step("tests", [], status="failed (exit status 1)", failures=["test_x: wrong"])
    assert gpu_check.summary(facts, [build]).startswith("all passed\n")
    text = gpu_check.summary(facts, [build, tests])
    assert text.startswith("NOT everything passed: tests failed (exit status 1)\n")
    assert "- test_x: wrong\n" in text


def test_every_benchmark_has_its_time(gpu_check: ModuleType):
    steps = gpu_check.benchmarks()
    assert [name for name, _, _ in steps] == ["benchmarks", "search-benchmarks"]
    files = [file for _, files, _ in steps for file in files]
    assert sorted(files) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_*.py"))
    assert 0 < steps[0][2] < gpu_check.BENCH_SECONDS and steps[1][2] == 0
