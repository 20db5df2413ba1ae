"""The user's mistakes, and checks of where output is to go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokcomp.files import write_whole


class UserError(Exception):
    """Something the user can fix. The message names the argument, the rule, what arrived and what to do."""

    #: Exit status of the command.
    status = 2


class RunFailed(UserError):
    """A run that failed through no mistake in the command."""

    status = 1


@contextmanager
def blame(argument: str, *, hint: str = "") -> Iterator[None]:
    """Turn a ValueError or TypeError from the library into an error about one argument."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(f"{argument}: {error}{'; ' + hint if hint else ''}") from error


def check_output_folder(argument: str, folder: Path) -> Path:
    """Refuse, before any work, a folder that could not be written to. Creates nothing."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"{argument} must be a folder, got '{folder}' and '{nearest}' is a file; choose another name")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{argument} must be writable, got '{folder}' and '{nearest}' is not; choose another folder")
    return folder


def check_output_file(argument: str, path: Path) -> Path:
    """Refuse, before any work, a file that could not be written."""
    if path.is_dir():
        raise UserError(f"{argument} must be a file, got the folder '{path}'; add a file name")
    check_output_folder(f"the folder of {argument}", path.parent)
    return path


def save(argument: str, path: Path, content: str | bytes) -> None:
    """Write a result whole; a disk that is full, say, is an error of the run that names the argument."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise RunFailed(f"{argument}: '{path}' could not be written: {error}; what was there before is kept") from error
