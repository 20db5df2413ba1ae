"""Checkpoints: written whole or not at all, read back without running code, and tied to their run's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokcomp.files import replacing
from tokcomp.reading import DIGEST, digest, read_pickle, require_digest

VERSION = 1


class CheckpointError(ValueError):
    """A run's folder holds another run, or its checkpoint is missing, damaged or made with other settings."""


def save_checkpoint(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) so that ``path`` is the old checkpoint or the new one.

    Args:
        path: the file; its folder is created.
        kind: the kind of run, such as "search" or "finetune": :func:`load_checkpoint` refuses another.
        state: what to save.

    Raises:
        OSError: it could not be written, for example because the disk is full.
    """
    try:
        with replacing(path) as file:
            data = {"format": f"tokcomp.{kind}", "version": VERSION, "state": dict(state)}
            torch.save({**data, DIGEST: digest(data)}, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch's writer hides the file's own error
            raise error.__context__ from None
        raise


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote, on the CPU.

    Raises:
        CheckpointError: the file is missing, is not a checkpoint, is damaged, or is one of another kind or version; the
            message names it.
    """
    if not path.is_file():
        raise CheckpointError(f"the checkpoint must be a file, got '{path}', which does not exist")
    try:
        data = read_pickle(path, f"a checkpoint of tokcomp {kind}")
        if isinstance(data, dict):
            require_digest(path, data)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != f"tokcomp.{kind}":
        raise CheckpointError(f"{path}: must be a checkpoint of tokcomp {kind}, got {found or 'another kind of file'}")
    if data.get("version") != VERSION:
        found = data.get("version")
        raise CheckpointError(f"{path}: version must be {VERSION}, got {found!r}; another tokcomp wrote it")
    state = data.get("state")
    if not (isinstance(state, dict) and _is_named(state) and _is_named(state.get("settings"))):
        raise CheckpointError(f"{path}: must hold a run's state and settings, got neither; another program wrote it")
    return state


def _is_named(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(name, str) for name in data)


def check_same_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Refuse to resume with other settings, since the result would belong to neither run.

    A setting that an older checkpoint does not have must be at its empty value.

    Raises:
        CheckpointError: the first setting that differs, with both values.
    """
    for name in sorted({*saved, *now}):
        if saved.get(name) != now.get(name) and (name in saved or now[name] not in ({}, [])):
            raise CheckpointError(
                f"a resumed run must keep its settings, got {name} = {now.get(name)!r}, but {where} was started with "
                f"{saved.get(name)!r}; restore it, or choose another output folder"
            )
