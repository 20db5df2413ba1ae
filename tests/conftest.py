"""Settings for every test. Nothing here assumes a GPU, or its absence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    # Triton kernels run on CPU tensors through the interpreter; set before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tokcomp.fastpath import packing

from tokcomp_kernels import product_types
from tokcomp_kernels.product_types import ProductType

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

TESTS = Path(__file__).parent
#: Whose tests share nothing, and are many.
SPREAD = "tests/ops/"
#: Folders of slow tests: kernels in Triton's interpreter and in the CUDA shim, compilers, random models, attacks.
SLOW = {"attack", "bench", "building", "cuda", "oracle", "triton"}


@pytest.fixture
def set_products(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this any CPU: set_products(bfloat16=..., float16=...) says in which type it computes products of those.

    oneDNN then refuses what such a CPU would, and PyTorch's own products stand in for what this one cannot pack.
    """

    def choose(**answers: str) -> None:
        for name, chosen in answers.items():
            answer = ProductType(getattr(torch, chosen), "a test says so")
            monkeypatch.setitem(product_types.CPU_PRODUCTS, getattr(torch, name), answer)
        monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", reorder)
        monkeypatch.setattr(packing, "_linear", linear)
        monkeypatch.setattr(packing, "_linear_binary", linear_binary)

    packs, multiplies, adds = torch.ops.mkldnn._reorder_linear_weight, packing._linear, packing._linear_binary
    lacking = {dtype for dtype, chosen in product_types.CPU_PRODUCTS.items() if chosen.dtype != dtype}

    def reorder(weight: Tensor, rows: int | None) -> Tensor:
        if product_types.product_dtype(weight.dtype, "cpu") != weight.dtype:
            raise RuntimeError(f"mkldnn_reorder_linear_weight: {weight.dtype} path needs the cpu support")
        return weight.clone() if weight.dtype in lacking else packs(weight, rows)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, scalars: list[Any], kind: str) -> Tensor:
        if x.dtype not in lacking:
            return multiplies(x, weight, bias, after, scalars, kind)
        out = F.linear(x, weight, bias)
        return F.gelu(out, approximate=kind) if after == "gelu" else out

    def linear_binary(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, after: str) -> Tensor:
        return residual + F.linear(x, weight, bias) if x.dtype in lacking else adds(x, residual, weight, bias, after)

    return choose


@pytest.fixture(params=["in hardware", "in float32"])
def half_products(request: pytest.FixtureRequest, set_products: Callable[..., None]) -> bool:
    """Both kinds of CPU: whether this one multiplies bfloat16 and float16 in hardware."""
    in_hardware = request.param == "in hardware"
    set_products(**{name: name if in_hardware else "float32" for name in ("bfloat16", "float16")})
    return in_hardware


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(TESTS).parts[0] in SLOW:
            item.add_marker("slow")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay on one worker, for what they share; the operators' are spread. In the files' order: xdist's
    own begins with the files of most tests, and ends with those whose one test takes longest."""
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(SPREAD) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)
