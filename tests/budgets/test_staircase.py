"""Tables that are exact forward and smooth backward."""

from __future__ import annotations

import pytest
import torch
from tokcomp.budgets.staircase import Staircase


def slope_at(stairs: Staircase, count: float) -> float:
    counts = torch.tensor([float(count)], dtype=torch.float64, requires_grad=True)
    stairs(counts).sum().backward()
    return counts.grad.item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_counts_give_the_table_to_the_bit(seed, dtype):
    values = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(Staircase(values)(torch.arange(50, dtype=dtype)), values)


def test_between_whole_counts_it_is_linear_and_beyond_the_ends_flat():
    stairs = Staircase([1.0, 3.0, 4.0])
    assert stairs(torch.tensor([0.5, 1.25, -3.0, 9.0])).tolist() == [2.0, 3.25, 1.0, 4.0]


@pytest.mark.parametrize("count", [0, 1, 17, 40, 99])
def test_where_the_table_is_smooth_the_gradient_is_the_derivative(count):
    n = torch.arange(100, dtype=torch.float64)
    assert slope_at(Staircase(3 * n + 2), count) == pytest.approx(3, rel=1e-12)  # a line: exact, at the ends too
    quadratic = Staircase(n.square(), reach=4)
    if 4 <= count < 96:  # a symmetric window gives a parabola's derivative exactly
        assert slope_at(quadratic, count) == pytest.approx(2 * count, rel=1e-12)
        finite = (quadratic(torch.tensor([count + 1.0])) - quadratic(torch.tensor([count - 1.0]))).item() / 2
        assert slope_at(quadratic, count) == pytest.approx(finite, rel=1e-12)


@pytest.mark.parametrize("step", [8, 16])
def test_the_staircase_stays_in_the_value_and_not_in_the_gradient(step):
    n = torch.arange(200)
    values = torch.div(n + step - 1, step, rounding_mode="floor") * 5.0
    stairs = Staircase(values)
    inside = torch.arange(100.0, 100 + step)
    assert len(set(stairs(inside).tolist())) == 2  # flat but for one edge
    # On every count of a flat step the search sees the mean slope, 5 per step; the window is 33 wide, so the edge that
    # it may or may not include moves it by at most one step's share.
    for count in range(40, 160):
        assert slope_at(stairs, count) == pytest.approx(5 / step, rel=0.3)


def test_a_falling_table_pulls_nowhere():
    assert slope_at(Staircase(torch.arange(60, 0, -1.0)), 30) == 0
    flat = Staircase(torch.full((60,), 2.0))
    assert slope_at(flat, 30) == pytest.approx(0, abs=1e-12)


def test_several_functions_side_by_side():
    values = torch.rand(3, 40, dtype=torch.float64)
    counts = torch.tensor([[1.0, 2.5], [7.0, 39.0]])
    together = Staircase(values)(counts)
    assert together.shape == (3, 2, 2)
    for row, own in zip(values, together, strict=True):
        assert torch.equal(Staircase(row)(counts), own)


def test_made_in_inference_mode_it_still_gives_gradients():
    with torch.inference_mode():
        stairs = Staircase(torch.arange(20.0))
    assert slope_at(stairs, 5) == pytest.approx(1)
