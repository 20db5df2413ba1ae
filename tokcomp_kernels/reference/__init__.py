"""Plain differentiable PyTorch for every operator: the specification, the tests' oracle and the last fallback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokcomp_kernels.reference.add_layer_norm import add_layer_norm_reference
from tokcomp_kernels.reference.attention import attention_reference
from tokcomp_kernels.reference.attention_backward import attention_backward_reference
from tokcomp_kernels.reference.class_attention_sort import class_attention_sort_reference
from tokcomp_kernels.reference.linear_gelu import linear_gelu_reference
from tokcomp_kernels.reference.masked_attention import masked_attention_reference
from tokcomp_kernels.reference.masked_attention_backward import masked_attention_backward_reference
from tokcomp_kernels.reference.masked_merge import masked_merge_reference
from tokcomp_kernels.reference.masked_merge_backward import masked_merge_backward_reference
from tokcomp_kernels.reference.masked_softmax import masked_softmax_backward_reference, masked_softmax_reference
from tokcomp_kernels.reference.merge_backward import merge_backward_reference
from tokcomp_kernels.reference.prune_merge import prune_merge_reference
from tokcomp_kernels.reference.prune_merge_norm import prune_merge_norm_reference
from tokcomp_kernels.reference.tome_merge import tome_merge_reference
from tokcomp_kernels.reference.unmerge import unmerge_backward_reference, unmerge_reference

REFERENCES: dict[str, Callable[..., Any]] = {
    "class_attention_sort": class_attention_sort_reference,
    "prune_merge": prune_merge_reference,
    "masked_softmax": masked_softmax_reference,
    "masked_attention": masked_attention_reference,
    "attention": attention_reference,
    "tome_merge": tome_merge_reference,
    "unmerge": unmerge_reference,
    "masked_merge": masked_merge_reference,
    "prune_merge_norm": prune_merge_norm_reference,
    "add_layer_norm": add_layer_norm_reference,
    "linear_gelu": linear_gelu_reference,
    "_merge_backward": merge_backward_reference,
    "_unmerge_backward": unmerge_backward_reference,
    "_masked_softmax_backward": masked_softmax_backward_reference,
    "_masked_attention_backward": masked_attention_backward_reference,
    "_attention_backward": attention_backward_reference,
    "_masked_merge_backward": masked_merge_backward_reference,
}
