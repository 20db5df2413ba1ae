"""Plugins in files: safetensors with metadata, and the names of the published code."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcomp.files import write_whole
from tokcomp.reading import parse_json, read_pickle, read_tensors, tensors_to_bytes
from tokcomp.tocom.layers import Width
from tokcomp.tocom.variants import STEPS, check_arithmetic, num_slots

FORMAT = "tokcomp.tocom"
#: The name of a plugin's file in a folder of ``save_pretrained``.
FILE = "tocom.safetensors"
#: The second is for another arithmetic than the published one, which readers of the first do not know.
VERSIONS = ("1", "2")
WHAT = "a ToCom plugin"
_PARTS = ("q_down", "q_up", "v_down", "v_up")
_PUBLISHED = re.compile(r"(?:module\.|model\.)*blocks\.(\d+)\.attn\.([qv])_tocom\.adapter_(down|up)\.weight")
_PUBLISHED_RANK = 2


class Contents(NamedTuple):
    """What a plugin's file holds; tensors are named as in the plugin's state_dict."""

    rank: int
    max_degree: int
    widths: list[Width]
    tensors: dict[str, Tensor]
    method: str | None = None
    provenance: dict[str, Any] | None = None
    arithmetic: str = STEPS


def write_plugin(path: Path, contents: Contents) -> None:
    """Write ``contents`` whole or not at all.

    Raises:
        TypeError: the method is not a string, or the provenance not JSON data.
    """
    if contents.method is not None and not isinstance(contents.method, str):
        raise TypeError(f"method must be a name or None, got {contents.method!r}")
    metadata = {
        "format": FORMAT,
        "version": VERSIONS[contents.arithmetic != STEPS],
        "rank": str(contents.rank),
        "max_degree": str(contents.max_degree),
        "depth": str(len(contents.widths)),
        "width": json.dumps(_one_if_equal([width.tokens for width in contents.widths])),
        "attention_width": json.dumps(_one_if_equal([width.attention for width in contents.widths])),
    }
    if contents.arithmetic != STEPS:
        metadata["arithmetic"] = contents.arithmetic
    if contents.method is not None:
        metadata["method"] = contents.method
    if contents.provenance is not None:
        try:
            metadata["provenance"] = json.dumps(contents.provenance, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must be JSON data, got {contents.provenance!r} ({error})") from error
    write_whole(path, tensors_to_bytes(contents.tensors, metadata))


def read_plugin(path: Path) -> Contents:
    """Read a plugin, in our format or the published code's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a plugin, truncated, damaged, of another version, or with tensors that do not fit together or
            are not finite.
    """
    with path.open("rb") as file:
        start = file.read(2)
    tensors, metadata = _read_torch(path) if start in (b"PK", b"\x80\x02") else read_tensors(path, WHAT)
    if metadata.get("format") == FORMAT:
        return _read_ours(path, tensors, metadata)
    published = {match.groups(): tensors[name] for name in tensors if (match := _PUBLISHED.fullmatch(name))}
    if not published:
        raise ValueError(f"{path}: must be a ToCom plugin, got a file of {len(tensors)} other tensors")
    return _read_published(path, published)


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = read_pickle(path, WHAT)
    for wrapper in ("state_dict", "model"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: must be a ToCom plugin, got a {type(data).__name__}")
    return {str(name): tensor for name, tensor in data.items() if isinstance(tensor, Tensor)}, {}


def _read_ours(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Contents:
    version = metadata.get("version")
    if version not in VERSIONS:
        raise ValueError(f"{path}: version must be {' or '.join(VERSIONS)}, got {version}; another tokcomp wrote it")
    try:
        rank, max_degree, depth = (int(metadata[name]) for name in ("rank", "max_degree", "depth"))
        if depth > len(tensors):  # before anything is made as long as the file says
            raise ValueError(f"{depth} blocks in {len(tensors)} tensors")
        tokens, attention = (_per_block(parse_json(metadata[name]), depth) for name in ("width", "attention_width"))
        arithmetic = STEPS if version == VERSIONS[0] else check_arithmetic(metadata["arithmetic"])
        provenance = parse_json(metadata["provenance"]) if "provenance" in metadata else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the metadata must say rank, max_degree, depth and widths ({error})") from error
    widths = [Width(*width) for width in zip(tokens, attention, strict=True)]
    contents = Contents(rank, max_degree, widths, tensors, metadata.get("method"), provenance, arithmetic)
    _require_shapes(path, contents)
    return contents


def _read_published(path: Path, published: dict[tuple[str | Any, ...], Tensor]) -> Contents:
    tensors = {}
    for (block, part, side), tensor in published.items():
        if tensor.ndim != 2:
            raise ValueError(f"{path}: its matrices must have 2 dimensions, got {tuple(tensor.shape)} in block {block}")
        slots = tensor if side == "down" else tensor.t()  # [max_degree * 2, C or A]
        if slots.shape[0] % _PUBLISHED_RANK:
            raise ValueError(f"{path}: its slots must be 2 per degree, got {slots.shape[0]} in block {block}")
        steps = slots.unflatten(0, (-1, _PUBLISHED_RANK)).flip(0).flatten(0, 1)
        tensors[f"{part}_{side}.{int(block)}"] = (steps if side == "down" else steps.t()).contiguous()
    depth = 1 + max(int(block) for block, _, _ in published)
    missing = [f"{part}.{block}" for block in range(depth) for part in _PARTS if f"{part}.{block}" not in tensors]
    if missing:
        raise ValueError(f"{path}: must have all four matrices of every block, got none for {missing[0]}")
    widths = [Width(tensors[f"q_down.{block}"].shape[1], tensors[f"q_up.{block}"].shape[0]) for block in range(depth)]
    contents = Contents(_PUBLISHED_RANK, tensors["q_down.0"].shape[0] // _PUBLISHED_RANK, widths, tensors, None, None)
    _require_shapes(path, contents)
    return contents


def _require_shapes(path: Path, contents: Contents) -> None:
    slots = num_slots(contents.arithmetic, contents.rank, contents.max_degree)
    if contents.rank < 1 or contents.max_degree < 1:
        raise ValueError(f"{path}: rank and max_degree must be at least 1, got {contents.rank}, {contents.max_degree}")
    wanted = {}
    for block, width in enumerate(contents.widths):
        for part in _PARTS:
            wanted[f"{part}.{block}"] = (slots, width.tokens) if part.endswith("down") else (width.attention, slots)
    for name in sorted({*wanted, *contents.tensors}):
        shape = tuple(contents.tensors[name].shape) if name in contents.tensors else None
        if shape != wanted.get(name):
            raise ValueError(f"{path}: {name} must be {wanted.get(name, 'absent')}, got {shape or 'nothing'}")
        if not contents.tensors[name].is_floating_point():
            raise ValueError(f"{path}: {name} must be of a floating-point type, got {contents.tensors[name].dtype}")
        if not torch.isfinite(contents.tensors[name].double()).all():
            raise ValueError(f"{path}: {name} must be finite, got values that are not; train the plugin again")


def _one_if_equal(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _per_block(value: Any, depth: int) -> list[int]:
    values = [value] * depth if isinstance(value, int) else list(value)
    if len(values) != depth or not all(isinstance(one, int) for one in values):
        raise ValueError(f"widths must be one whole number or one for each of {depth} blocks, got {value!r}")
    return values
