"""Files that are written whole or not at all, and folders that only one process at a time writes into."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in place of ``path``: replaces it if the block succeeds, and otherwise leaves it as it was.

    Creates the folder. A process that is killed leaves at most a hidden ``.<name>.*.tmp`` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results get ordinary permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_drafts(folder: Path) -> None:
    """Remove the drafts of :func:`replacing` that killed processes left. Only for the folder's sole writer."""
    for draft in folder.glob(".*.tmp"):
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that, whatever interrupts, it is either complete or as it was before. Creates its folder."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs while the block runs. Creates it, and removes it again if it stays empty.

    The system releases the lock however the process ends. On systems without such locks (Windows) nothing is locked.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    handle = _locked(lock)
    try:
        yield
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)
            os.close(handle)
        if made:
            with suppress(OSError):
                folder.rmdir()


def _locked(path: Path) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike flock's, this lock is not shared with forked loader processes, which may outlive a killed run.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed the file between the two calls.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except OSError as error:
            os.close(handle)
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise BlockingIOError(f"another run is writing into '{path.parent}'; wait for it to end") from error
            raise
        os.close(handle)
