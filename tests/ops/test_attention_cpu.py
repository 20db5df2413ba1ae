"""The compiled CPU kernels by size: panels of odd widths, blocks of rows, more tokens than are ranked by counting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokcomp_kernels import native_kernels, reference
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.reference._common import descending_order
from tokcomp_kernels.testing import Sample

pytestmark = pytest.mark.skipif(not native_kernels()["cpu"], reason="no compiled CPU kernels")
NATIVE = torch.ops.tokcomp_cpu
ATTENTION = ["attention", "masked_attention", "_attention_backward", "_masked_attention_backward"]


def _sample(op: str, num_tokens: int, width: int, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(1000 * num_tokens + width)
    packed = torch.randn(1, num_tokens, 4, 2, width, generator=generator).to(dtype)
    q, k, v, grad = packed.permute(2, 0, 3, 1, 4).unbind(0)
    size = 0.5 + torch.rand(1, num_tokens, generator=generator)
    masks = (torch.rand(1, num_tokens, generator=generator).round(),) if "masked" in op else ()
    grads = (grad,) if op.endswith("backward") else ()
    return Sample(op, f"N{num_tokens}-D{width}", (*grads, q, k, v, *masks), {"size": size})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(5, 2), (25, 15), (47, 33), (49, 63), (48, 64), (66, 65), (97, 80), (31, 129), (7, 200)]
)
def test_any_tile_is_right(op: str, num_tokens: int, width: int, dtype: torch.dtype) -> None:
    sample = _sample(op, num_tokens, width, dtype)
    assert_right(sample, getattr(NATIVE, op)(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize("op", ["attention", "masked_attention"])
def test_what_is_not_finite_stays_in_its_rows(op: str, argument: str, value: float) -> None:
    sample = _sample(op, 53, 16, torch.float32)
    qkv = [tensor.clone() for tensor in sample.args[:3]]
    qkv["qkv".index(argument)][0, 1, 30, 3] = value
    args = (*qkv, *sample.args[3:])
    have = getattr(NATIVE, op)(*args, **sample.kwargs)
    want = reference.REFERENCES[op](*args, **sample.kwargs)
    for one, other in zip(have, want, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())
    assert have[0].isfinite()[0, 0].all(), "the other head is untouched"
    assert not have[0].isfinite().all()


def _scores_with_everything(num_tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.randint(-40, 40, (2, num_tokens), generator=generator).to(dtype)
    special = torch.tensor([float("nan"), float("-inf"), float("inf"), -0.0, 0.0, -float("nan")], dtype=dtype)
    places = torch.randperm(num_tokens, generator=generator)[: num_tokens // 2]
    scores[:, places] = special[torch.arange(places.numel()) % special.numel()]
    return scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [16, 1024, 1025, 1026, 1500])
def test_order_is_the_same_by_counting_and_by_sorting(num_tokens: int, dtype: torch.dtype) -> None:
    importance = _scores_with_everything(num_tokens, dtype)
    x = torch.arange(num_tokens, dtype=torch.float32).expand(2, num_tokens)[..., None]
    out, _, source = NATIVE.prune_merge(x, importance, num_tokens, num_tokens)
    order = out[..., 0].long()
    assert torch.equal(order, descending_order(importance, 1))
    assert torch.equal(source.gather(1, order), torch.arange(num_tokens).expand(2, -1))
