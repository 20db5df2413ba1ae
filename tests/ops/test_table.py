"""What follows from the table of operators, and the facts that stand once in each language."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import tokcomp_kernels
from tests.ops.backends import NAMES
from tokcomp_kernels._numbers import MIN_SIZE
from tokcomp_kernels._schema import BY_NAME, NAMESPACE, NATIVE_NAMESPACES, OPERATORS
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tools import operators_page

ROOT = Path(__file__).resolve().parents[2]
FILES = {operator.file for operator in OPERATORS}
PUBLIC = {operator.name for operator in OPERATORS if operator.public}


def test_every_operator_is_defined_once_and_for_every_backend() -> None:
    for operator in OPERATORS:
        for namespace in (NAMESPACE, *NATIVE_NAMESPACES.values()):
            schema = getattr(getattr(torch.ops, namespace), operator.name).default._schema
            assert schema == torch._C.parse_schema(f"{namespace}::{operator.schema}")


def test_every_operator_is_registered_and_every_public_one_is_a_function() -> None:
    assert IMPLEMENTATIONS.keys() == set(NAMES)
    assert set(tokcomp_kernels.__all__) - {"build_info", "load_error", "native_kernels"} == PUBLIC


def test_backward_passes_are_named_by_the_table() -> None:
    """Where there is none, PyTorch's own operators make up the gradient, as of a LayerNorm or a linear layer."""
    composed = {"add_layer_norm", "prune_merge_norm", "linear_gelu"}
    for operator in OPERATORS:
        assert operator.backward is None or operator.backward in BY_NAME
        if operator.name not in composed:
            assert bool(operator.differentiable) == (operator.backward is not None)


@pytest.mark.parametrize(
    ("folder", "pattern", "expected"),
    [
        ("tokcomp_kernels/ops", "[a-z]*.py", PUBLIC),
        ("tokcomp_kernels/reference", "[a-z]*.py", FILES),
        ("tokcomp_kernels/triton", "[a-z]*.py", {operator.file for operator in OPERATORS}),
        ("csrc/cpu", "*.cpp", {operator.file for operator in OPERATORS if operator.native}),
    ],
)
def test_one_operator_is_one_set_of_files(folder: str, pattern: str, expected: set[str]) -> None:
    assert {path.stem for path in (ROOT / folder).glob(pattern)} == expected
    assert {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} < FILES


def test_the_page_of_operators_is_up_to_date() -> None:
    page = operators_page.PAGE.read_text()
    assert operators_page.drawn(page) == page, "run python tools/operators_page.py"
    with pytest.raises(ValueError, match="must have a section unmerge opening with a fence once, got 0"):
        operators_page.drawn(page.replace("## unmerge", "## merge back"))


def test_the_page_of_operators_runs_as_written() -> None:
    source = "\n".join(re.findall(r"^```python\n(.*?)^```", operators_page.PAGE.read_text(), re.DOTALL | re.MULTILINE))
    found: dict[str, torch.Tensor] = {}
    exec(compile(source, "operators.md", "exec"), found)
    assert found["source"].tolist() == [[0, 2, 1, 1, 2, -1]]
    row = (found["q"][:, :, :1] @ found["k"].mT / 8).softmax(-1)
    torch.testing.assert_close(found["cls_attn"], row[:, :, 0].mean(1))


def test_the_least_size_is_the_same_in_every_language() -> None:
    """Once in Python, once for C++ and CUDA."""
    literal = re.compile(r"\b(MIN_SIZE|kMinSize) *= *([0-9][0-9.e-]*)", re.MULTILINE)
    found = {}
    for folder, kinds in (("csrc", (".h", ".cuh", ".cpp", ".cu")), ("tokcomp_kernels", (".py",)), ("python", (".py",))):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in kinds:
                found.update({f"{path.name}:{name}": float(value) for name, value in literal.findall(path.read_text())})
    names = {"min_size.h:kMinSize", "_numbers.py:MIN_SIZE"}
    assert found == dict.fromkeys(names, MIN_SIZE)
