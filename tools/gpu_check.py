"""Build, test and benchmark on the GPU of this machine, as it stands: no virtual environment, no network.

``python tools/gpu_check.py --out DIR`` writes DIR/summary.md, DIR/results.json and each step's log. Each step has a
time limit; one that reaches it is interrupted and what it had is kept. Benchmarks run even where tests failed; the
summary then says so first. Exit status 0 only where everything passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD_SECONDS = 240
BENCH_SECONDS = 220
SEARCH_SECONDS = 90
GRACE_SECONDS = 15
MAX_LISTED = 50
PACKAGES = ("torch", "triton", "timm", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "safetensors")


@dataclass
class Step:
    name: str
    command: list[str]
    status: str = ""
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(step: Step, log: Path, limit: float, environment: dict[str, str]) -> Step:
    """Run to the end or to the limit; pytest, interrupted, still reports what it has."""
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(max(limit, 1))
            step.status = "passed" if code == 0 else f"failed (exit status {code})"
        except subprocess.TimeoutExpired:
            step.status = f"stopped after {limit:.0f} s"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    step.seconds = round(time.monotonic() - start, 1)
    return step


def read_junit(step: Step, path: Path) -> None:
    """Counts and failures of a pytest run; an interrupted one may have left none."""
    if not path.exists():
        step.failures.append("no report was written; see the log")
        return
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    for key in ("tests", "failures", "errors", "skipped"):
        step.counts[key] = sum(int(suite.get(key, 0)) for suite in suites)
    for case in (case for suite in suites for case in suite.iter("testcase")):
        for problem in (*case.findall("failure"), *case.findall("error")):
            message = (problem.get("message") or "").strip().splitlines()
            step.failures.append(f"{case.get('classname')}::{case.get('name')}: {message[0][:200] if message else ''}")


def query(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    gpu = query("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    look = "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')"
    return {
        "gpu": gpu.splitlines()[0] if gpu else "",
        "compute_capability": query(sys.executable, "-c", look),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "nvcc": (query("nvcc", "--version").splitlines() or [""])[-1],
        "commit": query("git", "-c", f"safe.directory={ROOT}", "describe", "--always", "--dirty"),
        "packages": {name: version(name) for name in PACKAGES},
    }


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q", *arguments]


def test_command(report: Path) -> list[str]:
    """The whole suite, operators first, so that a run that is cut short has seen what matters most."""
    first = [f"tests/{name}" for name in ("ops", "cuda", "triton")]
    folders = sorted({str(path.parent.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")})
    folders.sort(key=lambda name: first.index(name) if name in first else len(first))
    workers = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadgroup"]
    workers = workers if importlib.util.find_spec("xdist") else []
    return pytest_command(*folders, *workers, "--tb=short", f"--junitxml={report}")


def benchmarks() -> list[tuple[str, list[str], float]]:
    """Step, files, seconds to leave for what follows: the search's steps are long and would be cut off at the end."""
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/test_*.py"))
    search = [name for name in files if name.endswith("test_search.py")]
    others = [name for name in files if name not in search]
    steps = [("benchmarks", others, SEARCH_SECONDS if search else 0.0), ("search-benchmarks", search, 0.0)]
    return [step for step in steps if step[1]]


def summary(facts: dict[str, Any], steps: list[Step]) -> str:
    wrong = "; ".join(f"{step.name} {step.status}" for step in steps if not step.passed)
    lines = [
        f"NOT everything passed: {wrong}" if wrong else "all passed",
        "",
        f"{facts['gpu']}; torch {facts['packages']['torch']}, triton {facts['packages']['triton']}; "
        f"commit {facts['commit']}",
        "",
        "| step | status | seconds | tests |",
        "| --- | --- | --- | --- |",
    ]
    for step in steps:
        counts = ", ".join(f"{count} {name}" for name, count in step.counts.items())
        lines.append(f"| {step.name} | {step.status} | {step.seconds} | {counts} |")
    for step in steps:
        if step.failures:
            lines += [
                "",
                f"## Failures of {step.name}",
                "",
                *(f"- {failure}" for failure in step.failures[:MAX_LISTED]),
            ]
            if len(step.failures) > MAX_LISTED:
                lines.append(f"- and {len(step.failures) - MAX_LISTED} more, in results.json")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes - 2 * GRACE_SECONDS
    facts = machine()
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # A build that quietly leaves the CUDA kernels out would make this check pass for nothing.
    cuda = {"TOKCOMP_BUILD_CUDA": "1"} if facts["compute_capability"] else {}

    steps: list[Step] = []

    def left() -> float:
        return deadline - time.monotonic()

    def finish(step: Step, report: Path | None = None) -> None:
        if report is not None:
            read_junit(step, report)
        steps.append(step)
        results = {"machine": facts, "steps": [asdict(step) for step in steps]}
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "summary.md").write_text(summary(facts, steps))
        print(f"{step.name}: {step.status}, {step.seconds} s", flush=True)

    build = Step("build", [sys.executable, "build_backend/native.py"])
    finish(run(build, out / "build.log", min(BUILD_SECONDS, left()), {**environment, **cuda}))

    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    finish(run(Step("tests", test_command(report)), out / "tests.log", left() - BENCH_SECONDS, environment), report)

    for name, files, reserve in benchmarks():
        saved = f"--benchmark-json={out / name}.json"
        records = f"--results={out / 'benchmarks'}"
        bench = Step(name, pytest_command(*files, "--benchmark-only", "-s", saved, records))
        finish(run(bench, out / f"{name}.log", left() - reserve, environment))

    print((out / "summary.md").read_text())
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
