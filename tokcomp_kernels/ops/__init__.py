"""The operators. Importing this package registers them as ``torch.ops.tokcomp.*``."""

from tokcomp_kernels.ops._register import IMPLEMENTATIONS
from tokcomp_kernels.ops.add_layer_norm import add_layer_norm
from tokcomp_kernels.ops.attention import attention
from tokcomp_kernels.ops.class_attention_sort import class_attention_sort
from tokcomp_kernels.ops.linear_gelu import linear_gelu
from tokcomp_kernels.ops.masked_attention import masked_attention
from tokcomp_kernels.ops.masked_merge import masked_merge
from tokcomp_kernels.ops.masked_softmax import masked_softmax
from tokcomp_kernels.ops.prune_merge import prune_merge
from tokcomp_kernels.ops.prune_merge_norm import prune_merge_norm
from tokcomp_kernels.ops.tome_merge import tome_merge
from tokcomp_kernels.ops.unmerge import unmerge

__all__ = [
    "IMPLEMENTATIONS",
    "add_layer_norm",
    "attention",
    "class_attention_sort",
    "linear_gelu",
    "masked_attention",
    "masked_merge",
    "masked_softmax",
    "prune_merge",
    "prune_merge_norm",
    "tome_merge",
    "unmerge",
]
