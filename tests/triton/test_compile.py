"""Every Triton kernel compiles for sm_80 and sm_90, without a GPU, and neither spills nor asks for too much memory."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PACKAGE = Path(importlib.util.find_spec("tokcomp_kernels").origin).parent / "triton"
OPERATORS = sorted(module.name for module in pkgutil.iter_modules([str(PACKAGE)]) if not module.name.startswith("_"))


@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_for_both_architectures(op, tmp_path):
    report = tmp_path / "report.json"
    # A process of its own: under the interpreter, which the other tests ask for, there is nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tokcomp_kernels.triton._compile", op, "--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {row["capability"] for row in rows} == {80, 90}
    assert all(0 < row["registers"] <= 255 for row in rows)
    unfit = [f"{row['case']} sm_{row['capability']}: {row['problem']}" for row in rows if row["problem"]]
    assert not unfit, "\n".join(unfit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_operator_has_a_triton_module():
    from tokcomp_kernels._schema import OPERATORS as table

    missing = {operator.name for operator in table if operator.public} - set(OPERATORS)
    assert not missing
