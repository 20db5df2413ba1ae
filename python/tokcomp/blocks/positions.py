"""Every position its token again: the feature maps of a model whose tokens are reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp.blocks.state import compose_sources


class Positions:
    """The feature map [B, N, C] as each block leaves it.

    A merged position has the token that it was merged into. A pruned one keeps the value with which it entered the
    block that pruned it.

    Args:
        x: [B, N, C], the tokens that enter block 0.
    """

    def __init__(self, x: Tensor) -> None:
        self.source: Tensor | None = None  # [B, N] the slot of each position, -1 = pruned; None: all as they were
        self.maps: list[Tensor] = [x]  # before block 0, after block 0, ...

    def follow(self, x: Tensor, source: Tensor | None) -> None:
        """Another block has left the tokens x [B, M, C], by this source map, None where it dropped none."""
        if source is not None:
            self.source = source if self.source is None else compose_sources(self.source, source)
        if self.source is not None:
            x = torch.ops.tokcomp.unmerge(x, self.source, pruned_fill=self.maps[-1].to(x.dtype))
        self.maps.append(x)
