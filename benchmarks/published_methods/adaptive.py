"""Whole models by A-ViT, ATS and DyMU, under which images keep different numbers of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokcomp
import torch
from tokcomp import learned
from torch import Tensor

from benchmarks.published_methods.clones import imported, silent
from benchmarks.published_methods.models import SHAPE, model_pair, plain_model
from benchmarks.published_methods.pair import Pair, images

#: Of A-ViT: with the published -75 no token would halt under random weights; this costs what is published, 3.6 GFLOPs.
HALTING = {"scale": 10.0, "shift": -6.0}
#: Tokens that DyMU's blocks merge away from the average image.
MERGED = 13


def avit(folder: Path) -> list[Pair]:
    """The published model masks tokens, rather than dropping them, and moves the masks to a GPU."""
    method = tokcomp.AViT(**HALTING)
    plain = plain_model()
    module = imported(folder, "timm.models.act_vision_transformer")
    settings = argparse.Namespace(act_mode=4, gate_scale=method.scale, gate_center=-method.shift, distr_prior_alpha=0.0)
    theirs = silent(lambda: module.VisionTransformer(**SHAPE, args=settings)).eval()
    theirs.load_state_dict(plain.state_dict())
    ours = tokcomp.compress(learned.attach(plain, method), method)
    return [model_pair(_without_gpu(theirs), ours, gflops=_mean_gflops(ours))]


def ats(folder: Path) -> list[Pair]:
    """With DROP_TOKENS, as its configuration of DeiT-S has it; padding counts among the tokens that it samples from."""
    plain = plain_model()
    module = imported(folder, "libs.models.transformers.vit", ("libs", "libs.models", "libs.models.transformers"))
    theirs = module.ViT(SimpleNamespace(VIT=_ViTSettings())).eval()
    missing, unexpected = theirs.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("out_zero_mask") for name in missing), (missing, unexpected)
    ours = tokcomp.compress(plain, tokcomp.ATS(plain.patch_embed.num_patches))
    return [model_pair(lambda x: theirs(x)[0], ours, gflops=_mean_gflops(ours), alone=True)]


def dymu(folder: Path) -> list[Pair]:
    """Of a batch, the published code divides by sizes that are a little too large, and its sort is not stable."""
    plain = plain_model()
    method = tokcomp.calibrate(plain, [images(16, torch.Generator().manual_seed(100))[0]], MERGED)
    module = imported(folder / "src", "open_clip.tome", ("open_clip",))
    depth = len(plain.blocks)
    theirs = silent(
        lambda: module.ToMEVisionTransformer(**SHAPE, block_fn=module.ToMEBlock, r_total=MERGED * depth)
    ).eval()
    theirs.load_state_dict(plain.state_dict(), strict=False)
    # Its r bounds what a threshold merges in no other way than that it must not be 0.
    theirs.set_layer_thresholds(list(method.thresholds))
    ours = tokcomp.compress(plain, method)
    return [model_pair(theirs, ours, gflops=_mean_gflops(ours), alone=True)]


def _mean_gflops(model: Any) -> float:
    """Over the images of a batch of 16, by the tokens that each keeps."""
    return float(tokcomp.flops(model, images=images(16, torch.Generator().manual_seed(0))[0])) / 1e9


class _ViTSettings(SimpleNamespace):
    """What ATS's model reads of its configuration; None for what is not named."""

    def __init__(self) -> None:
        tokens = [197] * SHAPE["depth"]
        super().__init__(
            IMG_SIZE=224,
            PATCH_SIZE=16,
            IN_CHANNELS=3,
            NUM_CLASSES=1000,
            EMBED_DIM=SHAPE["embed_dim"],
            DEPTH=SHAPE["depth"],
            NUM_HEADS=SHAPE["num_heads"],
            MLP_RATIO=4.0,
            QKV_BIAS=True,
            QK_SCALE=None,
            REPRESENTATION_SIZE=None,
            DROP_RATE=0.0,
            ATTN_DROP_RATE=0.0,
            DROP_PATH_RATE=0.0,
            HYBRID_BACKBONE=None,
            NORM_LAYER=None,
            ATS_BLOCKS=list(range(3, SHAPE["depth"])),
            NUM_TOKENS=tokens,
            DROP_TOKENS=True,
        )


def _without_gpu(model: Any) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with _cuda_is_here():
            return model(x)

    return call


@contextmanager
def _cuda_is_here() -> Iterator[None]:
    """``tensor.cuda()`` gives the tensor itself."""
    before = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.cuda = before  # type: ignore[method-assign]
