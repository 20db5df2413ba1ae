"""prune_merge between two matrix products: the residual sum before it, the LayerNorm after it."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference.add_layer_norm import layer_norm
from tokcomp_kernels.reference.prune_merge import prune_merge_reference


@checked
def prune_merge_norm_reference(
    x: Tensor,
    branch: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept, kept_size, source = prune_merge_reference(
        x + branch,
        importance,
        num_prune_kept,
        num_merge_kept,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
    )
    return kept, layer_norm(kept, weight, bias, norm_eps), kept_size, source
