"""Tile sizes and launch options: data in ``configs/<op>.json``, looked up by GPU name and problem shape.

A file maps a GPU name (as ``torch.cuda.get_device_name`` says it, or ``"default"``) to kernels, and a kernel to a list
of entries. An entry is a set of launch arguments (``BLOCK_*``, ``num_warps``, ``num_stages``, ``maxnreg``) and, under
``"when"``, inclusive upper bounds on the shape it is for. The first entry whose bounds all hold is taken, so a list
goes from small to large and ends in an entry without bounds. Bounds never name the batch size: an image's bits must not
depend on its batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

CONFIG_DIR = Path(__file__).parent / "configs"
DEFAULT = "default"
#: Multiply-adds are fused on every Triton version: the default is about to change, and the bits with it.
ENABLE_FP_FUSION = True
# Sizes that no table tunes; what counts the kernels' traffic reads them here too, without Triton.
#: Tokens per program of the kernel that adds up heads.
REDUCE_BLOCK = 128
#: Tokens per program of the kernel that ranks tokens by class attention, and how many it compares them with at a time.
ORDER_BLOCK = 64
#: Keys up to this number are one tile in a single pass; a head of more channels than this is one tile.
ONE_TILE = 128
#: Rows of more bytes are matched and merged in passes over their channels instead.
MAX_RESIDENT = 3072


@cache
def load(op: str) -> dict[str, dict[str, list[dict[str, object]]]]:
    """The whole table of one operator: GPU name -> kernel -> entries."""
    return json.loads((CONFIG_DIR / f"{op}.json").read_text())


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else DEFAULT


@cache
def _lookup(op: str, kernel: str, device_name: str, shape: tuple[tuple[str, int], ...]) -> dict[str, int]:
    table = load(op)
    entries = table.get(device_name, {}).get(kernel) or table[DEFAULT][kernel]
    values = dict(shape)
    for entry in entries:
        bounds: Mapping[str, int] = entry.get("when", {})  # type: ignore[assignment]
        if all(values[name] <= bound for name, bound in bounds.items()):
            chosen = {name: value for name, value in entry.items() if name != "when"}
            return chosen | {"enable_fp_fusion": ENABLE_FP_FUSION}  # type: ignore[return-value]
    raise LookupError(f"configs/{op}.json: no entry of {kernel} for {device_name} fits {values}")


def launch_config(op: str, kernel: str, device: torch.device | str, **shape: int) -> dict[str, int]:
    """Launch arguments of ``kernel`` for a problem of this ``shape`` (such as N=197, D=64, itemsize=2) on ``device``.

    ``device`` may also be the name of a GPU that need not be there.

    Unknown GPUs, and CPU tensors under the interpreter, get the default entries. The result is shared: read only.
    """
    name = device if isinstance(device, str) else _device_name(device)
    return _lookup(op, kernel, name, tuple(shape.items()))
