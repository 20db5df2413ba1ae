"""What the operators over a partition of the caller's refuse, and in which words: as ``_checks``, for the others."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checks import (
    _require_floats,
    _require_metric,
    _require_per_token,
    _require_places,
    _require_prefix,
    _require_size,
    refuse,
)

#: How bipartite_merge makes one token of a group.
AVERAGES = ("size", "mean", "sum")
#: What select_diverse calls diverse.
RULES = ("farthest", "dpp")


def check_bipartite_merge(
    x: Tensor,
    metric: Tensor,
    role: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    average: str = "size",
    threshold: float | None = None,
) -> None:
    op = "bipartite_merge"
    _require_floats(op, "x", x, "[B, N, C]")
    batch, num_tokens, _ = x.shape
    _require_metric(op, metric, x)
    _require_places(op, "role", role, "x", x)
    _require_size(op, size, "x", x, (batch, num_tokens))
    most = num_tokens - 1 if num_tokens > 0 else 0
    if r < 0 or r > most:
        refuse(op, "r", f"be between 0 and {most}, so that a destination is left", r)
    if average not in AVERAGES:
        refuse(op, "average", f"be one of {', '.join(AVERAGES)}", repr(average))
    if threshold is not None and not -1 <= threshold <= 1:
        refuse(op, "threshold", "be between -1 and 1, as cosines are", threshold)


def check_select_diverse(
    features: Tensor,
    num_kept: int,
    *,
    relevance: Tensor | None = None,
    num_prefix_tokens: int = 1,
    rule: str = "farthest",
) -> None:
    op = "select_diverse"
    _require_floats(op, "features", features, "[B, N, K]")
    batch, num_tokens, _ = features.shape
    if rule not in RULES:
        refuse(op, "rule", f"be one of {', '.join(RULES)}", repr(rule))
    if relevance is not None:
        if rule != "dpp":
            refuse(op, "relevance", "be None for the rule 'farthest', which asks for distances alone", "a tensor")
        _require_per_token(op, "relevance", relevance, "features", features, (batch, num_tokens))
    _require_prefix(op, num_prefix_tokens, num_tokens)
    if num_kept < num_prefix_tokens or num_kept > num_tokens:
        refuse(op, "num_kept", f"be between num_prefix_tokens ({num_prefix_tokens}) and {num_tokens} tokens", num_kept)
