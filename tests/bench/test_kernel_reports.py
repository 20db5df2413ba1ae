"""The committed reports of the GPU kernels: of these sources, and no kernel unfit (tests/triton has Triton's)."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "benchmarks" / "results" / "kernels"
TOOL = ROOT / "tools" / "kernel_report.py"
AGAIN = "the report is out of date: run python tools/kernel_report.py"


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("kernel_report", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> dict[str, Any]:
    return json.loads((REPORTS / f"{name}.json").read_text())


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
    tool, report = load_tool(), committed(name)
    assert {row["architecture"] for row in report["kernels"]} == {80, 90}
    assert all(0 < row["registers"] <= 255 for row in report["kernels"])
    assert tool.unfit(report) == []


def test_unfit_kernels_are_named() -> None:
    row = {"kernel": "k", "case": "a", "architecture": 80, "dtype": "float16", "spilled": 0, "shared": 163 * 1024}
    wide = {**row, "case": "b", "shared": 163 * 1024 + 1}
    wide_spill = {**row, "case": "d", "dtype": "float32"}
    failure = {"operator": "op", "case": "e", "architecture": 90, "error": "RuntimeError: PassManager::run failed"}
    kernels = [
        row,
        wide,
        {**wide, "architecture": 90},
        {**row, "case": "c", "spilled": 8},
        {**wide_spill, "spilled": 64},
        {**wide_spill, "spilled": 72},
    ]
    assert load_tool().unfit({"failures": [failure], "kernels": kernels}) == [
        "op e sm_90: RuntimeError: PassManager::run failed",
        "k b sm_80: takes 166913 bytes of shared memory of 166912",
        "k c sm_80: spills 8 bytes",
        "k d sm_80: spills 72 bytes",
    ]


def test_reading_ptxas() -> None:
    log = """
ptxas info    : Compiling entry function '_ZN7tokcomp4cudaL19partial_sums_kernelENS0_17PartialSumsParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN7tokcomp4cudaL19partial_sums_kernelENS0_17PartialSumsParamsE
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
        ("partial_sums_kernel", "", 90, 40, 28, 1024),
    ]
