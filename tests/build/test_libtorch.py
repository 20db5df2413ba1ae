"""The library for C++ programs: configured, built, tested by CTest, installed and found by another CMake project."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import timm
import tokcomp
import torch
from tokcomp.cli import main

from tests.build.builds import ROOT, Dispatched, run

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
def test_exported_model(cmake: str, dispatched: Dispatched, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A trained model through `tokcomp export` into examples/aot: the logits are the model's own."""
    build, package = tmp_path / "build", tmp_path / "digits.pt2"
    settings = {"CMAKE_PREFIX_PATH": dispatched.prefix, "CMAKE_BUILD_TYPE": "Debug"}
    run(cmake, "-S", ROOT / "examples" / "aot", "-B", build, *(f"-D{name}={value}" for name, value in settings.items()))
    run(cmake, "--build", build)
    options = ["-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "--method", "tome", "--r", "8"]
    assert main(["export", *options, "--max-batch", "16", "-o", str(package)]) == 0
    assert "pretrained weights; 1 to 16 images, cpu" in capsys.readouterr().out

    model = tokcomp.compress(timm.create_model("tokcomp_digits_vit", pretrained=True).eval(), tokcomp.ToMe(8))
    for batch in (5, 1):
        images = torch.randn(batch, *tokcomp.load_exported(package).shape)
        images.numpy().tofile(tmp_path / "images.bin")
        printed = run(build / "classify", package, tmp_path / "images.bin", tmp_path / "logits.bin")
        logits = torch.from_file(str(tmp_path / "logits.bin"), size=batch * 10).view(batch, 10)
        with torch.no_grad():
            # Sums in another order, through four blocks.
            torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
        best = [int(line.split("class ")[1].split()[0]) for line in printed.splitlines()]
        assert best == logits.argmax(1).tolist()

    (tmp_path / "images.bin").write_bytes(b"short")
    refused = subprocess.run(
        [build / "classify", package, tmp_path / "images.bin"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1 and "must hold 1 to 16 images of" in refused.stderr
