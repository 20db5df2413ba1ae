"""Dense prediction: segmentation with a vision transformer whose tokens are merged and unmerged again."""

from __future__ import annotations

from tokcomp.dense.fpn import SemanticFPN
from tokcomp.dense.heads import LinearHead, MaskTransformerHead
from tokcomp.dense.metrics import ConfusionMatrix, Scores
from tokcomp.dense.segmenter import Segmenter, position_tokens
from tokcomp.dense.windows import sliding_logits

__all__ = [
    "ConfusionMatrix",
    "LinearHead",
    "MaskTransformerHead",
    "Scores",
    "Segmenter",
    "SemanticFPN",
    "position_tokens",
    "sliding_logits",
]
