"""VisionZip (CVPR 2025): keep the tokens that attention dwells on, and a sample of the others that the rest joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokcomp.methods.base import Evidence, Geometry, attention_of, fitted_to_class_token, number
from tokcomp.methods.keeping import KeepingMethod
from tokcomp.methods.partition import DESTINATION, SOURCE, PartitionMethod, order_of, with_rank
from tokcomp_kernels._numbers import accumulate_dtype


class VisionZip(PartitionMethod, KeepingMethod):
    """Dominant tokens stay as they are; of the rest every k-th stays, and the others join their nearest one of these.

    Dominant are the tokens that the class token attends to most, or all do if the model has no class token. Nearest is
    by cosine of the keys, averaged over heads; what joins becomes the plain mean of its group.

    Args:
        keep_rate, blocks, num_kept: as for :class:`KeepingMethod`: dominant and contextual tokens together.
        contextual: share of the kept tokens that are contextual (10 of 64 as published), rounded; at least one is.

    Raises:
        TypeError, ValueError: as :class:`KeepingMethod`; contextual outside (0, 1].
    """

    needs = frozenset({"cls_attn", "keys"})
    average = "mean"

    def __init__(
        self,
        keep_rate: float | Sequence[float] | None = None,
        blocks: Sequence[int] = (3, 6, 9),
        num_kept: int | Sequence[int] | None = None,
        contextual: float = 10 / 64,
    ) -> None:
        super().__init__(keep_rate, blocks, num_kept)
        if not 0 < number("contextual", contextual) <= 1:
            raise ValueError(f"contextual must be in (0, 1], got {contextual}")
        self.contextual = float(contextual)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "contextual": self.contextual}

    def fitted(self, geometry: Geometry) -> VisionZip:
        return fitted_to_class_token(self, geometry)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        keys = evidence.require("keys").detach()
        return with_rank(keys.to(accumulate_dtype(keys)).mean(1), attention_of(evidence))

    def roles(self, rank: Tensor, num_dropped: int, num_prefix_tokens: int) -> Tensor:
        kept = rank.shape[1] - num_prefix_tokens - num_dropped
        targets = min(max(1, round(self.contextual * kept)), kept)
        order = order_of(rank, num_prefix_tokens)
        rest = order[:, kept - targets :].sort(1).values  # [B, targets + num_dropped] in the order of position
        step = rest.shape[1] // targets
        role = torch.zeros_like(rank, dtype=torch.int64).scatter(1, rest, SOURCE)
        return role.scatter(1, rest[:, : step * targets : step], DESTINATION)
