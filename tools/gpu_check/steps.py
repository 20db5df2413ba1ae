"""A step of the GPU check: a command under a time limit, and what its pytest run says of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 15
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
        """Or not to be run here at all."""
        return self.status == "passed" or self.status.startswith("skipped")


def run(step: Step, log: Path, limit: float, environment: dict[str, str]) -> Step:
    """Run to the end or to the limit; pytest, interrupted, still reports what it has. Nothing it started is left."""
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


def read_failures(step: Step, log: Path) -> None:
    """The lines of another command's log that say what failed; of one that says nothing, its last."""
    lines = log.read_text(errors="replace").splitlines()
    step.failures += [line for line in lines if line.startswith("FAILED ")]
    if not step.passed and not step.failures:
        step.failures += lines[-3:]


def query(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
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
