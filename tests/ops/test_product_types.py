"""The one answer to the question in which type the CPU multiplies, and what follows from it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from tests.multiplied import Multiplied
from tokcomp_kernels import product_types
from tokcomp_kernels.product_types import CPU_PRODUCTS, autocast, product_dtype, unless_emulated, widened

HALF = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_is_multiplied_in_hardware_can_be_packed(dtype):
    assert product_dtype(dtype, "cuda") == dtype and product_dtype(torch.int64, "cpu") == torch.int64
    if CPU_PRODUCTS[dtype].dtype == dtype:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), None)
    else:
        assert CPU_PRODUCTS[dtype].dtype == torch.float32


@pytest.mark.parametrize(
    ("onednn", "avx512", "instructions", "intel", "tiles", "limit", "chosen"),
    [
        (False, False, False, False, False, "", torch.float32),  # AVX2
        (True, False, False, True, False, "", torch.bfloat16),  # AVX2 with conversions, or another architecture
        (True, True, True, False, False, "", torch.bfloat16),
        (True, True, True, True, True, "", torch.bfloat16),
        (True, True, True, True, False, "", torch.float32),  # tiles that a virtual machine hides
        (True, True, False, True, False, "", torch.float32),  # AVX-512 of the first years
        (True, True, True, False, False, "AVX512_CORE", torch.float32),
        (False, True, True, False, False, "AVX2", torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_it_is_fast(monkeypatch, onednn, avx512, instructions, intel, tiles, limit, chosen):
    monkeypatch.setattr(product_types, "_onednn_says", lambda question: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(product_types, "_is_intel", lambda: intel)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    answer = product_types._of_bfloat16()
    assert answer.dtype == chosen and (not limit or f"ONEDNN_MAX_CPU_ISA={limit}" in answer.reason)


@pytest.mark.slow
def test_onednn_held_to_avx2_has_neither_half_type():
    program = "from tokcomp_kernels.product_types import CPU_PRODUCTS as a; print(*(one.dtype for one in a.values()))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["torch.float64", "torch.float32", "torch.float32", "torch.float32"]


def test_torch_without_onednn_has_neither_half_type(monkeypatch):
    monkeypatch.setattr(product_types, "_onednn_says", lambda question: False)
    assert product_types._of_bfloat16().dtype == product_types._of_float16().dtype == torch.float32
    monkeypatch.undo()
    assert product_types._onednn_says("_is_there_such_a_question") is False


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(half_products, dtype):
    message = f"in {dtype} is torch.float32 here: a test says so"
    with nullcontext() if half_products else pytest.warns(UserWarning, match=message), autocast("cpu", dtype):
        assert torch.is_autocast_enabled("cpu") == half_products
    with autocast("cpu", None):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype):
        with unless_emulated("cpu"):
            assert torch.is_autocast_enabled("cpu") == half_products
        with unless_emulated("cuda"):
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("operator", ["linear_gelu", "conv2d", "attention", "matmul"])
def test_products_are_computed_in_the_type_chosen_and_given_in_their_own(half_products, dtype, operator):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((2, 6, 8), (8, 8), (8,))
    )
    with Multiplied() as multiplied:
        if operator == "linear_gelu":
            out = torch.ops.tokcomp.linear_gelu(x, weight, bias)
        else:
            with widened(x):
                out = {
                    "conv2d": lambda: F.conv2d(x[None], weight.view(4, 2, 2, 4)[..., :3]),
                    "attention": lambda: F.scaled_dot_product_attention(x, x @ weight, value=x),
                    "matmul": lambda: x @ weight,
                }[operator]()
        out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == dtype and out.isfinite().all()
    if operator == "attention" and half_products:
        multiplied.dtypes -= {torch.float32}  # PyTorch 2.10's own attention does, for gradients
    assert multiplied.dtypes == {dtype if half_products else torch.float32}


def test_whatever_is_no_such_product_is_left_alone(half_products):
    x = torch.randn(2, 6, 8)
    with widened(x.bfloat16()):
        assert torch.equal(x @ x.mT, x.matmul(x.mT)) and (x @ x.mT).dtype == torch.float32
        assert (x.bfloat16() + x.bfloat16()).dtype == torch.bfloat16
