"""The implementations that can run here, as parameters of a test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tokcomp_kernels import native_kernels
from tokcomp_kernels._schema import OPERATORS
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.testing import Sample, samples

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
ALL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = [operator.name for operator in OPERATORS]
#: Tokens of an interpreted kernel's largest samples.
LARGEST = {torch.float32: 577, torch.float16: 197, torch.bfloat16: 33}
#: Variants of a sample that tell nothing at a large size that they do not at a small one.
VARIANTS = ("strided", "transposed", "packed", "keep-all")
#: Arguments that all images share, whatever their shape.
SHARED = {"counts", "weight", "bias"}


@dataclass(frozen=True)
class Target:
    """One backend of one operator on one device."""

    op: str
    backend: str
    device: str

    @property
    def call(self) -> Callable[..., Any]:
        return IMPLEMENTATIONS[self.op].callable(self.backend)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return ALL_DTYPES if self.backend in ("reference", "cpp") else ALL_DTYPES[1:]

    @property
    def interpreted(self) -> bool:
        """Triton on CPU: right in the same way at any size, and slow, so large samples run in float32 alone."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        """Of a test with this parameter."""
        return (pytest.mark.slow,) if self.interpreted else ()

    def samples(self, dtype: torch.dtype, largest: int | None = None) -> Iterator[Sample]:
        """The operator's samples on this device; where Triton is interpreted up to ``largest`` tokens, and of large
        ones those that differ in more than strides."""
        for sample in samples(self.op, dtype, self.device):
            count = _num_tokens(sample) if self.interpreted else 0
            if count <= (largest or count) and not (count > 100 and sample.id.endswith(VARIANTS)):
                yield sample

    def sample_ids(self, dtype: torch.dtype) -> list[str]:
        """Of the samples to compare with float64."""
        if not self.interpreted:
            return [sample.id for sample in self.samples(dtype)]
        backward = self.op.endswith("_backward")
        ids = [sample.id for sample in self.samples(dtype, min(LARGEST[dtype], 257 if backward else 577))]
        if dtype == torch.float32:  # 257 tokens fill more tiles, and leave one as empty
            return [one for one in ids if not one.startswith("N197")]
        # bfloat16 is float16's kernel with another type to load.
        return ids if dtype == torch.float16 else [one for one in ids if one.startswith("N")]

    def run(self, sample: Sample) -> tuple[torch.Tensor, ...]:
        outputs = self.call(*sample.args, **sample.kwargs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def targets(op: str) -> list[Target]:
    found = [Target(op, "reference", "cpu")]
    if op in native_kernels()["cpu"]:
        found.append(Target(op, "cpp", "cpu"))
    if HAS_TRITON and (HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1"):
        found.append(Target(op, "triton", "cuda" if HAS_GPU else "cpu"))
    if HAS_GPU:
        found.append(Target(op, "reference", "cuda"))
        if op in native_kernels()["cuda"]:
            found.append(Target(op, "cuda", "cuda"))
    return found


def all_targets() -> list[Any]:
    return [
        pytest.param(target, id=f"{target.op}-{target.backend}-{target.device}", marks=target.marks)
        for op in NAMES
        for target in targets(op)
    ]


def all_samples() -> list[Any]:
    """Every operator on every backend that can run here, in every dtype it takes, with the ids of its samples.

    All in one test, or where Triton is interpreted, and takes its time, in one each.
    """
    found = []
    for op in NAMES:
        for target in targets(op):
            for dtype in target.dtypes:
                ids = target.sample_ids(dtype)
                name = f"{target.op}-{target.backend}-{target.device}-{_short(dtype)}"
                if target.interpreted:
                    found += [pytest.param(target, dtype, [i], id=f"{name}-{i}", marks=target.marks) for i in ids]
                else:
                    found.append(pytest.param(target, dtype, ids, id=name))
    return found


def find(op: str, sample_ids: Sequence[str], dtype: torch.dtype, device: str) -> Iterator[Sample]:
    return (sample for sample in samples(op, dtype, device) if sample.id in sample_ids)


def _num_tokens(sample: Sample) -> int:
    return max(t.shape[-2 if t.dim() > 2 else 1] for t in sample.args if isinstance(t, torch.Tensor) and t.dim() > 1)


def _short(dtype: torch.dtype) -> str:
    return {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
