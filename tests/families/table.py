"""The one table of model families: tiny models with random weights. The docs' support table is made from it.

``python -m tests.families.table`` prints that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

_VIT = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=5)
_HF = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, image_size=32, patch_size=8)
_CLIP = {**_HF, "intermediate_size": 96}


@dataclass(frozen=True)
class Family:
    """A row: what people call it, who has it, and how to make a small one."""

    name: str
    library: str
    models: str
    make: Callable[[], nn.Module]
    note: str = ""
    #: Before, the library's own model of the family runs in float32 alone.
    since: tuple[int, ...] = ()

    @property
    def missing(self) -> str:
        """Why it cannot be tested here; empty if it can."""
        if find_spec(self.library) is None:
            return f"{self.library} is not installed"
        if self.since and tuple(int(part) for part in version(self.library).split(".")[:3]) < self.since:
            return f"{self.library} {version(self.library)} runs it in float32 alone"
        return ""

    def build(self) -> nn.Module:
        """A small model with lively weights, in eval mode."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model


def _timm_vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**_VIT, **options})


def _eva(**options: Any) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**{**_VIT, **options})


def _beit(**options: Any) -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**{**_VIT, **options})


def _naflex(**options: Any) -> nn.Module:
    from timm.models.naflexvit import NaFlexVit

    shared = {name: value for name, value in _VIT.items() if name not in ("img_size", "num_classes")}
    return NaFlexVit(num_classes=5, pos_embed_grid_size=(4, 4), **{**shared, **options})


def _caformer() -> nn.Module:
    from timm.models import metaformer

    mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    sizes = dict(depths=(1, 1, 4, 1), dims=(8, 16, 48, 64), head_dim=16, num_classes=5)
    model = metaformer.MetaFormer(token_mixers=mixers, norm_layers=norms, **sizes)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}  # 4 x 4 tokens in the third stage
    return model


def _relpos(block: str = "RelPosBlock", **options: Any) -> nn.Module:
    from timm.models import vision_transformer_relpos as relpos

    options = {"init_values": 0.3, "block_fn": getattr(relpos, block), **options}
    return relpos.VisionTransformerRelPos(**{**_VIT, **options})


def _block(name: str, **options: Any) -> nn.Module:
    from timm.models import vision_transformer

    return _timm_vit(block_fn=getattr(vision_transformer, name), **options)


def _transformers(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**options)
    return getattr(transformers, name)(made)


def _torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(32, 8, num_layers=4, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5)


def _open_clip(**options: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(32, 8, width=48, layers=4, heads=3, mlp_ratio=2.0, output_dim=20, **options)


def _open_clip_whole() -> nn.Module:
    from open_clip.model import CLIP

    vision = dict(image_size=32, patch_size=8, width=48, layers=4, head_width=16)
    return CLIP(20, vision, dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)).visual


def _lvvit() -> nn.Module:
    from tokcomp.lvvit import LVViT

    return LVViT(**_VIT, skip_lam=2.0, stem_width=8)


