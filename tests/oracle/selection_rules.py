"""VisionZip, PiToMe, DivPrune, CDPruner, DToMe and ATS on a plain ViT, one image at a time, as in ``rules``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracle.plain_vit import Attended, PlainViT
from tests.oracle.rules import by_importance, cosines, importance, into_odds, join, run


def visionzip(vit: PlainViT, image: Tensor, keep_rates: Sequence[float], contextual: float) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        groups = {token: [token] for token in range(len(x))}
        patches = len(x) - vit.num_prefix
        kept = math.ceil(keep_rates[block] * patches)
        if kept < patches:
            received = attended.map[:, 0].mean(0)
            targets = min(max(1, round(contextual * kept)), kept)
            order = by_importance(received.tolist(), vit.num_prefix)
            rest = sorted(order[vit.num_prefix + kept - targets :])
            chosen = rest[:: len(rest) // targets][:targets]
            metric = attended.keys.mean(0)
            join(groups, cosines(metric, metric), [token for token in rest if token not in chosen], chosen)
        return list(groups.values())

    return run(vit, image, rule)


def pitome(
    vit: PlainViT, image: Tensor, rates: Sequence[int], margin: float, proportional: bool, unprotected: float
) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        groups, first = {token: [token] for token in range(len(x))}, vit.num_prefix
        rate = min(rates[block], (len(x) - first) // 2)
        metric = attended.keys.mean(0)
        cosine, m = cosines(metric, metric), margin * (1 - block / vit.depth)
        energy = [0.0] * first
        for row in cosine[first:, first:].tolist():
            energy.append(sum(c - m if c > m else math.exp(c - m) - 1 for c in row) / len(row))
        alike = by_importance(energy, first)[first:]
        if block >= unprotected * vit.depth:
            alike = alike[: 2 * rate]
        sources, targets = alike[::2], alike[1::2]
        closest = sorted(sources, key=lambda token: (-float(cosine[token, targets].max()), token)) if rate else []
        join(groups, cosine, closest[:rate], targets)
        return list(groups.values())

    return run(vit, image, rule, by_size=True, proportional=proportional)


def divprune(vit: PlainViT, image: Tensor, keep_rates: Sequence[float]) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        cosine = cosines(x, x)
        # Of two tokens that are each other's nearest neither is ahead by its rounding.
        first, distance = vit.num_prefix, (1 - cosine.maximum(cosine.T)).tolist()
        patches, chosen = list(range(first, len(x))), []
        for _ in range(math.ceil(keep_rates[block] * len(patches))):
            others = chosen or patches
            left = [token for token in patches if token not in chosen]
            chosen.append(max(left, key=lambda token: min(distance[token][o] for o in others if o != token)))
        return [[token] for token in [*range(first), *sorted(chosen)]]

    return run(vit, image, rule)


def cdpruner(vit: PlainViT, image: Tensor, keep_rates: Sequence[float]) -> Tensor:
    """By determinants themselves."""

    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        first = vit.num_prefix
        received = attended.map[:, 0].mean(0)[first:]
        relevance = (received - received.min() + 1e-6) / (received.max() - received.min() + 1e-6)
        kernel = relevance[:, None] * cosines(x[first:], x[first:]) * relevance
        count, chosen = math.ceil(keep_rates[block] * len(received)), []
        for _ in range(count if count < len(received) else 0):
            left = [token for token in range(len(received)) if token not in chosen]
            chosen.append(max(left, key=lambda one: float(torch.linalg.det(kernel[[*chosen, one]][:, [*chosen, one]]))))
        stay = sorted(chosen) if count < len(received) else range(len(received))
        return [[token] for token in [*range(first), *(first + token for token in stay)]]

    return run(vit, image, rule)


def dtome(vit: PlainViT, image: Tensor, thresholds: Sequence[float], proportional: bool) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        metric = attended.keys.mean(0)
        return into_odds(cosines(metric, metric), vit.num_prefix, lambda best: best > thresholds[block])

    return run(vit, image, rule, by_size=True, proportional=proportional)


def ats(vit: PlainViT, image: Tensor, num_samples: int, blocks: Sequence[int]) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        first, stay = vit.num_prefix, set(range(len(x)))
        if block in blocks:
            scores = importance("cls_attn_v", attended)[first:]
            order = sorted(range(len(scores)), key=lambda token: (scores[token], token))
            sums = list(itertools.accumulate(scores[token] for token in order))
            sums = [(one - sums[0]) / max(sums[-1] - sums[0], 1e-300) for one in sums]
            start = min((one for one in sums if one > 0), default=1.0)
            stay = set(range(first))
            for sample in range(num_samples):
                level = start + (1 - start) * sample / (num_samples - 1) if num_samples > 1 else 1.0
                stay.add(first + order[min(range(len(sums)), key=lambda place: abs(sums[place] - level))])
        return [[token] for token in sorted(stay)]

    return run(vit, image, rule)
