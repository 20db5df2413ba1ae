"""The GPU check's bookkeeping: limits are kept, what failed is said first, three files come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from tokcomp_kernels.ops import IMPLEMENTATIONS, _backends
from tools.gpu_check import __main__ as gpu_check
from tools.gpu_check import graphs, owners, plans, steps, summary
from tools.gpu_check.plans import Plan
from tools.gpu_check.steps import ROOT, Step

FACTS = {
    "gpu": "a GPU",
    "packages": {"torch": "2.11.0", "triton": "3.6.0"},
    "commit": "abc",
    "compute_capability": "",
}


@pytest.mark.parametrize(
    ("code", "limit", "status"),
    [
        ("pass", 60, "passed"),
        ("raise SystemExit(3)", 60, "failed (exit status 3)"),
        ("import time; time.sleep(600)", 1, "stopped after 1 s"),
    ],
)
def test_a_step(tmp_path: Path, code: str, limit: int, status: str):
    step = Step("a step", [sys.executable, "-c", code])
    assert steps.run(step, tmp_path / "log", limit, dict(os.environ)).status == status
    assert step.seconds < 60


def test_an_interrupted_pytest_still_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The limit comes while its second test runs, however long it took to get there."""
    tests, started = tmp_path / "test_slow.py", tmp_path / "started"
    tests.write_text(
        "import pathlib, time\n\ndef test_a():\n    assert 1 == 2, 'one is not two'\n\n"
        f"def test_b():\n    pathlib.Path({str(started)!r}).touch()\n    time.sleep(600)\n"
    )

    class Started(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            while timeout == 10 and self.poll() is None and not started.exists():
                time.sleep(0.05)
            return super().wait(0.1 if timeout == 10 else timeout)

    monkeypatch.setattr(steps.subprocess, "Popen", Started)
    report = tmp_path / "report.xml"
    command = plans.pytest_command(str(tests), f"--junitxml={report}", f"--rootdir={tmp_path}", "-c", os.devnull)
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    # As the check does: where this suite is a shell's background job, its processes would ignore interrupts.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        step = steps.run(Step("tests", command), tmp_path / "log", 10, quick)
    finally:
        signal.signal(signal.SIGINT, previous)
    steps.read_junit(step, report)
    assert step.status == "stopped after 10 s", (tmp_path / "log").read_text()
    assert step.counts["failures"] == 1
    assert "one is not two" in step.failures[0]


def test_what_failed_is_said_first():
    build = Step("build", [], status="passed")
    tests = Step("tests", [], status="failed (exit status 1)", failures=["test_x: wrong"])
    assert summary.summary(FACTS, [build]).startswith("all passed\n")
    text = summary.summary(FACTS, [build, tests])
    assert text.startswith("NOT everything passed: tests failed (exit status 1)\n")
    assert "- test_x: wrong\n" in text


def test_the_most_telling_steps_come_first():
    """Up to the operators of every block all fits into ten minutes, and every benchmark has a step."""
    stages = list(plans.side_by_side(plans.PLANS))
    assert [plan.name for plan in stages[0]] == ["build", *(f"smoke-triton-{part}" for part in range(1, 5))]
    names = [plan.name for stage in stages for plan in stage]
    assert names == [plan.name for plan in plans.PLANS]
    until = next(place for place, stage in enumerate(stages) if stage[0].name == "operators")
    assert sum(max(plan.seconds for plan in stage) for stage in stages[: until + 1]) <= 600
    assert all(gpu_check.LEAST_SECONDS < plan.seconds <= 600 for plan in plans.PLANS)
    files = {argument.partition("::")[0] for plan in plans.PLANS for argument in plan.arguments[:1]}
    assert {file for file in files if file.startswith("benchmarks")} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_*.py")
    }


def test_the_operators_of_every_block_are_found():
    """pytest's -k of the first operators' step; the other step has its complement."""
    first, other = (plan for plan in plans.PLANS if plan.arguments[:1] == ("benchmarks/test_ops.py",))
    assert other.arguments[2] == f"not ({first.arguments[2]})"
    command = plans.pytest_command(*first.arguments, "--collect-only", "--device=cpu")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    found = {line.partition("[")[2].partition("-deit")[0] for line in done.stdout.splitlines() if "::" in line}
    every_block = {"prune_merge_norm", "attention", "add_layer_norm", "linear_gelu"}
    assert found == every_block & IMPLEMENTATIONS.keys()


def test_chosen_steps_keep_their_order():
    assert [plan.name for plan in plans.chosen("tocom, build,search")] == ["build", "search", "tocom"]
    with pytest.raises(ValueError, match=r"--only must name steps out of build, smoke-triton-1, .*, got model, speed"):
        plans.chosen("model,speed,build")


