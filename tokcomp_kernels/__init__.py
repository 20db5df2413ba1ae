"""Token-compression operators for PyTorch: importing this package registers ``torch.ops.tokcomp.*``."""

from tokcomp_kernels._library import build_info, load_error, native_kernels
from tokcomp_kernels.ops import (
    add_layer_norm,
    attention,
    class_attention_sort,
    linear_gelu,
    masked_attention,
    masked_merge,
    masked_softmax,
    prune_merge,
    prune_merge_norm,
    tome_merge,
    unmerge,
)

__all__ = [
    "add_layer_norm",
    "attention",
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
    "tome_merge",
    "unmerge",
]
