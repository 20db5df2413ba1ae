"""Agreement with the published search, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokcomp import DiffRateSearch

from tests.drawn import draws_what_was_recorded, recorded

RELATIVE = 1e-7


class Expected:
    def __init__(self) -> None:
        self.tensors, self.settings = recorded("search")


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


@pytest.fixture
def search(published, expected) -> DiffRateSearch:
    search = DiffRateSearch(published.model().double(), expected.settings["granularity"]).double().eval()
    search.load_proxy_state(
        {
            f"{name}.logits": expected.tensors[f"logits.{name}"].double()
            for name in (f"{step}.{block}" for step in ("prune", "merge") for block in range(6))
        }
    )
    return search


def assert_gradients(search, expected, which):
    for step in ("prune", "merge"):
        for block, number in enumerate(getattr(search, step)):
            gradient = torch.zeros_like(number.logits) if number.logits.grad is None else number.logits.grad
            # What is not in the published graph has no gradient.
            wanted = expected.tensors.get(f"{which}.{step}.{block}", torch.zeros_like(gradient))
            assert (gradient - wanted).norm() <= RELATIVE * wanted.norm() + 1e-18, f"{step}.{block}"


def test_kept_numbers(search, expected):
    schedule = search.schedule()
    assert schedule.num_prune_kept == expected.settings["kept_prune"]
    assert schedule.num_merge_kept == expected.settings["kept_merge"]


@draws_what_was_recorded
def test_logits_and_flops(search, expected, published):
    logits, flops = search(published.images.double())
    torch.testing.assert_close(logits, expected.tensors["logits"], rtol=RELATIVE, atol=RELATIVE)
    assert flops.ndim == 0
    assert flops.item() == expected.tensors["flops"].item()
    loss = F.cross_entropy(logits, expected.tensors["labels"])
    assert loss.item() == pytest.approx(expected.tensors["ce"].item(), rel=RELATIVE)


@draws_what_was_recorded
@pytest.mark.parametrize("which", ["grad_ce", "grad_total", "grad_flops_G"])
def test_gradients(search, expected, published, which):
    logits, flops = search(published.images.double())
    if which == "grad_flops_G":
        (flops / 1e9).backward()
    else:
        loss = F.cross_entropy(logits, expected.tensors["labels"])
        if which == "grad_total":
            over = flops / 1e9 - expected.settings["target_gflops"]
            loss = loss + expected.settings["lambda"] * over.square()
        loss.backward()
    assert_gradients(search, expected, which)


def test_dropping_the_clamp_matters(published, expected):
    """At equal counts the clamp of sizes alone moves the published logits by some tenths."""
    logits = []
    for match_inference in (False, True):
        search = DiffRateSearch(published.model().double(), 1, match_inference=match_inference).double().eval()
        for step in ("prune", "merge"):
            for block, number in enumerate(getattr(search, step)):
                number.logits.data.copy_(expected.tensors[f"logits.{step}.{block}"])
        logits.append(search(published.images.double())[0])
    assert (logits[0] - logits[1]).abs().max() > 0.1
