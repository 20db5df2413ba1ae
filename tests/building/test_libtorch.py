"""The library for C++ programs: configured, built, tested by CTest, installed and found by another CMake project."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.building.builds import ROOT, Dispatched, run
from tests.examples.test_notebooks import run as run_notebook

CONSUMER = """
cmake_minimum_required(VERSION 3.24)
project(consumer LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(tokcomp 0.1 REQUIRED)
add_executable(consumer {test})
target_include_directories(consumer SYSTEM PRIVATE {torch}/include {torch}/include/torch/csrc/api/include)
target_compile_definitions(consumer PRIVATE _GLIBCXX_USE_CXX11_ABI={abi})
target_link_libraries(consumer PRIVATE tokcomp::tokcomp {libraries})
"""


@pytest.mark.slow
def test_its_own_tests(dispatched: Dispatched):
    assert "100% tests passed" in run(dispatched.ctest, "--test-dir", dispatched.build, "--no-tests=error")


@pytest.mark.slow
def test_libtorch(cmake: str, dispatched: Dispatched, tmp_path: Path):
    folder, consumer = Path(torch.__file__).parent, tmp_path / "consumer"
    names = ["torch_cpu", "c10", *(["torch_cuda"] if torch.cuda.is_available() else [])]
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(
        CONSUMER.format(
            test=ROOT / "csrc/tests/test_operators.cpp",
            torch=folder,
            abi=int(torch.compiled_with_cxx11_abi()),
            libraries=" ".join(str(folder / "lib" / f"lib{name}.so") for name in names),
        )
    )
    run(cmake, "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={dispatched.prefix}")
    run(cmake, "--build", consumer / "build")
    assert "all passed" in run(consumer / "build" / "consumer")


@pytest.mark.slow
def test_exported_model(cmake: str, dispatched: Dispatched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The C++ notebook: a trained model through `tokcomp.export` into examples/aot; the logits are the model's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(cmake).parent}{os.pathsep}{os.environ['PATH']}")
    here = {
        'Path("../..")': f'Path("{ROOT}")',
        'Path("libtokcomp")': f'Path("{dispatched.prefix}")',
        'f"-DCMAKE_PREFIX_PATH={prefix}"': 'f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Debug"',
    }
    found = run_notebook("cpp", here)

    def assert_same(images: torch.Tensor, printed: str) -> None:
        logits = torch.from_file("logits.bin", size=len(images) * 10).view(-1, 10)
        with torch.no_grad():
            # Sums in another order, through four blocks.
            torch.testing.assert_close(logits, found["model"](images), atol=1e-4, rtol=1e-4)
        best = [int(line.split("class ")[1].split()[0]) for line in printed.splitlines() if "class " in line]
        assert best == logits.argmax(1).tolist()

    assert_same(found["images"], found["printed"])
    program = ["build-classify/classify", "digits.pt2", "images.bin", "logits.bin"]
    one = torch.randn(1, *found["images"].shape[1:])
    one.numpy().tofile("images.bin")
    assert_same(one, run(*program))

    Path("images.bin").write_bytes(b"short")
    refused = subprocess.run(program, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "must hold 1 to 16 images of" in refused.stderr
