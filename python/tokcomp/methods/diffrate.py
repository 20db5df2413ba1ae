"""DiffRate (ICCV 2023): prune the least important tokens and merge the next ones, by a searched schedule."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcomp.methods.base import (
    Assignment,
    Evidence,
    Geometry,
    Method,
    Norm,
    Reduced,
    flag,
    integer,
    most_important,
    require_class_token,
    require_depth,
    require_tokens,
)
from tokcomp.schedule import CompressionSchedule, published_schedule

#: metric -> the evidence it needs from attention.
METRICS = {
    "cls_attn": frozenset({"cls_attn"}),
    "image_attn": frozenset({"image_attn"}),
    "cls_attn_v": frozenset({"cls_attn", "values"}),
    "random": frozenset[str](),
}
PIPELINES = ("prune_merge", "merge_prune", "prune", "merge")


class Settings(NamedTuple):
    """Arguments of :class:`DiffRate` that a model's kind suggests."""

    metric: str
    pipeline: str
    similarity_weighted_size: bool


def published_settings(geometry: Geometry) -> Settings:
    """What was published for models of this geometry: hierarchical ones merge only.

    Without a class token it is the attention received that ranks, as published for hierarchical models.
    """
    metric = "cls_attn" if geometry.has_class_token else "image_attn"
    if geometry.spreads_tokens:
        return Settings(metric, "merge", similarity_weighted_size=False)
    return Settings(metric, "prune_merge", similarity_weighted_size=True)


