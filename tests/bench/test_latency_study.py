"""Time as the budget: the staircase rule, and speeds at equal accuracy."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from tokcomp.budgets import LatencyTable

from benchmarks.reproduce.pretrained.latency_page import speed_at
from benchmarks.reproduce.pretrained.one_more_token import BLOCK, AtRandom, OneMoreToken, tokens_of_most_use
from tests.bench.toys import make_vit


def table() -> LatencyTable:
    """Steps of eight tokens: 1 ms in a block up to 8 tokens, 2 up to 16, 3 with 17."""
    counts = [8, 9, 16, 17]
    none = [0.0] * 4
    times = {"attention_ms": [1.0, 2.0, 2.0, 3.0], "reduce_ms": none, "mlp_ms": none, "head_ms": none}
    return LatencyTable(3, 17, 1, {}, 1, "float32", 0.0, counts, **times)


def test_one_more_token_leads_to_the_lower_step() -> None:
    """9 tokens take as long as 16, and 8 half of that."""
    top1 = {17: 80.0, 16: 79.0, 9: 60.0, 8: 59.0}
    assert tokens_of_most_use(table(), top1) == 8
    assert tokens_of_most_use(table(), top1, alpha=0.3) == 16
    assert tokens_of_most_use(table(), top1, alpha=0) == 17


@torch.no_grad()
def test_the_mean_of_the_pruned_stays() -> None:
    model = make_vit()
    method = OneMoreToken(8, 16)
    assert method.num_left_out == 7 and OneMoreToken(17, 16).assign(BLOCK, 17, 1) is None
    assert method.assign(0, 17, 1) is None and method.assign(BLOCK, 17, 1).num_tokens_out == 10
    x, score = torch.randn(2, 17, 4), torch.rand(2, 17)
    found = method.reduce(x, score, method.assign(BLOCK, 17, 1), size=None, num_prefix_tokens=1)
    for image in range(2):
        pruned = score[image, 1:].argsort()[:8] + 1
        assert torch.equal(found.source[image, pruned], torch.full((8,), 9))
        torch.testing.assert_close(found.x[image, 9], x[image, pruned].mean(0))
    with pytest.raises(ValueError, match="model must have more than 3 blocks, got 3"):
        tokcomp.compress(model, method)


@torch.no_grad()
def test_tokens_left_out_at_random() -> None:
    model, images = make_vit(), torch.randn(2, 3, 32, 32)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].shape[1]))
    torch.testing.assert_close(AtRandom(model, 17)(images), model(images))
    assert AtRandom(model, 6)(images).shape == (2, 5) and seen == [17, 17, 6]


def test_speed_at_an_accuracy() -> None:
    points = [(80.0, 10.0), (60.0, 40.0), (78.0, 30.0), (79.0, 20.0)]
    assert speed_at(points, 79.5) == "15" and speed_at(points, 78.0) == "30" and speed_at(points, 69.0) == "35"
    assert speed_at(points, 50.0) == "> 40"
