"""Build, test and benchmark on the GPU of this machine, as it stands: no virtual environment, no network.

``python tools/gpu_check.py --out DIR`` writes DIR/summary.md, DIR/results.json with every figure, and each step's log
and records. The most telling steps come first: whole models against the published pipeline and compiled timm, then the
operators, then the tests and the rest. Each step has a time limit; one that reaches it is interrupted and what it had
is kept, and what there is no time for is named, to be run by another call with --only. A benchmark checks what it
times, so it runs even where tests failed; the summary then says so first. Exit status 0 only where everything asked for
passed.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 15
#: A step is not begun with less time than this.
LEAST_SECONDS = 25
MAX_LISTED = 50
NO_TIME = "not begun: no time left"
#: Operators that every block runs, by pytest's -k.
IN_EVERY_BLOCK = (
    "(prune_merge_norm or add_layer_norm or linear_gelu or attention) and not (backward or masked or class_attention)"
)
PACKAGES = ("torch", "triton", "timm", "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "safetensors")


@dataclass(frozen=True)
class Plan:
    """A step to come: its name, the seconds it may take, pytest's arguments if it is a benchmark."""

    name: str
    seconds: float
    arguments: tuple[str, ...] = ()


PLANS = (
    Plan("build", 240),
    Plan("models", 240, ("benchmarks/test_models.py::test_model",)),
    Plan("operators", 90, ("benchmarks/test_ops.py", "-k", IN_EVERY_BLOCK)),
    Plan("tests", 600),
    Plan("search", 120, ("benchmarks/test_search.py",)),
    Plan("batch-sweep", 240, ("benchmarks/test_batch_sweep.py",)),
    Plan("training", 120, ("benchmarks/test_training.py",)),
    Plan("tocom", 120, ("benchmarks/test_tocom.py",)),
    Plan("compiled", 420, ("benchmarks/test_models.py::test_model", "--compile", "-k", "deit-s-1024 or deit-b-512")),
    Plan("table-1", 420, ("benchmarks/test_models.py::test_table_1",)),
    Plan("other-operators", 240, ("benchmarks/test_ops.py", "-k", f"not ({IN_EVERY_BLOCK})")),
)


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


def chosen(only: str | None) -> list[Plan]:
    """The plans named, in their own order; all without names.

    Raises:
        ValueError: a name is no step's.
    """
    names = [plan.name for plan in PLANS] if only is None else [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in {plan.name for plan in PLANS}]
    if unknown:
        known = ", ".join(plan.name for plan in PLANS)
        raise ValueError(f"--only must name steps out of {known}, got {', '.join(unknown)}")
    return [plan for plan in PLANS if plan.name in names]


def command_of(plan: Plan, report: Path, records: Path, clones: list[str]) -> list[str]:
    if plan.name == "build":
        return [sys.executable, "build_backend/native.py"]
    if plan.name == "tests":
        return test_command(report)
    options = ["--benchmark-only", "-s", f"--results={records}", f"--junitxml={report}", "--device=cuda"]
    return pytest_command(*plan.arguments, *options, *(f"--published-code={folder}" for folder in clones))


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The benchmarks' records, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def figures(records: Sequence[dict[str, Any]]) -> list[str]:
    """The whole models' rows as a table, and what was not measured."""
    rows = [row for record in records for row in record["rows"] if row.get("suite") == "models"]
    missing = [row for record in records for row in record.get("not_measured", [])]
    lines: list[str] = []
    if rows:
        lines += ["", "## Whole models", ""]
        lines += [
            "| model | batch | entry | img/s | over published | over compiled timm | of ideal | efficiency | tax |"
        ]
        lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = [f"{row['model']} {row['budget']}G", str(row["batch"]), row["name"], f"{row['images_per_second']:.0f}"]
        ratios = [f"{row[key][0]:.2f}x" if row[key] else "" for key in ("speedup", "over_timm_compiled")]
        shares = [f"{row[key][0]:.1%}" if row[key] else "" for key in ("efficiency", "tax")]
        lines.append(f"| {' | '.join([*cells, *ratios, format(row['share_of_ideal'], '.0%'), *shares])} |")
    if missing:
        lines += ["", "## Not measured", ""]
        lines += [
            f"- {row['suite']}, {row['model']}, batch {row['batch']}, {row['name']}: {row['reason']}" for row in missing
        ]
    return lines


def summary(facts: dict[str, Any], steps: list[Step], records: Sequence[dict[str, Any]] = ()) -> str:
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
    rest = [step.name for step in steps if step.status == NO_TIME]
    for step in steps:
        counts = ", ".join(f"{count} {name}" for name, count in step.counts.items())
        lines.append(f"| {step.name} | {step.status} | {step.seconds} | {counts} |")
    if rest:
        lines += ["", f"To run the rest: `python tools/gpu_check.py --out DIR --only {','.join(rest)}`"]
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
    return "\n".join([*lines, *figures(records)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--only", metavar="STEP,STEP", help=f"steps to run: {', '.join(plan.name for plan in PLANS)}")
    parser.add_argument(
        "--published-code",
        action="append",
        default=[],
        metavar="DIR",
        help="for the benchmarks: your clones; repeatable",
    )
    arguments = parser.parse_args()
    # Started in the background, a process ignores interrupts, and so would the steps that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        plans = chosen(arguments.only)
    except ValueError as error:
        parser.error(str(error))
    out = arguments.out.resolve()
    logs, records = out / "logs", out / "records"
    for folder in (logs, records):
        folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes - 2 * GRACE_SECONDS
    facts = machine()
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A build that quietly leaves the CUDA kernels out would make this check pass for nothing.
    cuda = {"TOKCOMP_BUILD_CUDA": "1"} if facts["compute_capability"] else {}
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    clones = [str(Path(folder).resolve()) for folder in arguments.published_code]
    steps: list[Step] = []
    for plan in plans:
        report = logs / f"{plan.name}.xml"
        report.unlink(missing_ok=True)
        step = Step(plan.name, command_of(plan, report, records, clones))
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            step.status = NO_TIME
        else:
            own = {**environment, **cuda} if plan.name == "build" else environment
            run(step, logs / f"{plan.name}.log", min(plan.seconds, left), own)
            if plan.name != "build":
                read_junit(step, report)
        steps.append(step)
        found = read_records(records)
        results = {"machine": facts, "steps": [asdict(step) for step in steps], "records": found}
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (out / "summary.md").write_text(summary(facts, steps, found))
        print(f"{step.name}: {step.status}, {step.seconds} s", flush=True)

    print((out / "summary.md").read_text())
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
