"""Models that are refused: why, and the nearest thing that works."""

from __future__ import annotations

from torch import nn

#: Part of a class's name in small letters -> what is in the way, and what to use instead. The first match counts.
_REASONS = {
    "swin": ("its windows need every token at its place", "a plain ViT of timm at the same size"),
    "maxxvit": ("its windows and convolutions need every token at its place", "caformer_s36"),
    "sam": ("its blocks attend in windows of the grid", "a plain ViT with ToMeMLP, which keeps every position"),
    "hiera": ("it pools units of the grid between its stages", "caformer_s36, compressed in its third stage"),
    "levit": ("its attention adds a bias per pair of places and shrinks the grid", "deit_small_patch16_224"),
    "xcit": ("its attention mixes channels, and its blocks convolve over the grid", "deit_small_patch16_224"),
    "pyramidvisiontransformer": (
        "it shrinks the grid from stage to stage",
        "caformer_s36, compressed in its third stage",
    ),
    "multiscalevit": ("it pools the grid inside its attention", "caformer_s36, compressed in its third stage"),
    "convnext": ("it is convolutional: it has no tokens to drop", "caformer_s36, whose third stage is attention"),
    "resnet": ("it is convolutional: it has no tokens to drop", "caformer_s36, whose third stage is attention"),
    "siglip2": ("its images share a padded batch", "SigLIP at one image size"),
    "cait": ("its class token joins in the last blocks alone", "deit3_small_patch16_224"),
}


def reason_for(model: nn.Module) -> str | None:
    """Why a model of this kind is refused and what to use instead; None where nothing is known of it."""
    name = type(model).__name__.lower()
    for part, (reason, instead) in _REASONS.items():
        if part in name:
            return f"{reason}; use {instead}"
    return None
