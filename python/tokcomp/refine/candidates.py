"""Candidates of a refinement, and the moves from one to the next at equal cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokcomp.equal_cost import Counts, Ruler
from tokcomp.methods import Geometry, Method, scheduled

#: Patch tokens that every block keeps: with one, merging would have nothing to choose from.
_FEWEST = 2
#: The shares of a block's dropped tokens that a move may choose to prune.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Candidate:
    """A schedule and what carries it out.

    Args:
        method: as a schedule records it: DiffRate, ToMe or EViT, with settings.
        drops: tokens that each block loses.
        pruned: of those, per block, the share that is pruned rather than merged, where the method does both.
    """

    method: Mapping[str, Any]
    drops: tuple[int, ...]
    pruned: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {"method": dict(self.method), "drops": list(self.drops), "pruned": list(self.pruned)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidate:
        return cls(dict(data["method"]), tuple(data["drops"]), tuple(data["pruned"]))

    @property
    def key(self) -> str:
        """A digest, equal for equal candidates."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def methods_for(geometry: Geometry) -> list[dict[str, Any]]:
    """Everything that may carry out a schedule on a model of this geometry: what the operators offer."""
    metrics = ["cls_attn", "image_attn", "cls_attn_v"] if geometry.has_class_token else ["image_attn"]
    found: list[dict[str, Any]] = []
    for weighted in (True, False):
        for metric in metrics:
            for pipeline in ("merge",) if geometry.spreads_tokens else ("prune_merge", "merge", "prune"):
                # Without merging there is no size to weight.
                if weighted or pipeline != "prune":
                    found.append({"metric": metric, "pipeline": pipeline, "similarity_weighted_size": weighted})
    if geometry.spreads_tokens:
        return found
    return [*found, *({"name": "tome", "prop_attn": flag} for flag in (True, False)), {"name": "evit", "fuse": True}]


class Moves:
    """Makes candidates for one model that cost at most a budget, and as nearly that as whole tokens allow.

    Args:
        ruler: of the model, with the cost that counts.
        budget: the most that a candidate made here may cost, by :meth:`Ruler.cost`.
    """

    def __init__(self, ruler: Ruler, budget: float) -> None:
        self.ruler, self.budget = ruler, budget
        self.methods = methods_for(ruler.geometry)

    def of(self, method: Method) -> Candidate:
        """A method as it is, whatever it costs."""
        before_merge, kept = self.ruler.counts(method)
        arriving = self.ruler.arriving(kept)
        drops = tuple(there - left for there, left in zip(arriving, kept, strict=True))
        pruned = tuple(
            (there - middle) / drop if drop else 0.5
            for there, middle, drop in zip(arriving, before_merge, drops, strict=True)
        )
        return Candidate(self.ruler.settings_of(method), drops, pruned)

    def method(self, candidate: Candidate) -> Method:
        """The method that a candidate stands for."""
        alive, before_merge, kept = self.ruler.num_tokens, [], []
        for drop, share in zip(candidate.drops, candidate.pruned, strict=True):
            before_merge.append(alive - round(drop * share))
            alive -= drop
            kept.append(alive)
        return scheduled(self.ruler.schedule(Counts(before_merge, kept), candidate.method))

    def text(self, candidate: Candidate) -> str:
        """One line about a candidate: its method, and the tokens that each block keeps."""
        kept = " ".join(map(str, self.ruler.counts(self.method(candidate)).kept))
        settings = candidate.method
        name = settings.get("name") or f"{settings['pipeline']} by {settings['metric']}"
        return f"{name}, kept {kept}"

    def cost(self, candidate: Candidate) -> float:
        return self.ruler.cost(self.method(candidate))

    def at_budget(self, method: Mapping[str, Any], drops: Sequence[float], pruned: Sequence[float]) -> Candidate | None:
        """The candidate of about these drops, all times one factor, that just meets the budget; None if none does.

        Where no factor does, as for ToMe, which merges half of the tokens at most, blocks that dropped none drop too.
        """
        found = self._scaled_to_budget(method, drops, pruned)
        if found is None:
            level = sum(drops) / len(drops) + 1
            found = self._scaled_to_budget(method, [drop + level for drop in drops], pruned)
        return found

    def _scaled_to_budget(
        self, method: Mapping[str, Any], drops: Sequence[float], pruned: Sequence[float]
    ) -> Candidate | None:
        def scaled(factor: float) -> Candidate:
            return Candidate(method, self._possible(method, [drop * factor for drop in drops]), tuple(pruned))

        least, most = 0.0, 1.0
        while self.cost(scaled(most)) > self.budget:
            most *= 2
            if most > 64:
                return None
        for _ in range(12):
            middle = (least + most) / 2
            least, most = (middle, most) if self.cost(scaled(middle)) > self.budget else (least, middle)
        return self._filled(scaled(most))

    def _filled(self, candidate: Candidate) -> Candidate:
        """Give back single tokens, the latest blocks' first, while the budget allows."""
        for block in reversed(range(len(candidate.drops))):
            while candidate.drops[block] > 0:
                drops = list(candidate.drops)
                drops[block] -= 1
                other = Candidate(candidate.method, self._possible(candidate.method, drops), candidate.pruned)
                if self.cost(other) > self.budget or other.drops == candidate.drops:
                    break
                candidate = other
        return candidate

    def _possible(self, method: Mapping[str, Any], drops: Sequence[float]) -> tuple[int, ...]:
        """Whole drops that the method can do: at least two patches stay, and ToMe merges at most half."""
        patches, found, owed = self.ruler.patches, [], 0.0
        for drop in drops:
            most = patches // 2 if method.get("name") == "tome" else max(patches - _FEWEST, 0)
            most = min(most, max(patches - _FEWEST, 0))
            # The rounding of one block is made up for by the next.
            wanted = max(drop, 0.0) + owed
            taken = min(most, max(0, int(np.floor(wanted + 0.5))))
            owed = wanted - taken if drop > 0 and taken < most else 0.0
            found.append(taken)
            patches -= taken
        return tuple(found)

    def step(self, parents: Sequence[Candidate], draw: np.random.Generator) -> Candidate | None:
        """One random move from one of ``parents``, the best first, which are chosen the more often the better."""
        place = min(int(draw.geometric(0.5)) - 1, len(parents) - 1)
        parent = parents[place]
        kinds = ["shift", "shift", "shift", "split", "method", "cross"]
        kind = kinds[int(draw.integers(len(kinds)))]
        method, drops, pruned = dict(parent.method), [float(drop) for drop in parent.drops], list(parent.pruned)
        blocks = len(drops)
        if kind == "cross" and len(parents) > 1:
            other = parents[int(draw.integers(len(parents)))]
            weight = float(draw.random())
            drops = [weight * a + (1 - weight) * b for a, b in zip(drops, other.drops, strict=True)]
        elif kind == "method":
            method = self.methods[int(draw.integers(len(self.methods)))]
        elif kind == "split" and method.get("pipeline") in ("prune_merge", "merge_prune"):
            share = _SHARES[int(draw.integers(len(_SHARES)))]
            first = int(draw.integers(blocks))
            # One block, or this one and all that follow.
            last = blocks if draw.random() < 0.5 else first + 1
            pruned[first:last] = [share] * (last - first)
        else:
            source = int(draw.choice([block for block in range(blocks) if drops[block] > 0] or [0]))
            target = int(draw.integers(blocks))
            moved = drops[source] * float(draw.choice([0.25, 0.5, 1.0]))
            drops[source] -= moved
            drops[target] += moved
        return self.at_budget(method, drops, pruned)
