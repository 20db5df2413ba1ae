"""LV-ViT ("All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021), which timm lacks.

Importing this module registers ``lvvit_t``, ``lvvit_s``, ``lvvit_m`` and ``lvvit_l`` with timm. The published
checkpoints load as they are: parameters have the names that they have there.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.format import Format, nchw_to
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

__all__ = ["ConvStem", "LVViT", "ResidualScale"]

_RELEASES = "https://github.com/zihangJiang/TokenLabeling/releases/download"


class ConvStem(PatchEmbed):
    """Patches by four convolutions: three of 7, 3 and 3 pixels at half the image's resolution, then one per patch.

    Args:
        img_size, patch_size, in_chans, embed_dim: as timm's PatchEmbed; a patch is an even number of pixels wide.
        width: channels of the first three convolutions.
        kwargs: as timm's PatchEmbed.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        width: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, **kwargs)
        del self.proj  # it comes last
        place: Any = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **place)
        self.conv2, self.conv3 = (nn.Conv2d(width, width, 3, padding=1, bias=False, **place) for _ in range(2))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(width, **place) for _ in range(3))
        self.proj = nn.Conv2d(width, embed_dim, patch_size // 2, stride=patch_size // 2, **place)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's, for another image size.

        Raises:
            ValueError: another patch size, which the stem's convolutions are not made for.
        """
        if patch_size is not None:
            raise ValueError(f"patch_size must stay {self.patch_size[0]} in an LV-ViT, got {patch_size}")
        super().set_input_size(img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, P, C], or [B, h, w, C] in a model for any image size."""
        size = tuple(x.shape[-2:])
        if self.strict_img_size and size != self.img_size:
            raise ValueError(f"images must be {self.img_size[0]} x {self.img_size[1]}, got {size[0]} x {size[1]}")
        patch = self.patch_size
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(f"images must be whole patches of {patch[0]} x {patch[1]}, got {size[0]} x {size[1]}")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2) if self.flatten else nchw_to(x, Format(self.output_fmt))


class ResidualScale(nn.Module):
    """A residual branch times a constant, in the place of timm's LayerScale; it has no parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class LVViT(VisionTransformer):
    """timm's VisionTransformer with LV-ViT's stem, scaled residuals and a second classifier for the patches.

    Logits are the class token's plus half of each class's largest among the patches'. In a compressed model these are
    the patches that are left: a class whose best patch was merged or pruned scores by those that remain. Training with
    token labels needs both kinds of logits: :meth:`token_logits`.

    Args:
        skip_lam: residual branches are divided by it.
        stem_width: channels of the stem's first three convolutions.
        kwargs: of timm's VisionTransformer.

    Raises:
        ValueError: pooling other than by the class token.
    """

    def __init__(self, *, skip_lam: float = 1.0, stem_width: int = 64, **kwargs: Any) -> None:
        _require_token_pooling(kwargs.get("global_pool", "token"))

        def stem(**options: Any) -> ConvStem:
            return ConvStem(width=stem_width, **options)

        defaults = {"mlp_ratio": 3.0, "qkv_bias": False, "norm_layer": nn.LayerNorm}
        super().__init__(embed_layer=stem, **{**defaults, **kwargs})
        for block in self.blocks if skip_lam != 1 else ():
            block.ls1, block.ls2 = ResidualScale(1 / skip_lam), ResidualScale(1 / skip_lam)
        self.aux_head = self._new_aux_head()

    def _new_aux_head(self) -> nn.Module:
        if self.num_classes < 1:
            return nn.Identity()
        weight = self.norm.weight
        head = nn.Linear(self.embed_dim, self.num_classes, device=weight.device, dtype=weight.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """timm's, for both classifiers.

        Raises:
            ValueError: pooling other than by the class token.
        """
        _require_token_pooling(global_pool or "token")
        super().reset_classifier(num_classes)
        self.aux_head = self._new_aux_head()

    def token_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] of the class token and [B, P, K] of the patches, for normalised tokens x [B, P + prefix, C]."""
        x = self.head_drop(x)
        return self.head(x[:, 0]), self.aux_head(x[:, self.num_prefix_tokens :])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, K] of normalised tokens x [B, N, C]; ``pre_logits``: the class token [B, C] instead."""
        if pre_logits:
            return self.head_drop(x[:, 0])
        logits, of_patches = self.token_logits(x)
        return logits + 0.5 * of_patches.amax(1)


def _require_token_pooling(global_pool: str) -> None:
    if global_pool != "token":
        raise ValueError(f"global_pool must be 'token', as LV-ViT reads class token and patches, got {global_pool!r}")


def _cfg(file: str = "", size: int = 224, **options: Any) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{file}" if file else "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "crop_pct": 0.9 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        **options,
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.tl_in1k": _cfg("v0.2.0/lvvit_t.pth"),
        "lvvit_s.tl_in1k": _cfg("1.0/lvvit_s-26M-224-83.3.pth.tar"),
        "lvvit_s.tl_in1k_384": _cfg("1.0/lvvit_s-26M-384-84.4.pth.tar", 384),
        "lvvit_m.tl_in1k": _cfg("1.0/lvvit_m-56M-224-84.0.pth.tar", crop_pct=1.0),
        "lvvit_m.tl_in1k_384": _cfg("1.0/lvvit_m-56M-384-85.4.pth.tar", 384),
        "lvvit_m.tl_in1k_448": _cfg("1.0/lvvit_m-56M-448-85.5.pth.tar", 448),
        "lvvit_l.tl_in1k_448": _cfg("1.0/lvvit_l-150M-448-86.2.pth.tar", 448),
        "lvvit_l.tl_in1k_512": _cfg("1.0/lvvit_l-150M-512-86.4.pth.tar", 512),
    }
)


def _build(variant: str, pretrained: bool, options: dict[str, Any], **shape: Any) -> LVViT:
    return build_model_with_cfg(
        LVViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **options},
    )


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: width 240, depth 12, 4 heads."""
    return _build("lvvit_t", pretrained, kwargs, embed_dim=240, depth=12, num_heads=4)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: width 384, depth 16, 6 heads, residuals halved; 6.6 GFLOPs."""
    return _build("lvvit_s", pretrained, kwargs, embed_dim=384, depth=16, num_heads=6, skip_lam=2.0)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: width 512, depth 20, 8 heads, residuals halved."""
    return _build("lvvit_m", pretrained, kwargs, embed_dim=512, depth=20, num_heads=8, skip_lam=2.0)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L: width 768, depth 24, 12 heads, residuals by a third, a stem of 128 channels."""
    shape = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128}
    return _build("lvvit_l", pretrained, kwargs, **shape)
