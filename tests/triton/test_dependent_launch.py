"""Programmatic dependent launch: each kernel of a block waits for the grid before it where it is asked for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
#: What a compressing block launches, and one that drops nothing; options as on a GPU that has dependent launch.
LAUNCHES = """
import json, tempfile
import torch
from tokcomp_kernels.triton import _common, _compile
from tokcomp_kernels.triton.add_layer_norm import add_layer_norm_triton
from tokcomp_kernels.triton.attention import attention_triton
from tokcomp_kernels.triton.linear_gelu import linear_gelu_triton
from tokcomp_kernels.triton.prune_merge_norm import prune_merge_norm_triton
from tools import sass

_common._dependent_launch = lambda device: {"DEPENDENT": True, "launch_pdl": True}
x, q = torch.zeros(1, 40, 64, dtype=torch.float16), torch.zeros(1, 2, 40, 32, dtype=torch.float16)
with _compile.compiling(90) as kernels:
    attention_triton(q, q, q)
    prune_merge_norm_triton(x, x, torch.zeros(1, 40), 30, 20)
    add_layer_norm_triton(x, x)
    linear_gelu_triton(x, torch.zeros(64, 64, dtype=torch.float16))
found = {}
for kernel in kernels:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        [counts] = sass.count(sass.disassemble(file.name)).values()
    found[kernel.name] = counts["grid_waits"]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_every_kernel_of_a_block_waits_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python"), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", LAUNCHES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = ("attention_fwd", "reduce", "prune_merge_select", "merge_kept", "merge_join", "add_layer_norm")
    assert {name.strip("_") for name in found} == {f"{name}_kernel" for name in (*names, "linear_gelu")}
    assert set(found.values()) == {1}


def test_every_compiled_kernel_begins_by_waiting() -> None:
    """Whatever it does before would read, or overwrite, what the grid before it still works on."""
    source = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")))
    begins = re.findall(r"__global__ void __launch_bounds__\([^)]*\)\s+(\w+)\([^)]*\) \{\s+(\S+)", source)
    assert len(begins) >= 12 and {first for _, first in begins} == {"begin_grid();"}, begins


def test_a_value_that_is_no_flag_is_refused() -> None:
    environment = {**os.environ, "TOKCOMP_DEPENDENT_LAUNCH": "yes"}
    done = subprocess.run(
        [sys.executable, "-c", "import tokcomp_kernels"], env=environment, capture_output=True, text=True
    )
    assert "TOKCOMP_DEPENDENT_LAUNCH must be 0 or 1, got 'yes'" in done.stderr
