"""Inference on CPU through oneDNN with weights that are packed once."""

from tokcomp.fastpath.packing import Layer, PackedWeights, forget, has_hooks, packed_weights

__all__ = ["Layer", "PackedWeights", "forget", "has_hooks", "packed_weights"]
