"""Compression methods. A method knows tensors and counts, never a model family."""

from tokcomp.methods.ats import ATS
from tokcomp.methods.avit import AViT
from tokcomp.methods.base import Assignment, Evidence, Geometry, Method, Reduced
from tokcomp.methods.diffrate import DiffRate
from tokcomp.methods.divprune import CDPruner, DivPrune
from tokcomp.methods.dtome import DToMe
from tokcomp.methods.dynamicvit import DynamicViT
from tokcomp.methods.evit import EViT
from tokcomp.methods.evovit import EvoViT
from tokcomp.methods.keeping import KeepingMethod
from tokcomp.methods.learned import Answers, LearnedMethod, Passage, PassageMethod
from tokcomp.methods.partition import PartitionMethod
from tokcomp.methods.pitome import PiToMe
from tokcomp.methods.scheduled import scheduled
from tokcomp.methods.spvit import SPViT
from tokcomp.methods.staged import StagedMethod
from tokcomp.methods.tome import ToMe
from tokcomp.methods.tome_mlp import ToMeMLP
from tokcomp.methods.varying import VaryingMethod
from tokcomp.methods.visionzip import VisionZip

__all__ = [
    "ATS",
    "AViT",
    "Answers",
    "Assignment",
    "CDPruner",
    "DToMe",
    "DiffRate",
    "DivPrune",
    "DynamicViT",
    "EViT",
    "Evidence",
    "EvoViT",
    "Geometry",
    "KeepingMethod",
    "LearnedMethod",
    "Method",
    "PartitionMethod",
    "Passage",
    "PassageMethod",
    "PiToMe",
    "Reduced",
    "SPViT",
    "StagedMethod",
    "ToMe",
    "ToMeMLP",
    "VaryingMethod",
    "VisionZip",
    "scheduled",
]
