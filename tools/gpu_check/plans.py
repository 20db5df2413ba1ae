"""The steps of the GPU check, the most telling first, and the command of each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tools.gpu_check.steps import ROOT

#: Operators that every block runs, by pytest's -k.
IN_EVERY_BLOCK = (
    "(prune_merge_norm or add_layer_norm or linear_gelu or attention) "
    "and not (backward or masked or class_attention or received)"
)
#: Processes that compile Triton's kernels while nvcc compiles the others.
SMOKE_PARTS = 4


@dataclass(frozen=True)
class Plan:
    """A step to come.

    ``arguments``: a benchmark's for pytest, or a module's of this package, which ``module`` names. ``backend``: for
    TOKCOMP_BACKEND. ``stage``: neighbours of the same stage run side by side; their work is the CPU's. ``needs``: a
    program without which there is nothing to run. ``rehearsal``: a benchmark's arguments on a CPU, where the step is
    only to run. ``switch``: a variable of the environment that is to be 1.
    """

    name: str
    seconds: float
    arguments: tuple[str, ...] = ()
    module: str = ""
    backend: str = ""
    stage: str = ""
    needs: str = ""
    rehearsal: tuple[str, ...] = ()
    switch: str = ""

    @property
    def is_pytest(self) -> bool:
        return self.name != "build" and not self.module


_MODELS = "benchmarks/test_models.py::test_model"
_SEARCH = "benchmarks/test_search.py"
_ON_CPU = (_MODELS, "-k", "deit-s-1-float32")
PLANS = (
    Plan("build", 180, stage="compile"),
    *(
        Plan(f"smoke-triton-{part}", 180, ("--part", f"{part}/{SMOKE_PARTS}"), "smoke", "triton", "compile")
        for part in range(1, SMOKE_PARTS + 1)
    ),
    Plan("smoke-cuda", 45, (), "smoke", "cuda"),
    Plan("memcheck", 45, (), "cluster", "cuda", needs="compute-sanitizer"),
    Plan("synccheck", 45, (), "cluster", "cuda", needs="compute-sanitizer"),
    Plan("models", 120, (_MODELS, "-k", "deit-s-1024 or deit-b-512"), rehearsal=_ON_CPU),
    Plan("graphs", 35, (), "graphs", "auto"),
    Plan("graphs-cuda", 35, (), "graphs", "cuda"),
    Plan("graphs-linear-gelu", 35, (), "graphs", "triton"),
    Plan("operators", 60, ("benchmarks/test_ops.py", "-k", IN_EVERY_BLOCK)),
    Plan("graphs-dependent", 35, (), "graphs", "auto", switch="TOKCOMP_DEPENDENT_LAUNCH"),
    Plan("graphs-embedding", 35, (), "graphs", "auto", switch="TOKCOMP_FUSED_EMBEDDING"),
    Plan("operator-tests", 120, ("tests/ops",)),
    Plan("search", 60, (_SEARCH,), rehearsal=(_SEARCH, "-k", "4-float32")),
    Plan("vit-l", 90, (_MODELS, "-k", "vit-l-256"), rehearsal=_ON_CPU),
    Plan("other-operators", 240, ("benchmarks/test_ops.py", "-k", f"not ({IN_EVERY_BLOCK})")),
    Plan("tests", 600, ("tests",)),
    Plan("batch-sweep", 240, ("benchmarks/test_batch_sweep.py",)),
    Plan("training", 120, ("benchmarks/test_training.py",)),
    Plan("tocom", 120, ("benchmarks/test_tocom.py",)),
    Plan(
        "stock-attention",
        240,
        ("benchmarks/test_runtimes.py::test_attention",),
        rehearsal=("benchmarks/test_runtimes.py::test_attention", "--batches=1"),
    ),
    Plan("compiled", 420, (_MODELS, "--compile", "-k", "deit-s-1024 or deit-b-512"), rehearsal=_ON_CPU),
    Plan("table-1", 420, ("benchmarks/test_models.py::test_table_1",)),
)


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


def side_by_side(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """The plans one after another, those of a stage together."""
    for _, group in groupby(enumerate(plans), key=lambda item: item[1].stage or item[0]):
        yield [plan for _, plan in group]


def missing_program(plan: Plan) -> str | None:
    """Why a plan has nothing to run here, or None."""
    return f"skipped: no {plan.needs} here" if plan.needs and shutil.which(plan.needs) is None else None


def environment_of(plan: Plan, facts: dict[str, Any], device: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if plan.name == "build" and device == "cuda":
        # For this GPU alone. A build that quietly leaves the CUDA kernels out would make this check pass for nothing.
        environment |= {"TOKCOMP_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": facts["compute_capability"]}
    if plan.backend and device == "cuda":
        environment["TOKCOMP_BACKEND"] = plan.backend
    if plan.switch:
        environment[plan.switch] = "1"
    if plan.needs:  # the sanitizer sees the ends of tensors only where each is an allocation of its own
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def command_of(plan: Plan, work: Path, device: str, clones: Sequence[str]) -> list[str]:
    """``work``: the folder of this run, with ``logs`` and ``records``."""
    records, report = work / "records", work / "logs" / f"{plan.name}.xml"
    if plan.name == "build":
        return [sys.executable, "build_backend/native.py"]
    if plan.module:
        command = [sys.executable, "-m", f"tools.gpu_check.{plan.module}", f"--device={device}", *plan.arguments]
        if plan.module == "graphs":
            command.append(f"--out={records / plan.name}.json")
        if plan.needs:
            command = [plan.needs, "--tool", plan.name, "--error-exitcode", "9", *command]
        return command
    if plan.arguments[0].startswith("tests"):
        return test_command(plan.arguments[0], report)
    options = ["--benchmark-only", "-s", f"--results={records}", f"--junitxml={report}", f"--device={device}"]
    arguments = plan.arguments
    if device == "cpu":
        arguments = (*(plan.rehearsal or arguments), "--rounds=1", "--no-compile", "--no-rivals")
    return pytest_command(*arguments, *options, *(f"--published-code={folder}" for folder in clones))


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-q", *arguments]


def test_command(under: str, report: Path) -> list[str]:
    """The tests in a folder, operators first, so that a run that is cut short has seen what matters most."""
    first = [f"tests/{name}" for name in ("ops", "cuda", "triton")]
    folders = sorted({str(path.parent.relative_to(ROOT)) for path in (ROOT / under).rglob("test_*.py")})
    folders.sort(key=lambda name: first.index(name) if name in first else len(first))
    workers = ["-n", str(min(8, os.cpu_count() or 1))]
    workers = workers if importlib.util.find_spec("xdist") else []
    return pytest_command(*folders, *workers, "--tb=short", f"--junitxml={report}")