class DiffRate(Method):
    """Pruning and merging by token importance.

    Every step keeps the number of tokens that the schedule gives for it. ``prune_merge`` prunes to ``num_prune_kept``
    and then merges to ``num_merge_kept``; ``merge_prune`` merges to ``num_merge_kept`` and then prunes to
    ``num_prune_kept``; ``prune`` and ``merge`` read only their own list. A merged token takes the place, and so the
    importance, of the kept token it was merged into.

    The arguments after the schedule default to what the schedule's ``method`` says, and otherwise to the first value
    listed here; the metric then is ``image_attn`` for a model without a class token.

    Args:
        schedule: tokens to keep per block.
        metric: importance of a token: ``cls_attn``, the class token's attention to it, mean over heads (Eq. 6);
            ``image_attn``, the attention it receives, mean over heads and all queries; ``cls_attn_v``, the first times
            the norm of its value vector over all heads; ``random``, a fixed pseudo-random order of positions, the same
            for every image.
        pipeline: ``prune_merge``, ``merge_prune``, ``prune`` or ``merge``.
        seed: the seed of the ``random`` metric (default: 0).
        similarity_weighted_size: True: a merged token adds its size times its cosine similarity, as published for
            ViTs; False: its whole size.

    Raises:
        ValueError: the schedule is another method's, unknown metric or pipeline, a pipeline whose list the schedule
            does not have, or an argument that contradicts the schedule's ``method``.
    """

    proportional_attention = True

    def __init__(
        self,
        schedule: CompressionSchedule,
        metric: str | None = None,
        pipeline: str | None = None,
        seed: int | None = None,
        similarity_weighted_size: bool | None = None,
    ) -> None:
        if not isinstance(schedule, CompressionSchedule):
            raise TypeError(f"schedule must be a CompressionSchedule, got {type(schedule).__name__}")
        if schedule.method_name != "diffrate":
            raise ValueError(
                f"schedule must be for DiffRate, got one for {schedule.method_name}; "
                "tokcomp.methods.scheduled(schedule) makes its method"
            )
        self._metric_is_open = metric is None and "metric" not in (schedule.method or {})
        metric = _setting(schedule, "metric", metric, "cls_attn")
        pipeline = _setting(schedule, "pipeline", pipeline, "prune_merge")
        if not isinstance(metric, str) or metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
        if pipeline not in PIPELINES:
            raise ValueError(f"pipeline must be one of {', '.join(PIPELINES)}, got {pipeline!r}")
        for name in ("prune", "merge"):
            if name in pipeline and getattr(schedule, f"num_{name}_kept") is None:
                raise ValueError(f"pipeline {pipeline!r} needs num_{name}_kept, which the schedule does not have")
        self.schedule = schedule
        self.metric = metric
        self.pipeline = pipeline
        self.seed = integer("seed", _setting(schedule, "seed", seed, 0))
        weighted = _setting(schedule, "similarity_weighted_size", similarity_weighted_size, True)
        self.similarity_weighted_size = flag("similarity_weighted_size", weighted)
        self.needs = METRICS[metric]

    def __repr__(self) -> str:
        return f"DiffRate(metric={self.metric!r}, pipeline={self.pipeline!r}, schedule={self.schedule})"

    @classmethod
    def published(cls, name: str, gflops: float, num_tokens: int | None = None) -> DiffRate:
        """The published schedule for a timm model and a budget in GFLOPs (multiply-adds); see ``published_budgets``.

        Args:
            name, gflops: as published, for images of 224 x 224 pixels.
            num_tokens: tokens of the model at another image size, prefix included: 577 for 384 x 384 in patches of 16.
                The schedule is then :meth:`CompressionSchedule.rescaled`.

        Raises:
            TypeError: the name is not a string.
            ValueError: nothing was published for that name or budget; the message lists what was.
        """
        schedule = published_schedule(name, gflops)
        return cls(schedule if num_tokens is None else schedule.rescaled(num_tokens))

    def _counts(self, block: int, num_tokens: int) -> tuple[int, int]:
        prune, merge = self.schedule.num_prune_kept, self.schedule.num_merge_kept
        num_prune_kept = prune[block] if prune is not None and "prune" in self.pipeline else num_tokens
        num_merge_kept = merge[block] if merge is not None and "merge" in self.pipeline else num_tokens
        return num_prune_kept, num_merge_kept

    def validate(self, geometry: Geometry) -> None:
        require_depth("schedule", len(self.schedule), geometry, hint="; search one for this depth (tokcomp search)")
        if geometry.num_tokens is not None:
            self.check_tokens(geometry.num_tokens, geometry.num_prefix_tokens)
        if "cls_attn" in self.needs and not self._metric_is_open:
            require_class_token(f"metric {self.metric!r}", geometry, 'metric="image_attn" or ToMe')
        prefix = geometry.num_prefix_tokens
        alive = geometry.num_tokens
        for block in range(geometry.depth):
            unlimited = 1 << 62 if alive is None else alive
            num_prune_kept, num_merge_kept = self._counts(block, unlimited)
            if num_prune_kept < min(prefix, unlimited):
                raise ValueError(f"num_prune_kept[{block}] must keep the {prefix} prefix tokens, got {num_prune_kept}")
            arriving = min(unlimited, num_prune_kept) if self.pipeline == "prune_merge" else unlimited
            if num_merge_kept < arriving and num_merge_kept <= prefix:
                raise ValueError(
                    f"num_merge_kept[{block}] must be above the {prefix} prefix tokens, or no token is left to merge "
                    f"into, got {num_merge_kept}"
                )
            if alive is not None:
                alive = min(alive, num_prune_kept, num_merge_kept)

    def fitted(self, geometry: Geometry) -> DiffRate:
        if not self._metric_is_open:
            return self
        fitted = copy.copy(self)
        fitted.metric, fitted._metric_is_open = published_settings(geometry).metric, False
        fitted.needs = METRICS[fitted.metric]
        return fitted

    def for_tokens(self, num_tokens: int, num_prefix_tokens: int) -> DiffRate:
        """By the schedule's shares of the patches. ValueError if it does not know its own ``num_tokens``."""
        if num_tokens == self.schedule.num_tokens:
            return self
        method = copy.copy(self)
        method.schedule = self.schedule.rescaled(num_tokens, num_prefix_tokens)
        return method

    def check_tokens(self, num_tokens: int, num_prefix_tokens: int) -> None:
        schedule = self.schedule
        made_for = None if schedule.num_tokens is None else (schedule.num_tokens, schedule.num_prefix_tokens)
        require_tokens(made_for, num_tokens, num_prefix_tokens)

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        num_prune_kept, num_merge_kept = self._counts(block, num_tokens)
        left = min(num_prune_kept, num_merge_kept)
        if left >= num_tokens:
            return None
        return Assignment(min(num_prune_kept, num_tokens), min(num_merge_kept, num_tokens), left)

    @property
    def averages_heads(self) -> bool:  # type: ignore[override]
        return self.metric == "cls_attn"

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return score_tokens(self.metric, evidence, block, x, self.seed)

    def kept_places(self, score: Tensor, source: Tensor, num_tokens_out: int, num_prefix_tokens: int) -> Tensor:
        """A slot belongs to the token of its rank; what merged into it takes its place."""
        return most_important(score, num_tokens_out, num_prefix_tokens)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        counts = self._operator_counts(assignment, x.shape[1])
        x, new_size, source = torch.ops.tokcomp.prune_merge(
            x,
            score,
            *counts,
            size=size,
            num_prefix_tokens=num_prefix_tokens,
            similarity_weighted_size=self.similarity_weighted_size,
        )
        return self._pruned_last(Reduced(x, _known(new_size, size, counts), source), assignment)

    def reduce_norm(
        self,
        x: Tensor,
        branch: Tensor,
        score: Tensor,
        assignment: Assignment,
        *,
        size: Tensor | None,
        num_prefix_tokens: int,
        norm: Norm,
    ) -> tuple[Reduced, Tensor]:
        counts = self._operator_counts(assignment, x.shape[1])
        x, normalized, new_size, source = torch.ops.tokcomp.prune_merge_norm(
            x,
            branch,
            score,
            *counts,
            norm.weight,
            norm.bias,
            size=size,
            num_prefix_tokens=num_prefix_tokens,
            similarity_weighted_size=self.similarity_weighted_size,
            norm_eps=norm.eps,
        )
        reduced = self._pruned_last(Reduced(x, _known(new_size, size, counts), source), assignment)
        return reduced, normalized[:, : reduced.x.shape[1]]

    def _operator_counts(self, assignment: Assignment, num_tokens: int) -> tuple[int, int]:
        """num_prune_kept and num_merge_kept for the operator, which prunes first."""
        before_merge = num_tokens if self.pipeline == "merge_prune" else assignment.num_prune_kept
        return before_merge, assignment.num_merge_kept

    def _pruned_last(self, reduced: Reduced, assignment: Assignment) -> Reduced:
        """The merged tokens that are left when pruning comes second."""
        x, size, source = reduced
        num_kept = assignment.num_prune_kept
        if self.pipeline != "merge_prune" or num_kept >= x.shape[1]:
            return reduced
        return Reduced(
            x[:, :num_kept],
            None if size is None else size[:, :num_kept],
            source.masked_fill(source >= num_kept, -1),
        )


