"""Samples of the operators over a partition of the caller's, for :mod:`tokcomp_kernels.testing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokcomp_kernels._sample_maker import Case, Maker


def _roles(m: Maker, batch: int, num_tokens: int, r: int) -> Tensor:
    """Random roles under which r tokens of each image can merge; the first stands aside."""
    role = m.integers(0, 3, batch, num_tokens)
    role[:, 0] = 0
    role[:, 1 : r + 1] = 1
    role[:, num_tokens - 1 :] = 2
    return role[:, torch.randperm(num_tokens, generator=m.generator).to(role.device)]


def bipartite_merge(make: Callable[[str], Maker], token_counts: Sequence[tuple[int, int]]) -> Iterator[Case]:
    for num_tokens, images in token_counts:
        m = make(f"N{num_tokens}")
        r = max(num_tokens - 2, 0) // 3
        x, metric, role = (
            m.randn(images, num_tokens, 5),
            m.randn(images, num_tokens, 16),
            _roles(m, images, num_tokens, r),
        )
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        if num_tokens not in (197, 257):
            yield f"N{num_tokens}", (x, metric, role, r), {}, False
        if num_tokens != 577:
            call = (m.strided(images, num_tokens, 5), m.strided(images, num_tokens, 16), role, r)
            yield f"N{num_tokens}-size-strided", call, {"size": size}, False
    m = make("others")
    x, metric, role, size = m.randn(2, 24, 5), m.randn(2, 24, 8), _roles(m, 2, 24, 7), m.per_token(2, 24, 0.5, 4.0)
    for average in ("mean", "sum"):
        yield f"prefix-{average}", (x, metric, role, 7), {"size": size, "average": average}, False
    yield "r0", (x, metric, role, 0), {"size": size}, False
    yield "too-few", (x, metric, role, 18), {"size": size}, True
    yield "no-destination", (x, metric, torch.ones_like(role), 5), {}, True
    yield "other-roles", (x, metric, role - 3 * (role == 0).long(), 7), {}, False
    yield "B0", (x[:0], metric[:0], role[:0], 4), {"size": size[:0]}, False
    yield "ties", (x, m.signs(2, 24, 6), role, 7), {"size": size}, True
    poor = size.clone()
    poor[:, ::3], poor[:, 1::3] = float("nan"), -1.0
    yield "bad-sizes", (x, m.signs(2, 24, 6), role, 7), {"size": poor}, True
    zeros = m.randn(2, 24, 8)
    zeros[:, 3:14] = 0
    yield "zero-vectors", (x, zeros, role, 5), {}, False
    yield "threshold", (x, metric, role, 7), {"size": size, "threshold": 0.3}, False
    alike = {"size": size, "average": "mean", "threshold": 0.5}  # cosines of signs are thirds
    yield "threshold-ties", (x, m.signs(2, 24, 6), role, 23), alike, True
    yield "threshold-no-destination", (x, metric, torch.ones_like(role), 5), {"threshold": -1.0}, True
    yield "threshold-r0", (x, metric, role, 0), {"threshold": 0.0}, False
    yield "threshold-B0", (x[:0], metric[:0], role[:0], 4), {"threshold": 0.0}, False


def select_diverse(make: Callable[[str], Maker], token_counts: Sequence[tuple[int, int]]) -> Iterator[Case]:
    for num_tokens, images in token_counts:
        m = make(f"N{num_tokens}")
        # Fewer than features are wide, so that what is left of a token by then is more than rounding.
        features, kept = m.randn(images, num_tokens, 32), min(num_tokens, 18)
        if num_tokens not in (197, 257):
            yield f"N{num_tokens}", (features, kept), {}, False
        if num_tokens != 577:
            call, relevance = (m.strided(images, num_tokens, 32), kept), m.per_token(images, num_tokens, 0.5)
            yield f"N{num_tokens}-dpp-strided", call, {"rule": "dpp", "relevance": relevance}, False
    m = make("others")
    features, relevance = m.randn(2, 24, 32), m.per_token(2, 24, 0.5)
    for prefix in (0, 3):
        yield f"prefix{prefix}", (features, 7), {"num_prefix_tokens": prefix}, False
    yield "prefix-alone", (features, 5), {"num_prefix_tokens": 5}, True
    yield "all", (features, 24), {}, False
    yield "transposed", (m.randn(2, 32, 24).mT, 7), {"rule": "dpp"}, False
    yield "B0", (features[:0], 7), {}, True
    yield "ties", (m.signs(2, 24, 6), 12), {}, True
    odd = relevance.clone()
    odd[:, 1:6] = torch.tensor([float("nan"), float("inf"), -1.0, 0.0, 1e-30])
    yield "ties-odd-relevance", (torch.ones_like(m.signs(2, 24, 4)), 8), {"rule": "dpp", "relevance": odd}, True
    zeros = m.randn(2, 24, 32)
    zeros[:, 3:12] = 0
    zeros[:, 12, 3], zeros[:, 13, 3] = float("nan"), float("inf")
    yield "zero-vectors", (zeros, 7), {"rule": "dpp"}, False
