"""Weights from a file that may come from anyone: read only as tensors, never as code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.learned import has_parts, load_state
from tokcomp.reading import read_pickle, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

WHAT = "only tensors and plain data, for example a model's state_dict() as safetensors"
#: Where training scripts keep the weights, in order of preference: averaged ones first, as in timm.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
#: What DistributedDataParallel and torch.compile put before a name.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into a model: safetensors, a ``torch.save`` file, or a published ``.npz`` file from JAX.

    Trained parts of a learned method that it holds come along.

    Raises:
        ValueError: the file holds anything but tensors and plain data (nothing in it is run), or no weights.
        RuntimeError: the weights are not this model's.
    """
    if path.suffix in (".npz", ".npy"):
        own: Any = model
        if not hasattr(own, "load_pretrained"):
            raise ValueError(f"a {path.suffix} file needs a model that timm loads such files into")
        own.load_pretrained(str(path))  # numpy itself refuses pickled objects
        return
    tensors = read_weights(path)
    if has_parts(tensors):
        try:
            load_state(model, tensors)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
    else:
        model.load_state_dict(tensors)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Raises:
        ValueError: as in :func:`load_weights`.
    """
    import torch

    if path.suffix == ".safetensors":
        found: Any = read_tensors(path, WHAT)[0]
    else:
        # Training scripts keep their options beside the weights; a namespace of plain data runs no code.
        found = read_pickle(path, WHAT, [argparse.Namespace])
    if isinstance(found, dict):
        found = next((found[key] for key in _KEYS if found.get(key) is not None), found)
    if not isinstance(found, dict) or not found or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it must hold tensors by name, a model's state_dict()")
    return {_plain_name(name): value for name, value in found.items()}


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
