"""How far a number may lie from float64's, and a cosine below the best one: budgets for ``compare``.

Where the budget comes from. A result's error is a sum of many roundings, each at most u = epsilon / 2 of its value, so
it is about normal, with a spread that the operator and its inputs set. Both terms are the largest of many draws of it:
reference_error rounds where the operator rounds, in another order of sums than the kernel's and on other inputs, so
that the reference can fail too; rounding_band moves each input by up to 2 u, as a kernel does that rounds what lies
between two products to their type. Attention's backward takes two passes, the second of which computes every score
again, with other roundings. A kernel's own error is one draw more: of one normal variable it exceeds twice both largest
ones together with probability 2e-3 after 3 draws, 4e-6 after 8. An image's largest errors may all come from one row, so
images of few values are drawn more often.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.testing import Sample

#: Values to draw of each image, and how many draws that may be.
LEAST_VALUES, LEAST_DRAWS, MOST_DRAWS = 1000, 3, 30


def assert_within_rounding(
    sample: Sample, exact: Callable[[Sample], tuple[Tensor, ...]], outputs: tuple[Tensor, ...]
) -> None:
    """Each output against ``exact`` evaluated in float64, within the response to rounding of the inputs."""
    base = sample.map(lambda t: t.detach().double())
    want = [target.detach() for target in exact(base)]
    rounding: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for position, (have, target) in enumerate(zip(outputs, want, strict=True)):
        if not have.is_floating_point():
            continue
        name = f"{sample.op}[{sample.id}] output {position}"
        assert have.shape == target.shape, f"{name}: shape {tuple(have.shape)}, not {tuple(target.shape)}"
        have64 = have.detach().double()
        assert torch.equal(have64.isnan(), target.isnan()), f"{name}: NaN where the reference has none, or the reverse"
        if have.numel() == 0:
            continue
        epsilon = torch.finfo(have.dtype).eps
        if epsilon not in rounding:
            rounding[epsilon] = _rounding(base, exact, want, epsilon)
        reference_error, response = rounding[epsilon][position]
        if have.dtype == torch.float64:
            reference_error = 2 * reference_error  # the oracle errs as much
        rounding_band = response + epsilon / 2 * target.abs() + torch.finfo(have.dtype).tiny
        budget = 2 * (reference_error + rounding_band)
        error = torch.where(target.isnan() | (have64 == target), 0.0, (have64 - target).abs())
        worst = (error - budget).argmax()
        assert bool((error <= budget).all()), (
            f"{name}: {have64.flatten()[worst].item()} where float64 gives {target.flatten()[worst].item()}; "
            f"error {error.flatten()[worst].item():.3g}, budget {budget.flatten()[worst].item():.3g}"
        )


def _rounding(
    base: Sample, exact: Callable[[Sample], tuple[Tensor, ...]], want: list[Tensor], epsilon: float
) -> list[tuple[Tensor, Tensor]]:
    """For each output what accumulating in a kernel's precision loses, and what rounding the inputs changes, at most.

    Both [B, 1, ...].
    """
    # Accumulation is in float32 for every output but float64's.
    unit = min(1.0, epsilon / torch.finfo(torch.float32).eps)
    fewest = min(target[0].numel() for target in want if target.numel())
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in want]
    for draw in range(min(max(-(-LEAST_VALUES // fewest), LEAST_DRAWS), MOST_DRAWS)):
        generator = torch.Generator().manual_seed(draw)

        def rounded(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            noise = torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.device) * 2 - 1
            return t * (1 + epsilon * noise)

        moved = base.map(rounded)
        single = moved.map(lambda t: t.float())
        runs = zip(found, want, exact(moved), exact(single), exact(single.map(lambda t: t.double())), strict=True)
        for (lost, changed), target, response, accumulated, whole in runs:
            lost.append(_largest_per_image(accumulated.double() - whole) * unit)
            changed.append(_largest_per_image(response - target))
    return [
        (_largest(lost, target.dim()), _largest(changed, target.dim()))
        for (lost, changed), target in zip(found, want, strict=True)
    ]


def _largest(draws: list[Tensor], dims: int) -> Tensor:
    return torch.stack(draws).amax(0).reshape(-1, *[1] * (dims - 1))


def _largest_per_image(change: Tensor) -> Tensor:
    change = change.detach().abs().nan_to_num(0.0, 0.0, 0.0).flatten(1)
    return change.amax(1) if change.numel() else change.new_zeros(change.shape[0])


def cosine_slack(features: Tensor) -> float:
    """How far a chosen cosine over K features may lie below the best one.

    K rounded products add up to an error of 2 u sqrt(K) at most, but once in 2000; half of that each norm. Both cosines
    err: 2 * (1 + 1/2 + 1/2) * 2 u sqrt(K) = 4 epsilon sqrt(K).
    """
    return 4 * max(features.shape[-1], 1) ** 0.5 * torch.finfo(accumulate_dtype(features)).eps
