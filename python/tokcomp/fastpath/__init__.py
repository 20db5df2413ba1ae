"""oneDNN's linear layers on CPU with weights that are packed once, for inference and past frozen weights."""

from tokcomp.fastpath.frozen import gelu_mlp, linear, linear_add, linear_heads
from tokcomp.fastpath.packing import Layer, PackedWeights, forget, has_hooks, packed_now, packed_weights

__all__ = [
    "Layer",
    "PackedWeights",
    "forget",
    "gelu_mlp",
    "has_hooks",
    "linear",
    "linear_add",
    "linear_heads",
    "packed_now",
    "packed_weights",
]
