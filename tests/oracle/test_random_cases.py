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
        metric = case.rng.choice(("cls_attn", "cls_attn", "image_attn", "cls_attn_v"))
        metric = "cls_attn" if tied else metric
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
        proportional = case.rng.random() < 0.7
        want = plain_logits(case, rules.tome, rates, proportional=proportional)
        assert_near(compressed_logits(case, tokcomp.ToMe(rates, prop_attn=proportional)), want, case.family)

    each_case(check)


def test_evit() -> None:
    def check(seed: int) -> None:
        tied = seed % 4 == 0
        case = Case(seed, family="class token" if tied else None, still="q" if tied else "")
        fuse = case.rng.random() < 0.7
        if seed % 2:
            rates = [case.rng.choice((1.0, case.rng.uniform(0.4, 1.0))) for _ in range(case.depth)]
            method, options = tokcomp.EViT(rates, fuse=fuse), {"keep_rates": rates}
        else:
            count = case.rng.randint(1, case.num_patches // 2)
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
