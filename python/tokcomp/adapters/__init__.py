"""Model families. An adapter knows where a family keeps its attention, residuals and pooling, never a method."""

from __future__ import annotations

from torch import nn

from tokcomp.adapters.base import Adapter, BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.timm_caformer.adapter import TimmCAFormer
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer

#: One adapter per family, asked in this order.
ADAPTERS: tuple[Adapter, ...] = (TimmVisionTransformer(), TimmCAFormer())

__all__ = ["ADAPTERS", "Adapter", "BlockCost", "Cost", "UnsupportedModelError", "find_adapter"]


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that understands ``model`` and everything in it.

    Raises:
        TypeError: ``model`` is no module, or (UnsupportedModelError) one that no adapter understands; the message
            names the class that is in the way.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for adapter in ADAPTERS:
        if adapter.claims(model):
            adapter.check(model)
            return adapter
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module):
        hint = f"it wraps a {type(inner).__name__}: pass that, and wrap it afterwards"
    else:
        hint = "understood: " + ", ".join(adapter.family for adapter in ADAPTERS)
    cls = type(model)
    # Several libraries have a VisionTransformer.
    raise UnsupportedModelError(
        f"a {cls.__module__}.{cls.__qualname__} is not a model that tokcomp understands; {hint}"
    )
