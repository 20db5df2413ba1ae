"""A timm ViT as transformers' own, for attentions that only transformers can be told to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import tokcomp
from tokcomp.bench.rivals import RivalError
from tokcomp.methods import Method

#: Competitor -> what transformers is told to attend by; None: our kernels attend.
TRANSFORMERS = {
    "tokcomp-transformers": None,
    "tokcomp-transformers-sdpa": "sdpa",
    "tokcomp-transformers-flex": "flex_attention",
}
#: timm's name -> transformers', inside a block.
_INSIDE = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
#: The same outside.
_OUTSIDE = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}


def build_transformers(name: str, model: Any, method: Method) -> Callable[[Tensor], Tensor]:
    """Images [B, C, H, W] to logits [B, classes], by the model compressed as one of transformers.

    Args:
        name: a key of :data:`TRANSFORMERS`.
        model: a plain timm VisionTransformer, in the precision that it is to run in.
        method: how it is compressed.

    Raises:
        RivalError: transformers is not installed.
    """
    implementation = TRANSFORMERS[name]
    own = as_transformers(model, implementation or "sdpa")
    tokcomp.compress(own, method, attention="stock" if implementation else "tokcomp")
    return lambda images: own(images).logits


def as_transformers(model: Any, attention: str) -> nn.Module:
    """transformers' ``ViTForImageClassification`` with the weights of a plain timm ViT, such as DeiT's.

    Args:
        model: a timm VisionTransformer with a class token, a linear head on it, and nothing that a plain ViT lacks.
        attention: for transformers' ``attn_implementation``.

    Raises:
        RivalError: transformers is not installed.
        RuntimeError: the model is no plain ViT.
    """
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise RivalError(f"transformers cannot be imported: pip install 'tokcomp[bench]' ({error})") from error
    block, patches = model.blocks[0], model.patch_embed
    settings: dict[str, Any] = dict(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        layer_norm_eps=model.norm.eps,
        image_size=patches.img_size[0],
        patch_size=patches.patch_size[0],
        num_labels=model.num_classes,
        attn_implementation=attention,
    )
    made = ViTForImageClassification(ViTConfig(**settings))
    made.load_state_dict(_renamed(model.state_dict()))
    return made.to(model.cls_token.device, model.cls_token.dtype).eval()


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's state under transformers' names; what a plain ViT does not have keeps its own, and so is not taken."""
    found = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if not name.startswith("blocks."):
            found[f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE else _OUTSIDE.get(name, name)] = value
            continue
        _, block, stem = stem.split(".", 2)
        there = f"vit.layers.{block}"
        if stem == "attn.qkv":
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[f"{there}.attention.{part}_proj.{kind}"] = rows
        else:
            found[f"{there}.{_INSIDE.get(stem, stem)}.{kind}"] = value
    return found
