"""prune_merge_norm: prune_merge's kernels with a residual sum as rows are read and a LayerNorm as they are written.

The sum is rounded as it is read and never stored for all tokens: a row is added up once where it is kept, and once more
where it is a source or something joins it. Bytes per image of float16, N = 197 > 192 > 180 at C = 384: 571,392 that any
kernel must move (192 rows of x and of branch in, 180 rows twice out), 55,296 that the joined rows move again, 6,000 of
order, sizes and candidates.
"""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._common import require_supported
from tokcomp_kernels.triton._merge_norm import Norm
from tokcomp_kernels.triton.prune_merge import launch_prune_merge


@checked
def prune_merge_norm_triton(
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
    """``tokcomp::prune_merge_norm`` by Triton: x, branch [B, N, C] -> x, normalized [B, M, C], size, source."""
    require_supported("prune_merge_norm", "x", x)
    x_out, normalized, size_out, source = launch_prune_merge(
        x,
        branch,
        importance,
        num_prune_kept,
        num_merge_kept,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
        norm=Norm(weight, bias, norm_eps),
    )
    assert normalized is not None
    return x_out, normalized, size_out, source
