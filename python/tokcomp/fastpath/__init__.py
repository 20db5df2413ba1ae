"""Linear layers without their modules: oneDNN's with weights packed once on CPU, plain ones on CUDA."""

from tokcomp.fastpath.frozen import gelu_mlp, linear, linear_add, linear_heads
from tokcomp.fastpath.packing import Layer, PackedWeights, forget, has_hooks, packed_now, packed_weights
from tokcomp.fastpath.plain import PlainWeights, Products, plain_weights

__all__ = [
    "Layer",
    "PackedWeights",
    "PlainWeights",
    "Products",
    "forget",
    "gelu_mlp",
    "has_hooks",
    "linear",
    "linear_add",
    "linear_heads",
    "packed_now",
    "packed_weights",
    "plain_weights",
]
