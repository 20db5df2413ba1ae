"""Weights from a file that may be anybody's: read as tensors alone, never as code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Where training scripts keep the weights, in the order of preference: averaged ones first, as timm has it.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
#: What DistributedDataParallel and torch.compile put before a name.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a model: safetensors, what ``torch.save`` wrote, or a published ``.npz`` of JAX's.

    Raises:
        ValueError: the file holds anything but tensors and plain data, which is never run, or no weights.
        RuntimeError: the weights are not this model's.
    """
    if path.suffix in (".npz", ".npy"):
        own: Any = model
        if not hasattr(own, "load_pretrained"):
            raise ValueError(f"a {path.suffix} file needs a model that timm loads such files into")
        own.load_pretrained(str(path))  # numpy refuses pickled objects by itself
        return
    model.load_state_dict(read_weights(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Raises:
        ValueError: as :func:`load_weights` says.
    """
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        found: Any = load_file(path)
    else:
        try:
            # Training scripts keep their options beside the weights; a namespace of plain data runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(
                f"it must hold tensors and plain data, and nothing else is loaded ({_first_line(error)}); save the "
                "model's state_dict(), as safetensors for one"
            ) from error
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if found.get(key) is not None), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it must hold tensors by name, a model's state_dict()")
    return {_plain_name(name): value for name, value in found.items()}


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def _first_line(error: Exception) -> str:
    # PyTorch's own advice, to load the file unsafely, comes first; what is in the way stands after it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)[:200]
