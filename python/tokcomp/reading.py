"""Reading files that may come from anyone, or be damaged: only as data, and refused by a ValueError whatever they hold.

Tensors are written with a digest of everything in their file. A file that has changed since, as on a bad disk, is
refused; a file without a digest, from another program or an older version, is accepted as it is. A digest is not a
signature: anyone who tampers with a file can write a matching digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

#: The digest's key in a safetensors file's metadata and in a checkpoint's dictionary.
DIGEST = "tokcomp_sha256"
#: Maximum nesting of lists and objects. Our own data has six levels.
_DEEPEST = 64


def parse_json(text: str | bytes) -> Any:
    """JSON data.

    Raises:
        ValueError: not JSON, not UTF-8, or nested more than 64 deep.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"it must be nested {_DEEPEST} deep at most, got more") from None
    level, depth = [data], 0
    while level := [value for value in level if isinstance(value, (dict, list))]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"it must be nested {_DEEPEST} deep at most, got more")
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return data


def read_json(path: Path) -> Any:
    """The JSON data of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as :func:`parse_json`; the message names the file.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; ``what`` describes it in messages: "a ToCom plugin".

    Raises:
        OSError: the file cannot be read.
        ValueError: it is truncated, not safetensors, or does not match its digest; the message names it.
    """
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except Exception as error:  # SafetensorError, and what unknown element types raise
        raise ValueError(f"{path}: must be {what}, got a file that does not load ({_reason(error)})") from error
    found = metadata.pop(DIGEST, None)
    _require_digest(path, found, [metadata, tensors])
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors; empty if there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # as in read_tensors
        return {}


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a digest. Equal contents make equal files: the metadata is in order."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {**metadata, DIGEST: digest([dict(metadata), plain])}
    data = save(plain, about)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(about.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the tensors aligned
    return len(text).to_bytes(8, "little") + text + data[start:]


def read_pickle(path: Path, what: str, allowed: Sequence[Any] = ()) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors and plain data, and objects of the classes ``allowed``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not load, or holds anything else (which is never run); the message names it.
    """
    try:
        # Given a path, torch goes by the suffix.
        with path.open("rb") as file, torch.serialization.safe_globals(list(allowed)):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of a damaged file: OSError, KeyError, struct.error, AssertionError, ...
        raise ValueError(f"{path}: must be {what}, got a file that does not load ({_reason(error)})") from error


def require_digest(path: Path, data: Mapping[str, Any]) -> None:
    """Raise ValueError if a dictionary has a digest and does not match it."""
    _require_digest(path, data.get(DIGEST), {name: value for name, value in data.items() if name != DIGEST})


def digest(data: Any) -> str:
    """SHA-256 of nested tensors, numbers, strings, lists and dictionaries, independent of the dictionaries' order."""
    sha = hashlib.sha256()
    pending = [data]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
            sha.update(value.flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            sha.update(f"dict {len(value)};".encode())
            for key in sorted(value, key=repr):
                pending += [value[key], key]
        elif isinstance(value, (list, tuple)):
            sha.update(f"list {len(value)};".encode())
            pending += value
        else:
            sha.update(f"{type(value).__name__} {value!r};".encode())
    return sha.hexdigest()


def _require_digest(path: Path, found: Any, data: Any) -> None:
    if found is not None and found != digest(data):
        raise ValueError(f"{path}: must be as it was written, got other contents: it is damaged; take another copy")


def _reason(error: Exception) -> str:
    # PyTorch's own advice, to load the file unsafely, comes first; the actual obstacle comes after it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line), lines[0] if lines else type(error).__name__)[:200]
