"""select_diverse: tokens that are unlike each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._register import register


def select_diverse(
    features: Tensor,
    num_kept: int,
    *,
    relevance: Tensor | None = None,
    num_prefix_tokens: int = 1,
    rule: str = "farthest",
) -> Tensor:
    """Choose tokens of each image one by one, each as unlike those chosen before as there is.

    All images are chosen for at once, and no step waits for the device.

    Args:
        features: What is compared, [B, N, K], by cosine.
        num_kept: Tokens to choose, prefix included, num_prefix_tokens .. N.
        relevance: For ``dpp``: how much each token is wanted, [B, N], above 0; equally where None.
        num_prefix_tokens: Tokens in front that are always chosen, and compared with none.
        rule: ``farthest`` (DivPrune): first the token whose nearest other is farthest, then the one whose nearest
            chosen one is farthest, in 1 - cosine. ``dpp`` (CDPruner): greedily the largest determinant of
            diag(r) cos diag(r), r being the relevance.

    Returns:
        [B, num_kept] int64: the prefix, then the others in the order in which they were chosen. Ties go to the lower
        position. Without a gradient.

    Raises:
        ValueError: num_kept outside its range; an unknown rule; relevance given to ``farthest``; wrong shapes.
        TypeError: A dtype that is not floating.
    """
    return torch.ops.tokcomp.select_diverse(
        features, num_kept, relevance=relevance, num_prefix_tokens=num_prefix_tokens, rule=rule
    )


def _fake(features: Tensor, num_kept: int, **options: Any) -> Tensor:
    return features.new_empty(features.shape[0], num_kept, dtype=torch.int64)


register("select_diverse", fake=_fake)
