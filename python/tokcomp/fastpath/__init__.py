"""Inference on CPU through oneDNN with weights that are packed once."""

from tokcomp.fastpath.packing import PackedWeights, forget, has_hooks, packed_weights

__all__ = ["PackedWeights", "forget", "has_hooks", "packed_weights"]
