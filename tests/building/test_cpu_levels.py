"""One library for every x86-64: its levels agree with the reference and with each other, and each stays within its own
instructions."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.building.builds import ROOT, Dispatched, run

LEVELS = ["default", "avx2", "avx512", "avx512_bf16"]
VARIABLE = "TOKCOMP_CPU_CAPABILITY"
#: Outputs with the same bits at every level, and at every one above the default: no sum in them runs over a vector's
#: lanes. docs/operators.md says so.
EVERYWHERE = {
    ("unmerge", 0),
    ("_unmerge_backward", 0),
    ("_merge_backward", 0),
    ("prune_merge", 0),
    ("prune_merge_norm", 0),
    ("masked_merge", 0),
    ("add_layer_norm", 0),
    ("tome_merge", 1),
    ("bipartite_merge", 1),
}
ABOVE_DEFAULT = EVERYWHERE | {("tome_merge", 0), ("_masked_merge_backward", 0)}

CHOOSE = """
#include "cpu_level.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

bool fake_supports(const char* feature) { return std::strstr(std::getenv("FEATURES"), feature); }

int main() {
  try {
    std::puts(tokcomp::load_cpu_kernels().c_str());
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""
AVX2 = " avx2 fma "
AVX512 = AVX2 + "avx512f avx512bw avx512vl avx512dq "

on_x86_64 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="x86-64 Linux has more than one level"
)


@pytest.fixture
def choose(tmp_path: Path) -> Callable[..., Callable[..., str]]:
    """Compiles the choice, for dispatch or for one level, into a program that asks a CPU made up for it."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")

    def compile(definition: str) -> Callable[..., str]:
        (tmp_path / "choose.cpp").write_text(CHOOSE)
        (tmp_path / "declared.h").write_text("bool fake_supports(const char*);\n")
        command = [compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", f"-D{definition}"]
        command += ["-D__builtin_cpu_supports(f)=fake_supports(f)", "-include", str(tmp_path / "declared.h")]
        run(*command, tmp_path / "choose.cpp", ROOT / "csrc/cpu_level.cpp", "-ldl", "-o", tmp_path / "choose")
        return lambda wanted, features="": run(
            tmp_path / "choose", env={VARIABLE: wanted or "", "FEATURES": features}
        ).strip()

    return compile


@on_x86_64
def test_the_best_level_that_the_cpu_has(choose: Callable[..., Callable[..., str]], tmp_path: Path):
    choice = choose('TOKCOMP_CPU_MODULES="kernels."')
    missing = choice(None, AVX2)
    assert missing.startswith("tokcomp: ") and "kernels.avx2.so: cannot open shared object file" in missing
    run("c++", "-shared", "-x", "c++", os.devnull, "-o", tmp_path / "empty.so")
    for name in LEVELS:
        shutil.copy(tmp_path / "empty.so", tmp_path / f"kernels.{name}.so")
    assert choice(None, "") == "default"
    assert choice(None, " avx2 ") == "default", "fused multiply-add belongs to the level"
    assert choice(None, AVX2) == "avx2"
    assert choice(None, AVX512 + "avx512bf16 avx512vnni") == "avx512_bf16"
    assert choice(None, AVX512 + "avx512bf16") == "avx512", "products of bytes belong to the level"
    assert choice("avx2", AVX512) == "avx2"
    assert choice("avx512_bf16", AVX512) == (
        "TOKCOMP_CPU_CAPABILITY=avx512_bf16 needs instructions that this CPU lacks: unset it, or choose of "
        "default, avx2, avx512"
    )
    assert choice("sse9", AVX2) == "TOKCOMP_CPU_CAPABILITY must be one of default, avx2 on this CPU, got 'sse9'"


def test_a_library_of_one_level(choose: Callable[..., Callable[..., str]]):
    choice = choose('TOKCOMP_CPU_LEVEL="avx512"')
    assert choice(None) == choice("avx512") == "avx512"
    assert choice("avx2") == (
        "TOKCOMP_CPU_CAPABILITY=avx2, but the kernels were built for avx512 alone: unset it, or build with "
        "TOKCOMP_CPU_ARCH=dispatch"
    )


@pytest.fixture(scope="module")
def by_level(dispatched: Dispatched, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What every operator says at each level that this CPU has, once it was found right against the reference."""
    folder, found = tmp_path_factory.mktemp("levels"), {}
    for level in LEVELS:
        env = {"PYTHONPATH": str(dispatched.package.parent), VARIABLE: level, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("run_level.py")), str(folder / level)]
        done = subprocess.run(command, env=os.environ | env, cwd=folder, capture_output=True, text=True)
        if "needs instructions that this CPU lacks" in done.stderr:
            continue
        assert done.returncode == 0, f"{level}: {done.stderr[-4000:]}"
        found[level] = torch.load(folder / level, weights_only=False)
    return found


