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
    "pvt": ("it shrinks the grid from stage to stage", "caformer_s36, compressed in its third stage"),
    "poolingvisiontransformer": ("it pools the grid between its stages", "deit_small_patch16_224"),
    "multiscalevit": ("it pools the grid inside its attention", "caformer_s36, compressed in its third stage"),
    "convnext": ("it is convolutional: it has no tokens to drop", "caformer_s36, whose third stage is attention"),
    "resnet": ("it is convolutional: it has no tokens to drop", "caformer_s36, whose third stage is attention"),
    "siglip2": (
        "its images share a padded batch",
        "timm's naflexvit_base_patch16_siglip, which takes such batches too, or SigLIP",
    ),
    "vitmae": ("it leaves out patches at random by itself", "its weights as a ViTModel, ViTModel.from_pretrained(...)"),
    "videomae": ("its tokens are tubes through several frames", "ViTModel on single frames"),
    "clipseg": ("its decoder reads every position of some of its layers", "CLIPVisionModel"),
    "owlv": ("its boxes are read from every position", "CLIPVisionModel"),
    "yolos": ("its detection tokens stand behind the patches, where they would merge", "ViTModel"),
    "dpt": ("it reads whole maps of some of its layers", "tokcomp.dense.Segmenter around a ViT of timm"),
    "beit": ("of BEiT only timm's classes are known", "timm's beit_base_patch16_224, which has the same weights"),
    "data2vecvision": ("of BEiT and its relatives only timm's classes are known", "timm's beit_base_patch16_224"),
    "ijepa": ("its layers are known only with a class token", "timm's vit_*_gap, or Dinov2Model"),
    "chineseclip": ("its layers are not known", "CLIPVisionModel or AltCLIPVisionModel"),
    "blipvision": ("its layers are not known", "CLIPVisionModel"),
    "internvl": ("its layers are not known", "timm's vit_intern300m_patch14_448"),
    "aimv2": ("its layers are not known", "timm's aimv2_large_patch14_224"),
    "tnt": ("it runs a transformer over the pixels of each patch, which needs every patch", "deit_small_patch16_224"),
    "coat": ("its blocks convolve over the grid", "deit_small_patch16_224"),
    "volo": ("its first blocks attend in windows of the grid", "deit_small_patch16_224"),
    "efficientformer": ("its stages pool the grid", "caformer_s36, compressed in its third stage"),
    "fastvit": ("its stages convolve over the grid", "caformer_s36, compressed in its third stage"),
    "crossvit": ("its two branches exchange tokens", "deit_small_patch16_224"),
    "convit": ("its attention goes by the distance of every pair of places", "deit_small_patch16_224"),
    "cait": ("its class token joins in the last blocks alone", "deit3_small_patch16_224"),
}


def reason_for(model: nn.Module) -> str | None:
    """Why a model of this kind is refused and what to use instead; None where nothing is known of it."""
    name = type(model).__name__.lower()
    for part, (reason, instead) in _REASONS.items():
        if part in name:
            return f"{reason}; use {instead}"
    return None
