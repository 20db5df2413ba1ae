"""What a model refuses to take for images, in words of the argument rather than of the kernel that would fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_images(entry: nn.Module, images: Any) -> None:
    """Refuse what ``entry``, a library's own first module of a model, cannot take: [B, C, H, W], dense and floating.

    An entry that is someone else's, or has hooks, may take anything: it answers for itself. Sizes, dtype against the
    weights' and devices are left to timm and PyTorch, which name them well.

    Raises:
        TypeError: no tensor, or one that is not dense or not floating.
        ValueError: another number of dimensions or of channels.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [B, C, H, W], got {type(images).__name__}")
    if entry._forward_pre_hooks or not type(entry).__module__.startswith(("timm.", "torch.nn.")):
        return
    if images.is_nested or images.layout != torch.strided:
        got = (
            "a nested one"
            if images.is_nested
            else f"one of layout {str(images.layout).removeprefix('torch.').lstrip('_')}"
        )
        raise TypeError(f"images must be one dense tensor, got {got}; stack the images, or call .to_dense()")
    shape = list(images.shape)
    if len(shape) != 4:
        hint = "; images.unsqueeze(0) makes a batch of one image" if len(shape) == 3 else ""
        raise ValueError(f"images must be [B, C, H, W], got a tensor of shape {shape}{hint}")
    first = next((part for part in entry.modules() if isinstance(part, nn.Conv2d)), None)
    if first is not None and shape[1] != first.in_channels:
        hint = "; images.permute(0, 3, 1, 2) puts the channels first" if shape[3] == first.in_channels else ""
        raise ValueError(
            f"images must have the model's {first.in_channels} channels, [B, {first.in_channels}, H, W], got a tensor "
            f"of shape {shape}{hint}"
        )
    if not images.is_floating_point():
        dtype = str(images.dtype).removeprefix("torch.")
        raise TypeError(f"images must be floating point, normalized as the model takes them, got {dtype}")


def refuse_symbols(value: Any) -> None:
    """Refuse ``torch.fx.symbolic_trace``, whose proxies have no shapes to count tokens by.

    Raises:
        RuntimeError: ``value`` is such a proxy.
    """
    if isinstance(value, torch.fx.Proxy):
        raise RuntimeError(
            "a compressed model cannot be traced by torch.fx.symbolic_trace: its token counts need real shapes; use "
            "torch.export.export or tokcomp.export"
        )