_rope = dict(use_rot_pos_emb=True, ref_feat_shape=(4, 4))
FAMILIES = (
    Family("ViT", "timm", "vit_*, deit_*, deit3_*, MAE, DINOv2, CLIP towers", _timm_vit),
    Family(
        "ViT, average pooling",
        "timm",
        "vit_*_gap, SigLIP towers",
        partial(_timm_vit, class_token=False, global_pool="avg"),
    ),
    Family("LV-ViT", "timm", "lvvit_* of tokcomp.lvvit", _lvvit, note="scored by the patches that are left"),
    Family(
        "EVA02",
        "timm",
        "eva02_*",
        partial(_eva, **_rope, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, global_pool="avg"),
        note="rotary places",
    ),
    Family(
        "DINOv3",
        "timm",
        "vit_*_dinov3",
        partial(
            _eva,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_rotate_half=True,
            num_reg_tokens=4,
            use_abs_pos_emb=False,
            init_values=0.3,
            qkv_bias=False,
            global_pool="token",
        ),
        note="rotary places",
    ),
    Family(
        "Perception Encoder",
        "timm",
        "vit_pe_*",
        partial(
            _eva, **_rope, attn_type="rope", use_pre_transformer_norm=True, global_pool="map", rope_grid_offset=1.0
        ),
        note="rotary places",
    ),
    Family(
        "rope ViT, learnt angles",
        "timm",
        "vit_*_rope_mixed_*",
        partial(_eva, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope", global_pool="token"),
        note="rotary places",
        since=(1, 0, 31),
    ),
    Family("EVA, post-norm", "timm", "eva_large's relatives", partial(_eva, use_post_norm=True, global_pool="token")),
    Family(
        "BEiT",
        "timm",
        "beit_*, beitv2_*",
        partial(_beit, use_abs_pos_emb=False, use_rel_pos_bias=True, qkv_bias=True, init_values=0.3, global_pool="avg"),
        note="a bias for each pair of places",
    ),
    Family(
        "relative positions",
        "timm",
        "vit_relpos_*",
        partial(_relpos, rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True),
        note="a bias for each pair of places",
    ),
    Family(
        "relative positions, post-norm",
        "timm",
        "vit_relpos_*_rpn, vit_srelpos_*",
        partial(_relpos, block="ResPostRelPosBlock", shared_rel_pos=True, rel_pos_dim=16),
        note="a bias for each pair of places",
    ),
    Family(
        "NaFlexViT",
        "timm",
        "naflexvit_*",
        partial(_naflex, global_pool="map", reg_tokens=1),
        note="images of any size, or padded batches of patches",
    ),
    Family(
        "NaFlexViT with rotary places",
        "timm",
        "NaFlexVit(rope_type=...), use_naflex=True",
        partial(_naflex, rope_type="axial", rope_ref_feat_shape=(4, 4), class_token=True, global_pool="token"),
        note="images of any size, or padded batches of patches; rotary places",
    ),
    Family("CAFormer", "timm", "caformer_*", _caformer, note="the third stage, whose grid is whole again at its end"),
    Family(
        "ViT, parallel scaling",
        "timm",
        "VisionTransformer(block_fn=ParallelScalingBlock)",
        partial(_block, "ParallelScalingBlock", qkv_bias=False),
        note="tokens are reduced after attention and MLP, which run side by side",
    ),
    Family(
        "ViT, parallel attentions",
        "timm",
        "vit_*x2_*, ParallelThingsBlock",
        partial(_block, "ParallelThingsBlock", init_values=0.3),
    ),
    Family(
        "ViT",
        "transformers",
        "ViTModel, ViTMSNModel and their classifiers",
        partial(_transformers, "ViTForImageClassification", "ViTConfig", **_CLIP, num_labels=5),
    ),
    Family(
        "DeiT",
        "transformers",
        "DeiTModel and its classifiers",
        partial(_transformers, "DeiTForImageClassificationWithTeacher", "DeiTConfig", **_CLIP, num_labels=5),
    ),
    Family(
        "DINOv2",
        "transformers",
        "Dinov2Model, Dinov2ForImageClassification",
        partial(_transformers, "Dinov2ForImageClassification", "Dinov2Config", **_HF, mlp_ratio=2, num_labels=5),
    ),
    Family(
        "DINOv2 with registers",
        "transformers",
        "Dinov2WithRegistersModel and its classifier",
        partial(
            _transformers,
            "Dinov2WithRegistersForImageClassification",
            "Dinov2WithRegistersConfig",
            **_HF,
            mlp_ratio=2,
            use_swiglu_ffn=True,
            num_labels=5,
        ),
    ),
    Family(
        "DINOv3",
        "transformers",
        "DINOv3ViTModel",
        partial(_transformers, "DINOv3ViTModel", "DINOv3ViTConfig", **_CLIP, num_register_tokens=2),
        note="rotary places",
    ),
    Family(
        "CLIP's vision tower",
        "transformers",
        "CLIPVisionModel(WithProjection), CLIPForImageClassification, inside CLIPModel; AltCLIP's",
        partial(_transformers, "CLIPVisionModelWithProjection", "CLIPVisionConfig", **_CLIP, projection_dim=20),
    ),
    Family(
        "MetaCLIP 2's vision tower",
        "transformers",
        "MetaClip2VisionModel(WithProjection), MetaClip2ForImageClassification, inside MetaClip2Model",
        partial(_transformers, "MetaClip2ForImageClassification", "MetaClip2Config", vision_config=_CLIP, num_labels=5),
    ),
    Family(
        "SigLIP's vision tower",
        "transformers",
        "SiglipVisionModel, SiglipForImageClassification, inside SiglipModel",
        partial(_transformers, "SiglipVisionModel", "SiglipVisionConfig", **_CLIP),
    ),
    Family("ViT", "torchvision", "vit_b_16, vit_l_16, ...", _torchvision),
    Family("CLIP's vision tower", "open_clip", "VisionTransformer, inside CLIP", _open_clip_whole),
    Family(
        "CLIP's vision tower, average pooling",
        "open_clip",
        "VisionTransformer(pool_type='avg')",
        partial(_open_clip, pool_type="avg", ls_init_value=0.3),
    ),
)


def support_table() -> str:
    """The docs' table, in Markdown."""
    lines = ["| Library | Family | Models | |", "| --- | --- | --- | --- |"]
    lines += [f"| {family.library} | {family.name} | {family.models} | {family.note} |" for family in FAMILIES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(support_table())