@on_x86_64
@pytest.mark.slow
def test_every_level_runs_and_agrees(by_level: dict[str, dict[str, Any]]):
    """With the reference, in run_level.py."""
    assert "default" in by_level
    for level, found in by_level.items():
        assert (found["level"], found["built"]) == (level, LEVELS)
        assert len({op for op, _, _ in found["outputs"]}) >= 16


@on_x86_64
@pytest.mark.slow
def test_choices_and_promised_bits_are_the_same(by_level: dict[str, dict[str, Any]]):
    for level, other in itertools.combinations(by_level, 2):
        promised = EVERYWHERE if level == "default" else ABOVE_DEFAULT
        seen = set()
        for (op, dtype, sample), outputs in by_level[level]["outputs"].items():
            for i, (have, want) in enumerate(zip(outputs, by_level[other]["outputs"][op, dtype, sample], strict=True)):
                # Nothing but products of bfloat16 sets the two levels of AVX-512 apart.
                same = level == "avx512" and not (dtype == torch.bfloat16 and "attention" in op)
                if same or not have.is_floating_point() or (op, i) in promised:
                    assert torch.equal(have.nan_to_num(7.0), want.nan_to_num(7.0)), (level, other, op, sample)
                    seen.add((op, i))
        assert promised <= seen


@on_x86_64
@pytest.mark.slow
def test_no_level_reaches_above_itself(dispatched: Dispatched):
    """Wider registers are in their own modules alone, and nothing of a module can be chosen for another."""
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("no objdump and nm")
    libraries = [*dispatched.package.glob("_C.*.so"), *dispatched.prefix.glob("lib*/libtokcomp*.so")]
    modules = {path: level for path in libraries for level in LEVELS if path.name.endswith(f"{level}.so")}
    assert len(libraries) == 10 and len(modules) == 8, libraries
    for path in libraries:
        code = run("objdump", "-d", "--no-show-raw-insn", path)
        level = modules.get(path, "default")
        assert bool(re.search(r"%ymm", code)) == (level != "default"), path
        assert bool(re.search(r"%zmm", code)) == level.startswith("avx512"), path
        assert bool(re.search(r"\tv(dpbf16ps|cvtne)", code)) == (level == "avx512_bf16"), path
        if path in modules:
            assert run("nm", "-D", "--defined-only", path) == "", path


@on_x86_64
@pytest.mark.slow
def test_libtokcomp_takes_every_level(dispatched: Dispatched, by_level: dict[str, dict[str, Any]]):
    for level in by_level:
        assert "all passed" in run(dispatched.build / "tokcomp_test", env={VARIABLE: level})
    refused = subprocess.run(
        [dispatched.build / "tokcomp_test"], env=os.environ | {VARIABLE: "sse9"}, capture_output=True, text=True
    )
    assert refused.returncode != 0 and "TOKCOMP_CPU_CAPABILITY must be one of default" in refused.stderr


@on_x86_64
@pytest.mark.slow
def test_a_missing_module_is_said(dispatched: Dispatched, tmp_path: Path):
    shutil.copytree(dispatched.package, tmp_path / "tokcomp_kernels")
    (gone,) = (tmp_path / "tokcomp_kernels").glob("_C.*.default.so")
    gone.unlink()
    look = "import tokcomp_kernels as t; print(t.load_error, t.build_info(), t.native_kernels()['cpu'])"
    said = run(sys.executable, "-c", look, env={"PYTHONPATH": str(tmp_path), VARIABLE: "default"}, cwd=tmp_path)
    assert f"{gone.name}: cannot open shared object file" in said
    assert said.endswith("rebuild with pip install -e . (or make build) {} frozenset()\n")


def test_a_wrong_level_is_an_error():
    """Not a reason to compute with something else."""
    env = os.environ | {VARIABLE: "sse9"}
    run = subprocess.run(
        [sys.executable, "-c", "import tokcomp_kernels"], env=env, cwd=ROOT, capture_output=True, text=True
    )
    if not list((ROOT / "tokcomp_kernels").glob("_C.*.so")):
        pytest.skip("no compiled kernels")
    assert run.returncode != 0 and "ValueError: TOKCOMP_CPU_CAPABILITY" in run.stderr
