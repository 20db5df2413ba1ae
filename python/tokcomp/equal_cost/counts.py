"""What any method's schedule amounts to, as two rows of counts, and what they cost on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from tokcomp.adapters import find_adapter
from tokcomp.cost import TokenCounts, added_cost, counts_under, flops_of
from tokcomp.methods import DiffRate, EViT, Method, ToMe, scheduled
from tokcomp.methods.diffrate import published_settings
from tokcomp.schedule import CompressionSchedule


class Counts(NamedTuple):
    """Tokens of every block, prefix included: between pruning and merging, and left after both."""

    before_merge: list[int]
    kept: list[int]


def effective_counts(method: Method, num_tokens: int, depth: int, prefix: int = 1) -> Counts:
    """What a method's counts amount to in each block of a model that ``num_tokens`` enter, ``prefix`` of them no
    patches."""
    if method.between:
        after = [out for _, out in method.counts(depth, num_tokens, prefix)]
        return Counts(after, after)
    before_merge, kept = [], []
    for block in range(depth):
        assignment = method.assign(block, num_tokens, prefix)
        if assignment is None:
            before_merge.append(num_tokens)
        else:
            left = assignment.num_tokens_out
            merged = max(0, assignment.num_prune_kept - assignment.num_merge_kept)
            if getattr(method, "pipeline", "") == "merge_prune":
                merged = num_tokens - assignment.num_merge_kept
            before_merge.append(left + merged)
            num_tokens = left
        kept.append(num_tokens)
    return Counts(before_merge, kept)


def lists_for(pipeline: str, counts: Counts, num_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """(num_prune_kept, num_merge_kept) under which ``pipeline`` leaves ``counts.kept`` tokens in each block.

    ``merge_prune`` prunes as many tokens as ``prune_merge`` would, after merging; ``prune`` and ``merge`` read one
    list. ``num_tokens`` enter block 0; None: as many as block 0 has between its steps.
    """
    before_merge, kept = map(list, counts)
    if pipeline == "prune":
        return kept, kept
    if pipeline != "merge_prune":
        return before_merge, kept
    arriving = [before_merge[0] if num_tokens is None else num_tokens, *kept[:-1]]
    merged = [after + there - middle for there, middle, after in zip(arriving, before_merge, kept, strict=True)]
    return kept, merged


class Ruler:
    """Counts and multiply-adds of methods on one model, without compressing it.

    Args:
        model: of a family that :func:`tokcomp.compress` understands; what it is compressed by does not matter.
        measure: another cost of token counts than multiply-adds, such as a latency, that must not fall as they rise.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood, or its multiply-adds are not known.
    """

    def __init__(self, model: nn.Module, measure: Callable[[TokenCounts], float] | None = None) -> None:
        adapter = find_adapter(model)
        self._adapter, self._model = adapter, model
        self.geometry = adapter.geometry(model)
        self.num_tokens = adapter.num_tokens(model)
        self.prefix, self.depth = self.geometry.num_prefix_tokens, self.geometry.depth
        self.patches = self.num_tokens - self.prefix
        self._coefficients, self._measure = adapter.cost(model), measure

    def flops(self, method: Method | None) -> int:
        """Multiply-adds of one image under a method; None: uncompressed."""
        counts = self._token_counts(method)
        added = added_cost(method, self._adapter, self._model, counts, self.num_tokens)
        return int(flops_of(self._coefficients, counts, self.num_tokens) + added)

    def cost(self, method: Method | None) -> float:
        """What budgets are compared with: multiply-adds, or what ``measure`` says."""
        return self.flops(method) if self._measure is None else self._measure(self._token_counts(method))

    def _token_counts(self, method: Method | None) -> TokenCounts:
        return counts_under(method, self.num_tokens, self.depth, self.prefix)

    def counts(self, method: Method) -> Counts:
        """What the method's counts amount to."""
        return effective_counts(method, self.num_tokens, self.depth, self.prefix)

    def arriving(self, kept: Sequence[int]) -> list[int]:
        """Tokens that enter each block if the blocks leave ``kept``."""
        return [self.num_tokens, *kept[:-1]]

    def schedule(self, counts: Counts, method: Mapping[str, Any]) -> CompressionSchedule:
        """The schedule under which a method leaves ``counts.kept`` tokens in each block.

        Args:
            counts: per block, falling; ToMe and EViT read those that are kept.
            method: as a schedule records it, with all settings of the method.
        """
        name = method.get("name", "diffrate")
        pipeline = {"tome": "merge", "evit": "prune"}.get(name) or method["pipeline"]
        pruned, merged = lists_for(pipeline, counts, self.num_tokens)
        return CompressionSchedule(
            pruned if "prune" in pipeline else None,
            merged if "merge" in pipeline else None,
            num_tokens=self.num_tokens,
            num_prefix_tokens=self.prefix,
            method=dict(method),
        )

    def settings_of(self, method: Method) -> dict[str, Any]:
        """A method as a schedule records it.

        Raises:
            TypeError: it is no method that follows a schedule.
        """
        if isinstance(method, ToMe):
            return {"name": "tome", "prop_attn": method.prop_attn}
        if isinstance(method, EViT):
            return {"name": "evit", "fuse": method.fuse}
        if not isinstance(method, DiffRate):
            raise TypeError(f"method must be a DiffRate, ToMe or EViT, got {type(method).__name__}")
        names = ("metric", "pipeline", "similarity_weighted_size", *(["seed"] if method.metric == "random" else []))
        return {name: getattr(method, name) for name in names}

    def has_schedule(self, method: Method) -> bool:
        """Whether :meth:`as_schedule` takes the method."""
        return isinstance(method, (DiffRate, ToMe, EViT))

    def as_schedule(self, method: Method) -> CompressionSchedule:
        """A DiffRate, ToMe or EViT as a schedule for this model, which :func:`tokcomp.methods.scheduled` turns back."""
        return self.schedule(self.counts(method), self.settings_of(method))

    def diffrate(self, counts: Counts, **settings: Any) -> DiffRate:
        """DiffRate that leaves ``counts.kept`` tokens in each block, whatever the pipeline.

        Args:
            counts: per block, falling.
            settings: DiffRate's ``metric``, ``pipeline``, ``seed`` and ``similarity_weighted_size``; those left out are
                as published for models of this kind. The schedule records them.
        """
        method = published_settings(self.geometry)._asdict()
        method |= {name: value for name, value in settings.items() if value is not None}
        return scheduled(self.schedule(counts, method))  # type: ignore[return-value]

    def like(self, method: Method, **settings: Any) -> DiffRate:
        """DiffRate that leaves as many tokens in each block as another method does: what its schedule alone does."""
        counts = self.counts(method)
        if settings.get("pipeline") in ("prune", "merge"):
            counts = Counts(counts.kept, counts.kept)
        return self.diffrate(counts, **settings)
