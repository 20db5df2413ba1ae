"""What nvcc made of the CUDA kernels: complete, nothing spilled, no shared memory of their own. Needs no GPU.

Read from the committed report, which is of these very sources (tests/bench/test_kernel_reports.py), and compared with
what ptxas said of the installed module where that is of them too.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import tokcomp_kernels
from tokcomp_kernels import native_kernels
from tools import kernel_report

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
REPORT = json.loads((ROOT / "benchmarks/results/kernels/cuda.json").read_text())
KERNELS: list[dict[str, Any]] = REPORT["kernels"]
#: Kernels with more than one variant for each type: rows of up to two pieces a lane, and
#: longer ones; widths of a head; one for each of two operators.
VARIANTS = {
    **{"add_layer_norm_kernel": 2, "inverse_norm_kernel": 2},
    **{"attention_resident_kernel": 4, "attention_streaming_kernel": 4},
}
#: Kernels for half precision alone.
HALF = ("attention_resident_kernel", "attention_streaming_kernel")
#: Kernels that see scores, sums or cosines alone, whatever the type of the rows.
TYPELESS = (
    *("rank_kernel", "partial_sums_kernel", "select_diverse_kernel"),
    *("partition_kernel", "join_kernel", "slot_kernel"),
)
OPERATORS = sorted(
    re.findall(
        r"^TOKCOMP_(?:REGISTER|OFFER)_CUDA\((\w+),", "\n".join(p.read_text() for p in CUDA.glob("*.cu")), re.MULTILINE
    )
)


@pytest.mark.parametrize("architecture", kernel_report.ARCHITECTURES)
def test_every_kernel_is_compiled(architecture: int) -> None:
    defined = re.findall(
        r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(", "".join(p.read_text() for p in CUDA.glob("*.cuh"))
    )
    assert len(defined) >= len(OPERATORS)
    for kernel in defined:
        found = [row["dtype"] for row in KERNELS if (row["kernel"], row["architecture"]) == (kernel, architecture)]
        assert found, f"{kernel} is not built for sm_{architecture}"
        if kernel not in TYPELESS:
            types = ["float16", "bfloat16", *(() if kernel in HALF else ("float32",))]
            want = sorted(types * VARIANTS.get(kernel, 1))
            assert sorted(found) == want, f"{kernel} is built for {found}, not for {want}"


def test_no_kernel_spills() -> None:
    assert not [row for row in KERNELS if row["spilled"]]


def test_shared_memory_is_within_the_limits() -> None:
    """All of a kernel's shared memory is its launch's, which asks for no more than the device has: the host shim
    refuses more, and tests what prune_merge asks for over all shapes. A kernel declares none beside it."""
    assert not [row for row in KERNELS if row["shared"]]


def test_the_installed_module_is_as_reported() -> None:
    """Register by register, where the installed module was built later than the sources, by the same compiler."""
    nvcc = kernel_report.find_nvcc()
    logs = list(Path(tokcomp_kernels.__file__).parent.glob("_C.*.ptxas.txt"))
    newest = max(path.stat().st_mtime for path in CUDA.iterdir())
    if nvcc is None or not logs or logs[0].stat().st_mtime < newest:
        pytest.skip("no nvcc here, or the installed module is not of these sources")
    fields = ("symbol", "architecture", "registers", "spilled", "shared")
    found = {
        tuple(row[key] for key in fields) for row in kernel_report.cuda_rows(logs[0].read_text(), defaultdict(dict))
    }
    if kernel_report.cuda_versions() != REPORT["versions"]:
        pytest.skip(f"the report is by nvcc {REPORT['versions']['nvcc']}")
    assert found <= {tuple(row[key] for key in fields) for row in KERNELS}


@pytest.mark.parametrize("op", OPERATORS)
def test_kernels_are_linked_and_loaded(op: str) -> None:
    built = native_kernels()["cuda"]
    if not built:
        pytest.skip("the installed module has no CUDA kernels")
    assert op in built
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokcomp_cuda::{op}", "CUDA")
