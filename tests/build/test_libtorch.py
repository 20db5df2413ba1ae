"""The library for C++ programs: configured, built, tested by CTest, installed and found by another CMake project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

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


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.mark.slow
def test_libtorch(cmake: str, tmp_path: Path):
    build, prefix, consumer = tmp_path / "build", tmp_path / "prefix", tmp_path / "consumer"
    # Without a GPU the CUDA half would only be compiled a second time.
    cuda = "auto" if torch.cuda.is_available() else "0"
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "TOKCOMP_PYTHON_MODULE": "OFF",
        "TOKCOMP_LIBTORCH": "ON",
        "TOKCOMP_BUILD_CUDA": cuda,
        "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda == "auto" else "8.0",
        "CMAKE_INSTALL_PREFIX": prefix,
    }
    jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    run(cmake, "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in settings.items()))
    run(cmake, "--build", build, "--parallel", jobs)
    tested = run(Path(cmake).with_name("ctest"), "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in tested
    run(cmake, "--install", build)

    folder = Path(torch.__file__).parent
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
    run(cmake, "-S", consumer, "-B", consumer / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", consumer / "build")
    assert "all passed" in run(consumer / "build" / "consumer")
