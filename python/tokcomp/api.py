"""compress, restore, trace: what users call."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter, find_adapter
from tokcomp.blocks.state import compose_sources
from tokcomp.folded import fold_of, require_same_method
from tokcomp.in_flight import require_idle
from tokcomp.methods import Method

ModelT = TypeVar("ModelT", bound=nn.Module)


def compress(model: ModelT, method: Method, attention: str = "tokcomp") -> ModelT:
    """Make a model compress its tokens by ``method``, in place.

    Parameters, state_dict keys, hooks and training flags stay as they are. A model that is already compressed switches
    to the new method. Everything is checked first: if this raises, the model is unchanged. No other thread may call the
    model during the change; :class:`tokcomp.Switchable` is for models that serve.

    Args:
        model: of a family in docs/adding-a-model-family.md: timm's VisionTransformer, Eva or CAFormer, the ViTs and
            vision towers of transformers, torchvision and open_clip, or one that was registered.
        method: :class:`DiffRate`, :class:`ToMe`, :class:`EViT` or another :class:`Method`.
        attention: "tokcomp" for our kernels, which deliver the tokens' ranks with the attention; "stock" for the
            model's own: PyTorch's scaled_dot_product_attention, or what ``attn_implementation`` of transformers names.
            Sizes then come as a mask, and the ranks take one more pass over the keys.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``method`` is not a Method; or (UnsupportedModelError) the model, or a module in it, is not
            understood.
        ValueError: the method does not fit the model (number of blocks, prefix tokens, class token), or a ToCom plugin
            that was trained with another method is folded in.
        RuntimeError: another thread is calling the model.
    """
    if not isinstance(method, Method):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method must be a DiffRate, ToMe, EViT or other Method object, got {got}")
    adapter = find_adapter(model)
    geometry = adapter.geometry(model)
    adapter.validate(model, method)
    if attention not in ("tokcomp", "stock"):
        raise ValueError(f"attention must be 'tokcomp' or 'stock', got {attention!r}")
    if attention == "stock":
        adapter.check_attention(model, method)
    method.validate(geometry)
    require_same_method(fold_of(model), method.name)
    require_idle(model)
    _change(adapter, model, method.fitted(geometry), attention == "stock")
    return model


def restore(model: ModelT) -> ModelT:
    """Undo :func:`compress`, in place: the model is exactly as it was before. A plain model stays as it is.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: another thread is calling the model, which stays compressed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    from tokcomp.adapters import ADAPTERS

    for adapter in ADAPTERS:
        if adapter.claims(model) and adapter.method(model) is not None:
            require_idle(model)
            _change(adapter, model, None)
    return model


def _change(adapter: Adapter, model: nn.Module, method: Method | None, stock: bool = False) -> None:
    """Change to a method, or to a plain model if None; change back if a call began in the meantime."""
    before, before_stock = adapter.method(model), adapter.keeps_attention(model)
    _set(adapter, model, method, stock)
    try:
        require_idle(model)
    except RuntimeError:
        _set(adapter, model, before, before_stock)
        raise


def _set(adapter: Adapter, model: nn.Module, method: Method | None, stock: bool) -> None:
    adapter.unpatch(model)
    if method is not None:
        adapter.patch(model, method)
        if stock:
            adapter.keep_attention(model)


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> list[Tensor]:
    """For each block, where each original token is after it.

    Args:
        model: compressed, or plain (then every token stays where it is).
        images: [B, 3, H, W].

    Returns:
        One int64 map per block, each [B, P + prefix]: for each original token, the slot of that block's output that
        holds it, or -1 if it was pruned. Tokens that EViT fused are in the fused token's slot.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the images are of a size that the model's schedule is not for.
    """
    adapter = find_adapter(model)
    x, sources = adapter.sources(model, images)
    maps: list[Tensor] = []
    num_tokens = next((source.shape[1] for source in sources if source is not None), x.shape[1])
    current = torch.arange(num_tokens, device=x.device).expand(x.shape[0], -1)
    for source in sources:
        if source is not None:
            current = compose_sources(current, source)
        maps.append(current.clone())
    return maps


def uncompress(features: Tensor, source: Tensor, fill: Tensor | None = None) -> Tensor:
    """Give every position its token again. Differentiable in ``features`` and ``fill``.

    For features of a compressed model's last block, ``source`` is ``tokcomp.trace(model, images)[-1]``.

    Args:
        features: [B, M, C], a token for each slot.
        source: [B, N] int64, the slot that each position is in; -1 where its token was pruned.
        fill: [B, N, C], what a pruned position gets; zeros by default.

    Returns:
        [B, N, C]: merged positions share a token.

    Raises:
        TypeError: no tensor.
        ValueError: shapes that do not fit together.
    """
    for name, value in (("features", features), ("source", source)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    restored: Tensor = torch.ops.tokcomp.unmerge(features, source, pruned_fill=fill)
    return restored
