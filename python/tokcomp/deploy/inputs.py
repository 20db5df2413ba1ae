"""What a model takes: the shape, type and device of its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Inputs(NamedTuple):
    """The images that a model takes: [B, *shape]."""

    shape: tuple[int, int, int]  # channels, height, width
    dtype: torch.dtype
    device: torch.device

    def batch(self, images: int) -> Tensor:
        """A batch of this many black images."""
        return torch.zeros(images, *self.shape, dtype=self.dtype, device=self.device)

    def accepts(self, images: Tensor) -> bool:
        return images.dtype == self.dtype and images.device == self.device


def inputs_of(model: nn.Module, img_size: int | Sequence[int] | None = None) -> Inputs:
    """What a model in evaluation mode takes, at the given image size or the one in its own configuration.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is in training mode, on the meta device or on several devices, or its image size is unknown.
    """
    if not isinstance(model, nn.Module):
        hint = ""
        if type(model).__name__ == "Switchable":
            hint = ": a Switchable captures its own graphs, call its prepare(images)"
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"model must be in evaluation mode, got {training or 'one'} in training mode: call model.eval()"
        )
    device = _device(model)
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    weight = next(model.parameters()) if stem is None else stem.weight
    channels = 3 if stem is None else stem.in_channels
    height, width = _own_size(model) if img_size is None else _checked_size(img_size)
    return Inputs((channels, height, width), weight.dtype, device)


def checked_batch(name: str, batch: Any) -> int:
    """``batch``, if it is a valid number of images."""
    if isinstance(batch, bool) or not isinstance(batch, int):
        raise TypeError(f"{name} must be a whole number, got {batch!r}")
    if batch < 1:
        raise ValueError(f"{name} must be at least 1, got {batch}")
    return batch


def check_images(images: Any, inputs: Inputs) -> None:
    """Refuse anything but a batch of images of the model's type on its device; the model checks their size."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a Tensor [B, C, H, W], got {type(images).__name__}")
    if images.ndim != 4:
        hint = "; a single image is a batch with images[None]" if images.ndim == 3 else ""
        raise ValueError(f"images must be [B, C, H, W], got {list(images.shape)}{hint}")
    if images.device != inputs.device:
        raise ValueError(f"images must be on {inputs.device}, where the model is, got {images.device}")
    if images.dtype != inputs.dtype:
        name = str(inputs.dtype)
        raise TypeError(
            f"images must be {_short(inputs.dtype)}, as the model is, got {_short(images.dtype)}: "
            f"pass images.to({name})"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device(model: nn.Module) -> torch.device:
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        devices.setdefault(parameter.device, name)
    if not devices:
        raise ValueError(f"model must have parameters, got a {type(model).__name__} without any")
    if any(device.type == "meta" for device in devices):
        raise ValueError(
            "model must have weights, got one on the meta device: load them, or model.to_empty(device=...)"
        )
    if len(devices) > 1:
        found = " and ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"model must be on one device, got {found}: call model.to(device)")
    return next(iter(devices))


def _own_size(model: Any) -> tuple[int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
        size = config["input_size"][1:] if "input_size" in config else None
    if size is None:  # as transformers and torchvision say it
        size = getattr(getattr(model, "config", model), "image_size", None)
        size = (size, size) if isinstance(size, int) else size
    if size is None:
        raise ValueError(f"img_size must be given for a {type(model).__name__}, which has no image size of its own")
    return size[0], size[1]


def _checked_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(f"img_size must be a side or (height, width) in pixels, got {img_size!r}")
    return sides[0], sides[1]
