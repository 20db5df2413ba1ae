"""DynamicViT, SPViT, Evo-ViT and A-ViT on random models in float64, as in ``test_random_cases``."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from tokcomp import learned
from tokcomp.blocks.passages import watched_passages

from tests.oracle import learned_rules as rules
from tests.oracle.cases import FAMILIES, Case
from tests.oracle.checks import assert_near, each_case
from tests.oracle.test_random_cases import compressed_logits, plain_logits


def prepared(kind: type, seed: int) -> tuple[Case, tokcomp.Method, rules.Scorer, dict[int, int]]:
    """A model with lively parts, the method, the plain functions' scores, and how many go into which block."""
    case = Case(seed, family=sorted(set(FAMILIES) - {"pooled"})[seed % (len(FAMILIES) - 1)])
    blocks = sorted(case.rng.sample(range(case.depth), case.rng.randint(1, case.depth)))
    rate = case.rng.uniform(0.4, 1.0)
    method = kind(rate, blocks)
    learned.attach(case.model, method)
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            if name.startswith(f"{method.name}."):
                noise = case.randn(*parameter.shape)
                # No livelier: probabilities that round to 1 are tied.
                parameter.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else noise / parameter.shape[-1] ** 0.5)
    weights = {name: value.clone() for name, value in case.model.state_dict().items()}
    scorer = (
        rules.dynamicvit_scorer(weights)
        if kind is tokcomp.DynamicViT
        else rules.spvit_scorer(weights, case.plain.num_heads)
    )
    steps = {block: max(1, int(case.num_patches * rate ** (k + 1))) for k, block in enumerate(blocks)}
    return case, method, scorer, steps


@pytest.mark.parametrize("kind", [tokcomp.DynamicViT, tokcomp.SPViT])
def test_inference(kind: type) -> None:
    def check(seed: int) -> None:
        case, method, scorer, steps = prepared(kind, seed)
        want = plain_logits(case, rules.dropped, scorer, steps, kind is tokcomp.SPViT)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


@pytest.mark.parametrize("kind", [tokcomp.DynamicViT, tokcomp.SPViT])
def test_training(kind: type) -> None:
    """With the decisions that were drawn."""

    def check(seed: int) -> None:
        case, method, scorer, steps = prepared(kind, seed)
        tokcomp.compress(case.model, method).train()
        with torch.no_grad(), watched_passages() as passages:
            have = case.model(case.images)
        (passage,) = passages
        for number, image in enumerate(case.images):
            drawn = {block: one[number] for block, one in zip(steps, passage.decisions, strict=True)}
            if any(not one.any() for one in drawn.values()):
                continue  # nothing is left to take a mean of
            want = rules.masked(case.plain, image, scorer, drawn, kind is tokcomp.SPViT)
            assert_near(logits_of(have, number, case), want, f"{case.family}, {method}")

    each_case(check)


def test_evovit() -> None:
    """Training differs from inference in nothing."""

    def check(seed: int) -> None:
        case = Case(seed)
        blocks = sorted(case.rng.sample(range(1, case.depth), case.rng.randint(1, case.depth - 1)))
        rate, momentum = case.rng.uniform(0.2, 1.0), case.rng.uniform(0.1, 1.0)
        settings = rate, blocks, momentum, seed % 3 > 0
        want = plain_logits(case, rules.evovit, *settings)
        have = compressed_logits(case, tokcomp.EvoViT(*settings))
        assert_near(have, want, f"{case.family}, {settings}")
        with torch.no_grad():
            trained = case.model.train()(case.images)
        assert_near(torch.stack([logits_of(trained, n, case) for n in range(2)]), want, f"{case.family}, {settings}")

    each_case(check)


def test_avit() -> None:
    """Training differs from inference in nothing; images of a batch keep different numbers of tokens."""

    def check(seed: int) -> None:
        case = Case(seed, family=sorted(set(FAMILIES) - {"pooled"})[seed % (len(FAMILIES) - 1)])
        scale, shift = case.rng.uniform(0.5, 3), case.rng.uniform(-2, 0)
        threshold = case.rng.uniform(0.3, 0.99)
        method = tokcomp.AViT(threshold, scale, shift)
        tokcomp.compress(learned.attach(case.model, method), method)
        found = [rules.avit(case.plain, image, scale, shift, threshold) for image in case.images]
        want, ponder = torch.stack([logits for logits, _ in found]), torch.tensor([one for _, one in found]).double()
        with torch.no_grad():
            assert_near(case.model(case.images), want, f"{case.family}, {method}")
            with watched_passages() as passages:
                trained = case.model.train()(case.images)
        assert_near(torch.stack([logits_of(trained, n, case) for n in range(2)]), want, f"{case.family}, {method}")
        torch.testing.assert_close(passages[0].ponder, ponder, rtol=1e-6, atol=1e-6)

    each_case(check)


def logits_of(have: object, number: int, case: Case) -> torch.Tensor:
    """A distilled model in training answers with both heads, of which inference takes the mean."""
    answers = have if isinstance(have, tuple) else (have,)
    return torch.stack([answer[number] for answer in answers]).mean(0)
