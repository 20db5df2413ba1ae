"""What the patch embedding of a timm VisionTransformer takes and costs, a convolutional backbone included."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokcomp.adapters.base import UnsupportedModelError


def image_shape(model: Any) -> tuple[int, int, int]:
    """Channels, height and width of the model's own images."""
    # The convolution that sees the image comes first, the projection of a hybrid's feature map last.
    first = next(part for part in model.patch_embed.modules() if isinstance(part, nn.Conv2d))
    height, width = model.patch_embed.img_size
    return first.in_channels, height, width


def is_plain_projection(patch_embed: nn.Module) -> bool:
    """Whether patches are embedded by one convolution without overlap, which Alg. 2 counts per token."""
    return type(patch_embed).__name__ == "PatchEmbed" and isinstance(getattr(patch_embed, "proj", None), nn.Conv2d)


def counted_embedding(model: Any, img_size: tuple[int, int] | None = None) -> int:
    """Multiply-adds of any other patch embedding for one image: the products of a run on shapes alone.

    ``img_size``: height and width of the image, by default the model's own.

    Raises:
        UnsupportedModelError: it has no convolution to start with, or does not run without data.
    """
    patch_embed = model.patch_embed
    unknown = f"the multiply-adds of a {type(patch_embed).__name__} are not known"
    try:
        channels, *own_size = image_shape(model)
    except (StopIteration, TypeError, AttributeError):
        raise UnsupportedModelError(f"{unknown}: it names no image size, or has no convolution") from None
    # A copy without memory: the model itself may be running in another thread.
    tensors = [*patch_embed.parameters(), *patch_embed.buffers()]
    stand_ins = {id(tensor): _on_meta(tensor) for tensor in tensors}
    shadow: Any = copy.deepcopy(patch_embed, dict(stand_ins)).eval()
    shadow.strict_img_size = False  # what it costs at another size than it was built for
    images = torch.empty(
        1, channels, *(img_size or own_size), dtype=next(patch_embed.parameters()).dtype, device="meta"
    )
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shadow(images)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UnsupportedModelError(f"{unknown}: it does not run on shapes alone ({reason})") from error
    return counter.get_total_flops() // 2  # a multiplication and an addition each


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
