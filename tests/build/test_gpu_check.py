"""The GPU check's bookkeeping: limits are kept, and what failed is said first."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokcomp_kernels.ops import IMPLEMENTATIONS

ROOT = Path(__file__).resolve().parents[2]
FACTS = {
    "gpu": "a GPU",
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "commit": "abc",
    "compute_capability": "",
}


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
    build = gpu_check.Step("build", [], status="passed")
    tests = gpu_check.Step("tests", [], status="failed (exit status 1)", failures=["test_x: wrong"])
    assert gpu_check.summary(FACTS, [build]).startswith("all passed\n")
    text = gpu_check.summary(FACTS, [build, tests])
    assert text.startswith("NOT everything passed: tests failed (exit status 1)\n")
    assert "- test_x: wrong\n" in text


def test_the_most_telling_steps_come_first(gpu_check: ModuleType):
    """Build, whole models and the operators of every block fit into nine minutes, and every benchmark has a step."""
    names = [plan.name for plan in gpu_check.chosen(None)]
    assert names[:4] == ["build", "models", "operators", "tests"]
    assert sum(plan.seconds for plan in gpu_check.PLANS[:3]) <= 600
    assert all(gpu_check.LEAST_SECONDS < plan.seconds <= 600 for plan in gpu_check.PLANS)
    files = {argument.partition("::")[0] for plan in gpu_check.PLANS for argument in plan.arguments[:1]}
    assert files == {str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_*.py")}


def test_the_operators_of_every_block_are_found(gpu_check: ModuleType):
    """pytest's -k of the first operators' step; the other step has its complement."""
    first, other = (plan for plan in gpu_check.PLANS if plan.arguments[:1] == ("benchmarks/test_ops.py",))
    assert other.arguments[2] == f"not ({first.arguments[2]})"
    command = gpu_check.pytest_command(*first.arguments, "--collect-only", "--device=cpu")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = {line.partition("[")[2].partition("-deit")[0] for line in done.stdout.splitlines() if "::" in line}
    every_block = {"prune_merge_norm", "attention", "add_layer_norm", "linear_gelu"}
    assert found == every_block & IMPLEMENTATIONS.keys()


def test_chosen_steps_keep_their_order(gpu_check: ModuleType):
    assert [plan.name for plan in gpu_check.chosen("tocom, build,search")] == ["build", "search", "tocom"]
    with pytest.raises(ValueError, match=r"--only must name steps out of build, models, .*, got model, speed"):
        gpu_check.chosen("model,speed,build")


def test_benchmarks_run_on_the_gpu_and_keep_their_records(gpu_check: ModuleType, tmp_path: Path):
    [plan] = gpu_check.chosen("compiled")
    command = gpu_check.command_of(plan, tmp_path / "report.xml", tmp_path / "records", ["/clones/ToMe"])
    assert {"--device=cuda", "--compile", "--benchmark-only", "--published-code=/clones/ToMe"} < set(command)
    assert f"--results={tmp_path / 'records'}" in command


ROW = {
    "suite": "models",
    "model": "deit",
    "budget": 2.3,
    "batch": 256,
    "name": "tokcomp",
    "images_per_second": 1234.5,
    "speedup": [4.0, 3.9, 4.1],
    "over_timm_compiled": [2.25, 2.2, 2.3],
    "share_of_ideal": 0.751,
    "efficiency": [0.97, 0.96, 0.98],
    "tax": None,
}


def test_what_there_is_no_time_for_is_named(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two steps, the first of which uses the time up; its records are in the summary and in results.json."""
    missing = {"suite": "models", "model": "deit", "batch": 256, "name": "timm-compiled", "reason": "no compiler"}
    record = json.dumps({"rows": [ROW], "not_measured": [missing]})
    script = f"import pathlib, sys, time; pathlib.Path(sys.argv[1], 'a.json').write_text({record!r}); time.sleep(2)"
    plans = (gpu_check.Plan("models", 60), gpu_check.Plan("search", 60))
    monkeypatch.setattr(gpu_check, "PLANS", plans)
    monkeypatch.setattr(gpu_check, "machine", lambda: FACTS)
    monkeypatch.setattr(
        gpu_check, "command_of", lambda plan, report, records, clones: [sys.executable, "-c", script, str(records)]
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--minutes", "0.94"])
    assert gpu_check.main() == 1
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("NOT everything passed: search not begun: no time left\n")
    assert "--only search`" in text
    assert "| deit 2.3G | 256 | tokcomp | 1234 | 4.00x | 2.25x | 75% | 97.0% |  |" in text
    assert "- models, deit, batch 256, timm-compiled: no compiler" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [step["status"] for step in results["steps"]] == ["passed", gpu_check.NO_TIME]
    assert results["records"][0]["rows"] == [ROW]
    assert "models: passed" in capsys.readouterr().out
