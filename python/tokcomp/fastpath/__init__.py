"""Linear layers without their modules: oneDNN's with weights packed once on CPU, plain ones on CUDA."""

from tokcomp.fastpath.frozen import gelu_mlp, linear, linear_add, linear_heads
from tokcomp.fastpath.int8 import Int8Weights, is_int8, set_int8
from tokcomp.fastpath.packing import Layer, PackedWeights, forget, has_hooks, packable, packed_now, packed_weights
from tokcomp.fastpath.plain import PlainWeights, Products, fused_embedding, plain_weights

__all__ = [
    "Int8Weights",
    "Layer",
    "PackedWeights",
    "PlainWeights",
    "Products",
    "forget",
    "fused_embedding",
    "gelu_mlp",
    "has_hooks",
    "is_int8",
    "linear",
    "linear_add",
    "linear_heads",
    "packable",
    "packed_now",
    "packed_weights",
    "plain_weights",
    "set_int8",
]
