"""Random models, images and schedules in float64: tokcomp against the plain functions of this folder.

Every run draws new cases; a disagreement names the seed that repeats it. Two variables of the environment, which
``make oracle CASES=500`` sets: TOKCOMP_ORACLE_CASES, of each kind, and TOKCOMP_ORACLE_SEED, of the first case.
"""

from __future__ import annotations

from collections.abc import Callable

import tokcomp
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import rules
from tests.oracle.cases import Case
from tests.oracle.checks import assert_near, each_case

METRICS = ("cls_attn", "image_attn", "cls_attn_v")
PIPELINES = ("prune_merge", "merge_prune", "prune", "merge")


def plain_logits(case: Case, function: Callable[..., Tensor], *args: object, **options: object) -> Tensor:
    with torch.no_grad():
        return torch.stack([function(case.plain, image, *args, **options) for image in case.images])


def compressed_logits(case: Case, method: tokcomp.Method) -> Tensor:
    with torch.no_grad():
        return tokcomp.compress(case.model, method)(case.images)


def test_diffrate() -> None:
    def check(seed: int) -> None:
        pipeline = PIPELINES[seed % 4]
        tied = seed % 8 == 2  # which prunes alone: sizes would break the tie by their rounding
        case = Case(seed, family="class token" if tied else None, still="q" if tied else "")
        metric = "cls_attn" if tied else METRICS[seed % 3]
        prune, merge = case.falling_counts(), case.falling_counts()
        method = tokcomp.DiffRate(tokcomp.CompressionSchedule(prune, merge), metric=metric, pipeline=pipeline)
        want = plain_logits(case, rules.diffrate, prune, merge, metric=metric, pipeline=pipeline)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {metric}, {pipeline}")

    each_case(check)


def test_tome() -> None:
    def check(seed: int) -> None:
        tied = seed % 4 == 0  # keys of zero: every pair is as good as any other
        case = Case(seed, family="class token" if tied else None, still="k" if tied else "")
        rates = [case.rng.randint(0, case.num_patches // case.depth + 2) for _ in range(case.depth)]
        if seed % 4 == 1:
            rates = [case.rng.choice((rates[0], 2 * case.num_patches))] * case.depth  # more than can merge
        method = tokcomp.ToMe(rates[0] if seed % 4 == 1 else rates, prop_attn=seed % 3 > 0)
        want = plain_logits(case, rules.tome, rates, proportional=seed % 3 > 0)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


def test_evit() -> None:
    def check(seed: int) -> None:
        tied = seed % 4 == 0
        case = Case(seed, family="class token" if tied else None, still="q" if tied else "")
        fuse = seed % 3 > 0
        rates = [case.rng.choice((1.0, case.rng.uniform(0.4, 1.0))) for _ in range(case.depth)]
        count = case.rng.choice((case.rng.randint(1, case.num_patches // 2), 2 * case.num_patches))
        if seed % 4 == 1:
            method, options = tokcomp.EViT(rates, fuse=fuse), {"keep_rates": rates}
        elif seed % 4 == 2:
            rate, blocks = min(rates), case.rng.sample(range(case.depth), 2)
            method = tokcomp.EViT(rate, blocks=blocks, fuse=fuse)
            options = {"keep_rates": [rate if block in blocks else 1.0 for block in range(case.depth)]}
        else:
            method, options = tokcomp.EViT(num_pruned=count, fuse=fuse), {"num_pruned": count}
        want = plain_logits(case, rules.evit, fuse=fuse, **options)
        assert_near(compressed_logits(case, method), want, f"{case.family}, {method}")

    each_case(check)


def test_tocom() -> None:
    """Logits with the plugin folded in, and the gradients of its matrices where it is applied."""

    def check(seed: int) -> None:
        case = Case(seed)
        rank, top = case.rng.randint(1, 3), case.rng.randint(2, 6)
        plugin = tokcomp.ToCom(case.model, rank=rank, max_degree=top)
        names = ("q_down", "q_up", "v_down", "v_up")
        with torch.no_grad():
            for name in names:
                for matrix in getattr(plugin, name):
                    matrix.copy_(case.randn(*matrix.shape))
        source, target = case.rng.sample(range(top + 1), 2)
        scale = case.rng.choice((0.1, 0.03))
        matrices = {name: [m.detach().clone().requires_grad_() for m in getattr(plugin, name)] for name in names}
        moved = rules.with_tocom(case.plain, matrices, source, target, scale=scale, rank=rank)
        want = torch.stack([rules.tome(moved, image, [target] * case.depth) for image in case.images])
        F.cross_entropy(want, case.labels).backward()

        model = tokcomp.compress(case.model, tokcomp.ToMe(target))
        with plugin.applied(model, source, target, scale):
            F.cross_entropy(model(case.images), case.labels).backward()
        for name in names:
            least = max(float(matrix.grad.norm()) for matrix in matrices[name])
            for ours, theirs in zip(getattr(plugin, name), matrices[name], strict=True):
                assert_near(ours.grad, theirs.grad, f"{case.family}, {source} -> {target}, {name}", least=least)
        plugin.fold(model, source=source, target=target, scale=scale)
        with torch.no_grad():
            assert_near(model(case.images), want.detach(), f"{case.family}, {source} -> {target}")

    each_case(check)
