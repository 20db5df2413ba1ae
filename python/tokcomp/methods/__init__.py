"""Compression methods. A method knows tensors and counts, never a model family."""

from tokcomp.methods.base import Assignment, Evidence, Geometry, Method, Reduced
from tokcomp.methods.diffrate import DiffRate
from tokcomp.methods.evit import EViT
from tokcomp.methods.scheduled import scheduled
from tokcomp.methods.tome import ToMe
from tokcomp.methods.tome_mlp import ToMeMLP

__all__ = [
    "Assignment",
    "DiffRate",
    "EViT",
    "Evidence",
    "Geometry",
    "Method",
    "Reduced",
    "ToMe",
    "ToMeMLP",
    "scheduled",
]
