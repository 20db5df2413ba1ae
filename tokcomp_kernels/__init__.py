"""Token-compression operators for PyTorch: importing this package registers ``torch.ops.tokcomp.*``."""

from tokcomp_kernels._library import build_info, load_error, native_kernels
from tokcomp_kernels.ops.add_layer_norm import add_layer_norm
from tokcomp_kernels.ops.attention import attention
from tokcomp_kernels.ops.attention_received import attention_received
from tokcomp_kernels.ops.bipartite_merge import bipartite_merge
from tokcomp_kernels.ops.class_attention_sort import class_attention_sort
from tokcomp_kernels.ops.linear_gelu import linear_gelu
from tokcomp_kernels.ops.masked_attention import masked_attention
from tokcomp_kernels.ops.masked_merge import masked_merge
from tokcomp_kernels.ops.masked_softmax import masked_softmax
from tokcomp_kernels.ops.prune_merge import prune_merge
from tokcomp_kernels.ops.prune_merge_norm import prune_merge_norm
from tokcomp_kernels.ops.select_diverse import select_diverse
from tokcomp_kernels.ops.tome_merge import tome_merge
from tokcomp_kernels.ops.unmerge import unmerge

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_received",
    "bipartite_merge",
    "build_info",
    "class_attention_sort",
    "linear_gelu",
    "load_error",
    "masked_attention",
    "masked_merge",
    "masked_softmax",
    "native_kernels",
    "prune_merge",
    "prune_merge_norm",
    "select_diverse",
    "tome_merge",
    "unmerge",
]
