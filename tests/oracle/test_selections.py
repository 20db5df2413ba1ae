"""VisionZip, PiToMe, DivPrune, CDPruner, DToMe and ATS on random models in float64, as in ``test_random_cases``."""

from __future__ import annotations

import tokcomp

from tests.oracle import selection_rules as rules
from tests.oracle.cases import Case
from tests.oracle.checks import assert_near, each_case
from tests.oracle.test_random_cases import compressed_logits, plain_logits


def _rates(case: Case, least: float = 0.3) -> list[float]:
    return [case.rng.choice((1.0, case.rng.uniform(least, 1.0))) for _ in range(case.depth)]


def test_visionzip() -> None:
    def check(seed: int) -> None:
        case = Case(seed, family="class token" if seed % 4 == 0 else None, still="k" if seed % 4 == 0 else "")
        rates, contextual = _rates(case), case.rng.choice((10 / 64, case.rng.random(), 1.0))
        want = plain_logits(case, rules.visionzip, rates, contextual)
        method = tokcomp.VisionZip(rates, contextual=contextual)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


def test_pitome() -> None:
    def check(seed: int) -> None:
        case = Case(seed)
        rates = [case.rng.randint(0, case.num_patches // case.depth + 2) for _ in range(case.depth)]
        settings = case.rng.choice((0.9, 0.75, -0.2)), seed % 3 > 0, case.rng.choice((0.0, 0.5, 1.0))
        want = plain_logits(case, rules.pitome, rates, *settings)
        method = tokcomp.PiToMe(rates, *settings)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


def test_divprune_and_cdpruner() -> None:
    def check(seed: int) -> None:
        # As wide as there are tokens, so that no determinant is 0.
        case = Case(seed, shape=(3, 4, 2, 8))
        rates = _rates(case)
        for method, rule in ((tokcomp.DivPrune(rates), rules.divprune), (tokcomp.CDPruner(rates), rules.cdpruner)):
            want = plain_logits(case, rule, rates)
            assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


def test_dtome_and_ats() -> None:
    """Whose images, each alone in the plain functions, keep different numbers of tokens of one batch."""
    differ = []

    def check(seed: int) -> None:
        case = Case(seed)
        thresholds = [case.rng.choice((1.0, case.rng.uniform(0.2, 0.95))) for _ in range(case.depth)]
        proportional = seed % 3 > 0
        count, blocks = case.rng.randint(1, case.num_patches), case.rng.sample(range(case.depth), 2)
        for method, want in (
            (
                tokcomp.DToMe(thresholds, proportional),
                plain_logits(case, rules.dtome, thresholds, proportional),
            ),
            (tokcomp.ATS(count, blocks), plain_logits(case, rules.ats, count, blocks)),
        ):
            assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")
            first, second = tokcomp.trace(case.model, case.images)[-1]
            differ.append(first.max() != second.max())

    each_case(check)
    assert any(differ) or len(differ) < 8
