"""Multiply-adds as a budget: exact numbers, gradients, refusals."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from tokcomp.adapters.base import BlockCost, Cost
from tokcomp.budgets import FlopsBudget, TargetError, TokenCounts, counts_of, flops_of, least_counts


def schedule(gflops: float = 2.9) -> tokcomp.DiffRate:
    return tokcomp.DiffRate.published("deit_small_patch16_224", gflops=gflops)


def test_a_case_by_hand():
    cost = Cost(embed=7, blocks=(BlockCost(3, 2, 5), BlockCost(11, 1, 13)), head_per_token=17, head=19)
    counts = TokenCounts(torch.tensor([4.0, 3.0]), torch.tensor([3.0, 2.0]))
    # 7*4 + (3*4 + 2*2*16 + 5*3) + (11*3 + 2*1*9 + 13*2) + 17*2 + 19
    assert flops_of(cost, counts, 4).item() == 28 + (12 + 64 + 15) + (33 + 18 + 26) + 34 + 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gflops", [2.3, 2.5, 2.7, 2.9, 3.1])
def test_equals_the_integer_count_exactly(deit_small, gflops, dtype):
    method = schedule(gflops)
    counts = TokenCounts(*(part.to(dtype) for part in counts_of(deit_small, method)))
    have = flops_of(FlopsBudget(deit_small, 2.9)._cost, counts, 197)
    try:
        assert have.item() == tokcomp.flops(tokcomp.compress(deit_small, method))
    finally:
        tokcomp.restore(deit_small)
    assert have.dtype == torch.float64 and have.ndim == 0


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(deit_small, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = [(1 + 196 * torch.rand(12, generator=generator, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    budget = FlopsBudget(deit_small, 2.9)
    assert torch.autograd.gradcheck(lambda a, b: budget.cost(TokenCounts(a, b)), counts, atol=1e-7)
    assert torch.autograd.gradcheck(lambda a, b: budget.loss(TokenCounts(a, b)), counts, atol=1e-6)


def test_loss_is_the_squared_distance_in_g(deit_small):
    counts = counts_of(deit_small)
    budget = FlopsBudget(deit_small, 2.3)
    assert budget.loss(counts).item() == pytest.approx((4.599177 - 2.3) ** 2, rel=1e-6)
    assert budget.weight == 5.0
    described = budget.describe()
    assert described["budget"] == "flops" and described["target"] == 2.3 and described["unit"] == "GFLOPs"


def test_smallest_counts_leave_block_0_alone(deit_small):
    counts = least_counts(deit_small)
    assert counts.num_in.tolist() == [197.0, 197.0] + [2.0] * 10
    assert counts.num_out.tolist() == [197.0] + [2.0] * 11
    assert least_counts(deit_small, 5).num_out.tolist() == [197.0] + [2.0] * 11  # 196 - 5 * 39 = 1 patch
    assert least_counts(deit_small, 4).num_out.tolist() == [197.0] + [5.0] * 11  # 196 - 4 * 48 = 4 patches


def test_a_head_that_reads_patches_keeps_the_last_block(make_vit):
    model = make_vit(class_token=False, global_pool="avg")  # 16 patches, 4 blocks
    counts = least_counts(model, 5)
    assert counts.num_in.tolist() == [16.0, 16.0, 1.0, 1.0] and counts.num_out.tolist() == [16.0, 1.0, 1.0, 1.0]
    alone = least_counts(make_vit(class_token=False, global_pool="avg", depth=2))
    assert alone.num_in.tolist() == alone.num_out.tolist() == [16.0, 16.0]


@pytest.mark.parametrize("target", [0.1, 4.7])
def test_an_unreachable_target_is_refused_with_both_ends(deit_small, target):
    with pytest.raises(
        TargetError,
        match=rf"target_gflops must lie between 4\.599 \(uncompressed\) and 0\.\d+ \(.*\) GFLOPs, got {target}",
    ):
        FlopsBudget(deit_small, target)


@pytest.mark.parametrize(
    ("target", "error"), [(float("nan"), ValueError), (-1, ValueError), ("2.9", TypeError), (None, TypeError)]
)
def test_what_is_no_target_is_refused(deit_small, target, error):
    with pytest.raises(error, match="target_gflops must be a"):
        FlopsBudget(deit_small, target)


def test_a_first_call_in_inference_mode_spoils_nothing():
    cost = Cost(embed=1, blocks=(BlockCost(31, 7, 5),), head_per_token=1, head=1)
    count = torch.ones(1, requires_grad=True)
    with torch.inference_mode():
        flops_of(cost, TokenCounts(count, count), 1)
    flops_of(cost, TokenCounts(count, count), 1).backward()
    assert count.grad.item() == 31 + 2 * 2 * 7 + 5 + 1


def test_counts_of_another_depth_are_refused(deit_small):
    with pytest.raises(ValueError, match="one entry per block, 12, got shapes"):
        FlopsBudget(deit_small, 2.9).cost(TokenCounts(torch.ones(11), torch.ones(11)))
