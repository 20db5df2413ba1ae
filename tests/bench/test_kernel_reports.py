"""The committed reports of the GPU kernels: of every kernel there is, none unfit, and as fresh compilations say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "benchmarks" / "results" / "kernels"
TOOL = ROOT / "tools" / "kernel_report.py"
AGAIN = "the report is out of date: run python tools/kernel_report.py"
#: Compiled afresh: kernels that take about a second each.
SAMPLE = 4
#: Lists the cases, and compiles some of them, where kernels are not interpreted.
FRESH = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("kernel_report", sys.argv[1])
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
cases = report.triton_cases()
wanted = json.loads(sys.argv[2])
rows = [
    report.triton_row(op, case, capability)
    for op, case in cases for capability in report.ARCHITECTURES if [op, case.name, capability] in wanted
]
names = [[op, case.name] for op, case in cases]
print(json.dumps({"cases": names, "versions": report.triton_versions(), "rows": rows}))
"""


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("kernel_report", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> dict[str, Any]:
    return json.loads((REPORTS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """Every case there is now, and those of a sample compiled."""
    pytest.importorskip("triton")
    rows = sorted(committed("triton")["kernels"], key=lambda row: (row["registers"], row["operator"], row["case"]))
    sample = rows[:: len(rows) // SAMPLE][:SAMPLE]
    wanted = [[row["operator"], row["case"], row["architecture"]] for row in sample]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", FRESH, str(TOOL), json.dumps(wanted)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_triton_kernel_is_reported(fresh: dict[str, Any]) -> None:
    reported = {(row["operator"], row["case"], row["architecture"]) for row in committed("triton")["kernels"]}
    assert reported == {(op, case, architecture) for op, case in fresh["cases"] for architecture in (80, 90)}, AGAIN


def test_a_sample_of_fresh_compilations_agrees(fresh: dict[str, Any]) -> None:
    report = committed("triton")
    if fresh["versions"] != report["versions"]:
        pytest.skip(f"the report is by {report['versions']}, here are {fresh['versions']}")
    assert len(fresh["rows"]) == SAMPLE
    for row in fresh["rows"]:
        assert row in report["kernels"], AGAIN


def test_the_cuda_report_is_of_these_sources() -> None:
    tool, report = load_tool(), committed("cuda")
    assert report["sources"] == tool.source_digests(), AGAIN
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")))
    defined = set(re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", sources))
    assert len(defined) >= 5
    for architecture in (80, 90):
        kernels = {row["kernel"] for row in report["kernels"] if row["architecture"] == architecture}
        assert kernels == defined, f"{AGAIN}; sm_{architecture} differs by {kernels ^ defined}"


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_every_kernel_is_fit_to_ship(name: str) -> None:
    tool, rows = load_tool(), committed(name)["kernels"]
    assert {row["architecture"] for row in rows} == {80, 90}
    assert all(0 < row["registers"] <= 255 and row["dtype"] in {*tool.DTYPES.values(), ""} for row in rows)
    assert tool.unfit(rows) == []


def test_unfit_kernels_are_named() -> None:
    row = {"case": "a", "architecture": 80, "spilled": 0, "shared": 163 * 1024}
    wide = {**row, "case": "b", "shared": 163 * 1024 + 1}
    assert load_tool().unfit([row, wide, {**wide, "architecture": 90}, {**row, "case": "c", "spilled": 8}]) == [
        "b sm_80: takes 166913 bytes of shared memory of 166912",
        "c sm_80: spills 8 bytes",
    ]


def test_reading_ptxas() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN7tokcomp4cudaL15mask_sum_kernelENS0_13MaskSumParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7tokcomp4cudaL15mask_sum_kernelENS0_13MaskSumParamsE
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN7tokcomp4cuda21merge_backward_kernelI6__halfEEvNS0_4TIT_EE' for 'sm_80'
ptxas info    : Function properties for _ZN7tokcomp4cuda21merge_backward_kernelI6__halfEEvNS0_4TIT_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers, 432 bytes cmem[0]
"""
    half, plain = load_tool().cuda_rows(log, defaultdict(dict))
    found = [
        (row["kernel"], row["dtype"], row["architecture"], row["registers"], row["spilled"], row["shared"])
        for row in (half, plain)
    ]
    assert found == [
        ("merge_backward_kernel", "float16", 80, 28, 0, 0),
        ("mask_sum_kernel", "", 90, 40, 28, 1024),
    ]
