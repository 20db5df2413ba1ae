"""compress, quantize, restore, trace: what users call."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter, find_adapter
from tokcomp.blocks.state import compose_sources
from tokcomp.folded import fold_of, require_same_method
from tokcomp.in_flight import require_idle
from tokcomp.methods import Method, PassageMethod, ToMe

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
        ValueError: the method does not fit the model (number of blocks, prefix tokens, class token), its trained parts
            are missing, or a ToCom plugin that was trained with another method is folded in.
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
    if attention == "stock" and method.varies:
        raise ValueError(
            f"attention must be 'tokcomp' for {type(method).__name__}, under which images keep different numbers of "
            "tokens, got 'stock'"
        )
    method.validate(geometry)
    if isinstance(method, PassageMethod):
        adapter.check_passage(model, method)
    require_same_method(fold_of(model), method.name)
    require_idle(model)
    _change(adapter, model, _State(method.fitted(geometry), attention == "stock", adapter.uses_int8(model)))
    return model


def quantize(model: ModelT, dtype: str = "int8") -> ModelT:
    """Make a model compute its linear layers in int8, in place: on CPU, for inference, without retraining.

    Weights have a scale for each output, activations one for each token, found in every call, so that an image's logits
    do not depend on its batch. Attention, norms, residuals, patch embedding and head stay float32. Parameters and
    state_dict stay as they are, and so does the method by which the model is compressed, also if it is changed later;
    a plain model runs through our blocks without dropping a token. :func:`restore` undoes it all.

    Args:
        model: compressed or plain, in evaluation mode, float32, on CPU: a timm VisionTransformer of plain blocks.
        dtype: "int8".

    Returns:
        ``model`` itself. Calls that want gradients, or under autocast or torch.compile, raise RuntimeError.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood, or its family has no products in int8.
        ValueError: the model is in training mode, not float32 or not on CPU, or a block has parts that the fast path
            does not know; or ``dtype`` is another.
        RuntimeError: another thread is calling the model.
    """
    if dtype != "int8":
        raise ValueError(f"dtype must be 'int8', got {dtype!r}")
    adapter = find_adapter(model)
    adapter.check_int8(model)
    method = adapter.method(model)
    if method is None:
        method = ToMe(0).fitted(adapter.geometry(model))
        adapter.validate(model, method)
    require_idle(model)
    _change(adapter, model, _State(method, adapter.keeps_attention(model), True))
    return model


def restore(model: ModelT) -> ModelT:
    """Undo :func:`compress` and :func:`quantize`, in place: the model is exactly as it was before.

    A plain model stays as it is.

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
            _change(adapter, model, _State(None))
    return model


class _State(NamedTuple):
    """All that compress and quantize set; a plain model has no method."""

    method: Method | None
    stock: bool = False
    int8: bool = False


def _change(adapter: Adapter, model: nn.Module, state: _State) -> None:
    """Change to a state; change back if a call began in the meantime."""
    before = _State(adapter.method(model), adapter.keeps_attention(model), adapter.uses_int8(model))
    _set(adapter, model, state)
    try:
        require_idle(model)
    except RuntimeError:
        _set(adapter, model, before)
        raise


def _set(adapter: Adapter, model: nn.Module, state: _State) -> None:
    adapter.unpatch(model)
    if state.method is None:
        return
    adapter.patch(model, state.method)
    if state.stock:
        adapter.keep_attention(model)
    if state.int8:
        adapter.use_int8(model)


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
    method = adapter.method(model)
    from_start = isinstance(method, PassageMethod) and method.maps_positions
    for source in sources:
        if source is not None:
            current = source if from_start else compose_sources(current, source)
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
