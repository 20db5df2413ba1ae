"""The proxy: kept numbers and token probabilities, against the definition spelled out."""

from __future__ import annotations

import pytest
import torch
from tokcomp.search.proxy import KeptNumber, relax


def spelled_out(logits: torch.Tensor, patches: int, granularity: int, prefix: int) -> tuple[float, list[float]]:
    """Expected kept number and the probability that each rank is kept, candidate by candidate."""
    candidates = list(range(patches, 0, -granularity)) if len(logits) > 1 else [patches]
    rho = logits.double().softmax(0).tolist()
    expected = sum(p * k for p, k in zip(rho, candidates, strict=True)) + prefix
    kept = [
        sum(p for p, k in zip(rho, candidates, strict=True) if k + prefix > rank) for rank in range(patches + prefix)
    ]
    return expected, kept


@pytest.mark.parametrize(
    ("patches", "granularity", "prefix"), [(64, 1, 1), (196, 4, 1), (10, 3, 2), (7, 7, 0), (1, 1, 1)]
)
def test_relax_is_the_definition(patches, granularity, prefix):
    torch.manual_seed(patches)
    logits = torch.randn(3, -(-patches // granularity))
    relaxed = relax(logits, patches, granularity, prefix)
    for row in range(3):
        expected, kept = spelled_out(logits[row], patches, granularity, prefix)
        assert relaxed.kept[row].item() == torch.tensor(expected, dtype=torch.float64).ceil().item()
        torch.testing.assert_close(relaxed.probability[row], torch.tensor(kept, dtype=torch.float64))


def test_candidates_fill_the_logits():
    for patches in (1, 5, 64, 196):
        for granularity in range(1, min(patches, 9) + 1):
            assert len(KeptNumber(patches, granularity, 1).logits) == len(range(patches, 0, -granularity))


def test_gradient_is_that_of_the_expectation():
    number = KeptNumber(20, 2, 1).double()
    with torch.no_grad():
        number.logits.normal_(generator=torch.Generator().manual_seed(0))
    number().backward()
    logits = number.logits.detach().clone().requires_grad_()
    (logits.softmax(0) * torch.arange(20.0, 0, -2, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(number.logits.grad, logits.grad)


def test_fixed_keeps_everything():
    number = KeptNumber(64, 4, 1, fixed=True)
    assert number.logits.shape == (1,)
    assert number().item() == 65
    assert relax(number.logits[None], 64, 4, 1).probability.tolist() == [[1.0] * 65]


def test_equal_logits_start_at_the_middle():
    assert KeptNumber(196, 1, 1)().item() == 100  # (1 + ... + 196) / 196 = 98.5, rounded up, and the class token
