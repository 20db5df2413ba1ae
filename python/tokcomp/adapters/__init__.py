"""Model families. An adapter knows where a family keeps its attention, residuals and pooling, never a method."""

from __future__ import annotations

from torch import nn

from tokcomp.adapters.base import Adapter, BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.multihead import OpenClipViT, TorchvisionViT
from tokcomp.adapters.refusals import reason_for
from tokcomp.adapters.swap import original_class
from tokcomp.adapters.timm_caformer.adapter import TimmCAFormer
from tokcomp.adapters.timm_eva import TimmEva
from tokcomp.adapters.timm_lvvit import TimmLVViT
from tokcomp.adapters.timm_naflex import TimmNaFlexVit
from tokcomp.adapters.timm_relpos import TimmBeit, TimmRelPos
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.adapters.transformers_vit import (
    TransformersCLIP,
    TransformersDinov2,
    TransformersDinov3,
    TransformersSiglip,
    TransformersViT,
)

#: One adapter per family, asked in this order.
ADAPTERS: list[Adapter] = [
    TimmLVViT(),
    TimmVisionTransformer(),
    TimmEva(),
    TimmNaFlexVit(),
    TimmBeit(),
    TimmRelPos(),
    TimmCAFormer(),
    TransformersViT(),
    TransformersDinov2(),
    TransformersDinov3(),
    TransformersCLIP(),
    TransformersSiglip(),
    TorchvisionViT(),
    OpenClipViT(),
]

__all__ = ["ADAPTERS", "Adapter", "BlockCost", "Cost", "UnsupportedModelError", "find_adapter", "register"]


def register(adapter: Adapter) -> None:
    """Let :func:`tokcomp.compress` and all else know another family; the ones before it are asked first.

    Raises:
        TypeError: no Adapter object.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be an Adapter object, got {adapter!r}")
    ADAPTERS.append(adapter)


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that understands ``model`` and everything in it.

    Raises:
        TypeError: ``model`` is no module, or (UnsupportedModelError) one that no adapter understands; the message
            names the class that is in the way.
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)  # of a transformers pipeline
        hint = f"; pass its .model, a {type(inner).__name__}" if isinstance(inner, nn.Module) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    for adapter in ADAPTERS:
        if adapter.claims(model):
            adapter.check(model)
            return adapter
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    reason, path = reason_for(model), _path_to_known(model)
    if isinstance(inner, nn.Module):
        hint = f"it wraps a {type(inner).__name__}: pass that, and wrap it afterwards"
    elif path is not None:
        hint = f"it holds a {original_class(model.get_submodule(path)).__name__}: pass model.{path}"
    elif reason is not None:
        hint = reason
    else:
        hint = "understood: " + ", ".join(adapter.family for adapter in ADAPTERS)
    cls = type(model)
    # Several libraries have a VisionTransformer.
    raise UnsupportedModelError(
        f"a {cls.__module__}.{cls.__qualname__} is not a model that tokcomp understands; {hint}"
    )


def _path_to_known(model: nn.Module) -> str | None:
    """The path of the first part of ``model`` that some adapter claims."""
    for path, module in model.named_modules():
        if path and any(adapter.claims(module) for adapter in ADAPTERS):
            return path
    return None
