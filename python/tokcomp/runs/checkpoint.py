"""Checkpoints: there whole or not at all, read back without running code, and tied to the settings of their run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokcomp.files import replacing

VERSION = 1


def save_checkpoint(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) so that ``path`` is the old checkpoint or the new one.

    Args:
        path: the file; its folder is made.
        kind: what run this is, "search" or "finetune": :func:`load_checkpoint` refuses another.
        state: what to keep.
    """
    with replacing(path) as file:
        torch.save({"format": f"tokcomp.{kind}", "version": VERSION, "state": dict(state)}, file)


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is not there, is no checkpoint, or is one of another kind or version; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"the checkpoint must be a file, got '{path}', which is not there")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{path}: must be a checkpoint of tokcomp {kind}, got a file that does not load ({reason})"
        raise ValueError(message) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != f"tokcomp.{kind}":
        raise ValueError(f"{path}: must be a checkpoint of tokcomp {kind}, got {found or 'another kind of file'}")
    if data["version"] != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {data['version']!r}; another tokcomp wrote it")
    state: dict[str, Any] = data["state"]
    return state


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Refuse to resume under other settings, since the result would be neither run's.

    Raises:
        ValueError: the first setting that differs, with both values.
    """
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name):
            raise ValueError(
                f"a resumed run must keep its settings, got {name} = {now.get(name)!r} where {where} was started with "
                f"{saved.get(name)!r}; restore it, or choose another output folder"
            )