def _setting(schedule: CompressionSchedule, name: str, given: Any, default: Any) -> Any:
    """An argument of DiffRate: the one given, the schedule's, or the default."""
    carried = (schedule.method or {}).get(name)
    if given is None:
        return default if carried is None else carried
    if carried is not None and given != carried:
        raise ValueError(
            f"{name} must be {carried!r}, which the schedule was made with, got {given!r}; leave {name} out, or free "
            "the schedule of its method: dataclasses.replace(schedule, method=None)"
        )
    return given


def _known(new_size: Tensor, size: Tensor | None, counts: tuple[int, int]) -> Tensor | None:
    """The sizes, or None while every token is one patch, which pruning alone does not change."""
    before_merge, num_merge_kept = counts
    return None if size is None and num_merge_kept >= before_merge else new_size


def score_tokens(metric: str, evidence: Evidence, block: int, x: Tensor, seed: int = 0) -> Tensor:
    """Importance [B, N] of the tokens x [B, N, C] by one of :data:`METRICS`, from what the block's attention saw."""
    if metric == "random":
        return _position_hash(x, seed, block)
    if metric == "cls_attn_v":
        cls_attn, values = evidence.require("cls_attn"), evidence.require("values").detach()  # [B, N], [B, H, N, D]
        return cls_attn * values.to(cls_attn.dtype).square().sum((1, 3)).sqrt()
    return evidence.require(metric)


def _position_hash(x: Tensor, seed: int, block: int) -> Tensor:
    """Pseudo-random importance per position [B, N]: the same on every device and in every batch, no generator state."""
    position = torch.arange(x.shape[1], device=x.device)
    # Two rounds of a multiplicative congruential step; 2^31 * 48271 stays inside int64.
    state = (position + 1) * 2654435 + (seed * 40503 + block * 65599 + 12345) % 2147483647
    for multiplier in (48271, 69621):
        state = (state % 2147483647) * multiplier % 2147483647
        state = state ^ (state >> 15)
    return (state % 2147483647).to(x.dtype if x.dtype == torch.float64 else torch.float32).expand(x.shape[0], -1)
