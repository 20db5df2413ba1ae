"""The order of class_attention_sort: by counting up to 1024 tokens, by sorting above, the same either way."""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton.class_attention_sort as module
from tests.triton.inputs import DEVICE
from tokcomp_kernels.triton._order import MAX_COUNTED
from tokcomp_kernels.triton._reduce import reduce_groups


def brute_order(values, prefix):
    def key(i):
        value = float(values[i])
        return (value != value, -value if value == value else 0.0, i)

    return list(range(prefix)) + sorted(range(prefix, len(values)), key=key)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("num_tokens", [5, 64, 65, MAX_COUNTED + 1])
def test_counting_and_sorting_give_the_order_of_the_contract(num_tokens, prefix):
    generator = torch.Generator().manual_seed(num_tokens + prefix)
    # Few distinct values, so that most are ties.
    values = torch.randint(0, 7, (2, num_tokens), generator=generator).float() / 8
    values[0, ::4] = float("nan")
    values[1, ::3] = -0.0
    values[:, 1::9], values[:, 2::9] = float("inf"), float("-inf")
    order = module.token_order(values.to(DEVICE), prefix).cpu()
    assert order.tolist() == [brute_order(row, prefix) for row in values]


def test_a_long_row_is_sorted_too():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 8, generator=generator), torch.randn(1, 2, MAX_COUNTED + 3, 8, generator=generator)
    cls_attn, order = module.class_attention_sort_triton(q.to(DEVICE), k.to(DEVICE))
    scores = (q.double()[:, :, None] @ k.double().mT * 8**-0.5).softmax(-1)[:, :, 0].mean(1)
    assert torch.allclose(cls_attn.cpu().double(), scores, rtol=2**-18, atol=0)
    assert order.cpu()[0].tolist() == brute_order(cls_attn.cpu()[0], 1)


@pytest.mark.parametrize("mean", [False, True])
def test_groups_are_added_in_their_order(mean):
    """Float32 additions from first to last: any other order rounds differently."""
    values = torch.randn(2, 7, 131, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, 7)[:, None]
    total = torch.zeros(2, 131)
    for group in range(7):
        total += values[:, group]
    have = reduce_groups(values.to(DEVICE), mean=mean, dtype=torch.float32).cpu()
    assert torch.equal(have, total / 7 if mean else total)
