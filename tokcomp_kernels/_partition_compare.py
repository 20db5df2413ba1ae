"""Whether bipartite_merge and select_diverse chose rightly: as ``compare``, for the operators over a partition."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels import reference
from tokcomp_kernels._rounding import assert_within_rounding, cosine_slack
from tokcomp_kernels.reference._common import cosine, effective_size
from tokcomp_kernels.testing import Sample


def _arguments(sample: Sample) -> dict[str, Any]:
    bound = inspect.signature(reference.REFERENCES[sample.op]).bind(*sample.args, **sample.kwargs)
    bound.apply_defaults()
    return bound.arguments


def compare_bipartite_merge(sample: Sample, x_out: Tensor, size_out: Tensor, source: Tensor) -> None:
    given = _arguments(sample)
    x, metric, role, r, threshold = (given[name] for name in ("x", "metric", "role", "r", "threshold"))
    num_kept = x.shape[1] - r if threshold is None else x.shape[1]
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[2]
        assert torch.equal(source, want), f"{sample.id}: source differs from the reference's"
    else:
        _assert_matched(metric, role, r, threshold, source)

    def given_source(call: Sample) -> tuple[Tensor, ...]:
        x, size = call.args[0], call.kwargs.get("size")
        size = torch.ones_like(x[..., 0]) if size is None else effective_size(size, x.dtype)
        weight = size if given["average"] == "size" else torch.ones_like(size)
        slots = torch.nn.functional.one_hot(source.clamp_min(0), max(num_kept, 1)).to(x.dtype)  # [B, N, M]
        slots = torch.where((source >= 0)[:, :, None], slots, 0.0)[..., :num_kept]
        divisor = (slots * weight[:, :, None]).sum(1) if given["average"] != "sum" else torch.ones_like(slots[:, 0])
        total = (slots * weight[:, :, None]).mT @ x
        used = slots.sum(1) > 0  # the others are padding
        size = torch.where(used, effective_size((slots * size[:, :, None]).sum(1), x.dtype), 0.0)
        return torch.where(used[:, :, None], total / divisor[:, :, None], 0.0), size, source

    assert_within_rounding(sample, given_source, (x_out, size_out, source))
    for image, slot in (source[:, :, None] == torch.arange(num_kept, device=x.device)).sum(1).eq(1).nonzero().tolist():
        token = int((source[image] == slot).nonzero())
        assert torch.equal(x_out[image, slot], x[image, token]), "a token that nothing merged into must be a copy"


def _assert_matched(metric: Tensor, role: Tensor, r: int, threshold: float | None, source: Tensor) -> None:
    """Image by image, in plain Python; every image has r sources and a destination."""
    slack = cosine_slack(metric)
    for features, roles, slots in zip(metric.double(), role, source, strict=True):
        sources, destinations = (roles == 1).nonzero().flatten(), (roles == 2).nonzero().flatten()
        stays = [n for n in range(len(roles)) if n not in sources.tolist()]
        if r == 0:
            assert slots.tolist() == list(range(len(roles))), "r = 0 leaves every token where it is"
            continue
        similarity = cosine(features[None, sources], features[None, destinations])[0]
        best = similarity.amax(1)
        merged = torch.isin(slots[sources], slots[destinations])
        number = int(merged.sum())
        counts = torch.bincount(slots[slots >= 0], minlength=len(roles) - number)
        assert number == r or (threshold is not None and number < r), "r sources must merge, or fewer by a threshold"
        assert bool((counts > 0).all()), "the slots in front must all be taken"
        if threshold is not None:
            assert bool((best[merged] > threshold - slack).all()), "what merges must be above the threshold"
            assert number == r or bool((best[~merged] <= threshold + slack).all()), "what is above it must merge"
        remaining = sorted([*stays, *sources[~merged].tolist()])
        assert slots[remaining].tolist() == list(range(len(remaining))), "the others keep their order"
        own_slot = slots[destinations]
        for i in merged.nonzero().flatten().tolist():
            chosen = similarity[i, own_slot == slots[sources[i]]]
            assert bool((chosen >= best[i] - slack).all()), "a merged token must go to its most similar"
        if bool((~merged).any()):
            assert float(best[merged].min()) >= float(best[~merged].max()) - 2 * slack, "the most similar must merge"


def compare_select_diverse(sample: Sample, order: Tensor) -> None:
    given = _arguments(sample)
    features, prefix = given["features"].double(), given["num_prefix_tokens"]
    places = torch.arange(features.shape[1], device=order.device)
    assert order.shape == (features.shape[0], given["num_kept"])
    assert torch.equal(order[:, :prefix], places[:prefix].expand(len(order), -1)), "the prefix comes first"
    for image, chosen in enumerate(order[:, prefix:].tolist()):
        assert len(set(chosen)) == len(chosen) and all(prefix <= token < len(places) for token in chosen)
        if not sample.exact:
            wanted = None if given["relevance"] is None else given["relevance"][image].double()
            _assert_greedy(features[image], chosen, prefix, wanted, given["rule"], cosine_slack(given["features"]))
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)
        assert torch.equal(order, want), f"{sample.id}: ties must go to the lower index"


def _assert_greedy(
    features: Tensor, chosen: list[int], prefix: int, relevance: Tensor | None, rule: str, slack: float
) -> None:
    """Each token was the best of those left, given those before it; determinants by a solve, not by Cholesky rows."""
    similarity = cosine(features[None], features[None])[0]
    kernel = similarity if relevance is None else relevance[:, None] * similarity * relevance[None]
    for step, token in enumerate(chosen):
        before, allowed = chosen[:step], slack
        left = [n for n in range(prefix, len(features)) if n not in before]
        if rule == "farthest":
            others = similarity.clone().fill_diagonal_(-1.0)[:, prefix:] if step == 0 else similarity[:, before]
            score = 1 - others.amax(1)
        else:
            score = kernel.diagonal().clone()
            if before:
                across = kernel[before]  # [S, N]
                solved = torch.linalg.solve(kernel[before][:, before], across)
                score = score - (across * solved).sum(0)
                # An error of E in the kernel changes a Schur complement by (1 + |w|_1)^2 |E|, w = L_SS^-1 L_Si.
                allowed = slack * float((1 + solved[:, left].abs().sum(0)).square().max())
        assert float(score[token]) >= float(score[left].max()) - 2 * allowed, f"token {token} at step {step}"