def test_benchmarks_run_on_the_gpu_and_keep_their_records(tmp_path: Path):
    [plan] = plans.chosen("compiled")
    command = plans.command_of(plan, tmp_path, "cuda", ["/clones/ToMe"])
    assert {"--device=cuda", "--compile", "--benchmark-only", "--published-code=/clones/ToMe"} < set(command)
    assert f"--results={tmp_path / 'records'}" in command


def test_backends_and_the_gpu_are_chosen_by_the_environment(tmp_path: Path):
    facts = {**FACTS, "compute_capability": "9.0"}
    by_name = {plan.name: plans.environment_of(plan, facts, "cuda") for plan in plans.PLANS}
    assert by_name["build"]["TORCH_CUDA_ARCH_LIST"] == "9.0" and by_name["build"]["TOKCOMP_BUILD_CUDA"] == "1"
    assert (
        by_name["graphs-cuda"]["TOKCOMP_BACKEND"] == "cuda" and by_name["smoke-triton-2"]["TOKCOMP_BACKEND"] == "triton"
    )
    assert by_name["graphs-dependent"]["TOKCOMP_DEPENDENT_LAUNCH"] == "1"
    assert "TOKCOMP_DEPENDENT_LAUNCH" not in by_name["graphs"].keys() - os.environ.keys()
    [plan] = plans.chosen("memcheck")
    assert plans.command_of(plan, tmp_path, "cuda", [])[:3] == ["compute-sanitizer", "--tool", "memcheck"]


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two steps, the first of which uses the time up. Its records are in the summary and in results.json, its log in
    the archive, and nothing else comes back."""
    missing = {"suite": "models", "model": "deit", "batch": 256, "name": "timm-compiled", "reason": "no compiler"}
    rows = [ROW, {**ROW, "name": "tokcomp-int8", "share_of_ideal": None}]
    record = json.dumps({"rows": rows, "not_measured": [missing]})
    script = f"import pathlib, sys, time; pathlib.Path(sys.argv[1], 'a.json').write_text({record!r}); time.sleep(2)"
    chosen = (Plan("models", 60, module="graphs"), Plan("search", 60), Plan("none", 60, needs="no-such-program"))
    monkeypatch.setattr(plans, "PLANS", chosen)
    monkeypatch.setattr(gpu_check, "machine", lambda: FACTS)
    monkeypatch.setattr(
        gpu_check,
        "command_of",
        lambda plan, work, device, clones: [sys.executable, "-c", script, str(work / "records")],
    )
    assert gpu_check.main(["--out", str(tmp_path), "--minutes", "0.94"]) == 1
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("NOT everything passed: search not begun: no time left\n")
    assert "--only search`" in text
    assert "| none | skipped: no no-such-program here |" in text
    assert "| deit 2.3G | 256 | tokcomp | 1234 | 4.00x | 2.25x | 75% | 97.0% |  |" in text
    assert "| deit 2.3G | 256 | tokcomp-int8 | 1234 | 4.00x | 2.25x |  | 97.0% |  |" in text
    assert "- models, deit, batch 256, timm-compiled: no compiler" in text
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "results.json", "details.tar.gz"}
    with tarfile.open(tmp_path / "details.tar.gz") as tar:
        assert {"logs/models.log", "records/a.json"} < set(tar.getnames())
    results = json.loads((tmp_path / "results.json").read_text())
    assert [step["status"] for step in results["steps"]][:2] == ["passed", summary.NO_TIME]
    assert results["records"][0]["rows"] == rows
    assert "models: passed" in capsys.readouterr().out


def test_a_summary_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    chosen = (Plan("models", 60, module="graphs"), Plan("search", 60, module="graphs"))
    monkeypatch.setattr(plans, "PLANS", chosen)
    monkeypatch.setattr(gpu_check, "machine", lambda: FACTS)
    monkeypatch.setattr(gpu_check, "command_of", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(gpu_check, "summary", lambda *_: 1 / 0)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in (tmp_path / "summary.md").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert [step["status"] for step in results["steps"]] == ["passed", "passed"]


def operator_row(operator: str, backend: str, microseconds: float, block: str = "deit-s-2.3G-197to192to180") -> Any:
    row = {"suite": "operators", "operator": operator, "backend": backend, "block": block, "batch": 1024}
    return {**row, "dtype": "float16", "seconds": [microseconds * 1e-6] * 3}


OPERATOR_ROWS = [
    *(
        operator_row("prune_merge_norm", backend, us)
        for backend, us in (("cuda", 160), ("triton", 200), ("reference", 900))
    ),
    operator_row("prune_merge_norm", "cuda", 50, "deit-s-2.3G-156to143to127"),
    operator_row("prune_merge_norm", "triton", 49, "deit-s-2.3G-156to143to127"),
    *(operator_row("add_layer_norm", backend, us) for backend, us in (("cuda", 169), ("triton", 170))),
    *(operator_row("linear_gelu", backend, us) for backend, us in (("triton", 300), ("reference", 310))),
]


def test_measured_figures_stand_beside_their_predictions():
    data = json.loads(summary.PREDICTIONS.read_text())
    [rate] = [
        row["images_per_second"]
        for row in data["rows"]
        if (row["gpu"], row["title"], row["entry"], row["batch"]) == ("H200", "DeiT-S", "tokcomp-graph", 1024)
    ]
    model = {"model": "deit_small_patch16_224", "batch": 1024, "precision": "float16"}
    graph = {**model, "suite": "graphs", "backend": "auto", "images_per_second": rate / 2}
    lines = list(summary.comparisons("NVIDIA H200, 580.65", [{"rows": [graph, *OPERATOR_ROWS]}]))
    assert lines[0].startswith("graphs: deit_small_patch16_224, batch 1024, tokcomp-graph: measured")
    assert lines[0].endswith(f"predicted {rate:.0f}: 0.50")
    assert any(
        line.startswith("operators: prune_merge_norm, deit-s-2.3G-197to192to180, cuda: measured 160 us")
        for line in lines
    )
    assert not any("156to143" in line for line in lines)
    [attention] = [row for row in data["operators"] if (row["operator"], row["channels"]) == ("attention", 384)]
    rows = [operator_row("attention", backend, 300) for backend in ("cuda", "triton")]
    for line, key in zip(
        summary.comparisons("NVIDIA H200", [{"rows": rows}]), ("predicted_cuda_us", "predicted_us"), strict=True
    ):
        assert f"measured 300 us, predicted {attention[key]:.0f}:" in line
    assert not list(summary.comparisons("another GPU", [{"rows": [graph]}]))


def test_what_switches_gain_is_said_and_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fused embedding is for a GPU where it is faster on average, and slower nowhere by more than the noise."""
    row = {"suite": "graphs", "model": "deit", "kernels": [{"us": 1.0, "launches": 1, "kernel": "k"}]}
    rates = {("auto", 1): 1000.0, ("auto, dependent launch", 1): 1050.0, ("auto", 8): 4000.0}
    rates |= {("auto, fused embedding", 1): 995.0, ("auto, fused embedding", 8): 4100.0}
    rows = [{**row, "backend": name, "batch": n, "images_per_second": rate} for (name, n), rate in rates.items()]
    lines = summary.graph_lines([{"rows": rows}])
    assert "TOKCOMP_DEPENDENT_LAUNCH=1 over 0: deit, batch 1: 1.050x" in lines
    assert "TOKCOMP_FUSED_EMBEDDING=1 over 0: deit, batch 1: 0.995x; deit, batch 8: 1.025x" in lines
    assert summary.switch_lines([{"rows": rows[:1]}]) == [] and owners.embedding_earned([{"rows": rows[:1]}]) == {}
    assert owners.embedding_earned([{"rows": rows}]) == {"embedding": "fused"}
    slower = [{**one, "images_per_second": 970.0} if one["images_per_second"] == 995.0 else one for one in rows]
    assert owners.embedding_earned([{"rows": slower}]) == {"embedding": "apart"}
    assert graphs.backend_name({"TOKCOMP_BACKEND": "auto", "TOKCOMP_FUSED_EMBEDDING": "1"}) == "auto, fused embedding"
    file = tmp_path / "owners.json"
    file.write_text(json.dumps({"NVIDIA H200": {"embedding": "fused"}}))
    monkeypatch.setattr(_backends, "OWNERS", file)
    assert "embedding" in _backends._owned("fused")


def test_a_backend_earns_an_operator_by_being_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the mean over blocks, and by more than the noise; others' entries in the file stay."""
    found = owners.earned([{"rows": OPERATOR_ROWS}])
    assert found == {"add_layer_norm": "triton", "linear_gelu": "triton", "prune_merge_norm": "cuda"}
    file = tmp_path / "owners.json"
    file.write_text(json.dumps({"NVIDIA A100": {"prune_merge_norm": "triton"}, "NVIDIA H200": {"unmerge": "triton"}}))
    monkeypatch.setattr(_backends, "OWNERS", file)
    file.write_text(owners.owners_file("NVIDIA H200", found))
    written = json.loads(file.read_text())
    assert written["NVIDIA H200"] == {**found, "unmerge": "triton"}
    assert _backends._owned("cuda") == frozenset()  # another GPU disagrees
    file.write_text(json.dumps({"NVIDIA H200": written["NVIDIA H200"]}))
    assert _backends._owned("cuda") == {"prune_merge_norm"}
