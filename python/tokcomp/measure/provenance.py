"""Where a figure comes from: the machine, the versions, the commit. Recorded with every result."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokcomp.measure.info import cpu_name, package_versions
from tokcomp.measure.instruction_sets import folder_suffix, instruction_sets


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, clocks, driver, versions, commit, threads and time, as JSON data."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "commit": _commit(),
        "versions": package_versions(),
        "host": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_sets": instruction_sets(),
            "load": os.getloadavg()[0],  # over the last minute: what else ran during the measurement
            "system": platform.platform(),
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
        record["gpu"] = {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            **_nvidia_smi(fields, device),
        }
    return record


def find_device(name: str | None) -> torch.device:
    """The device of that name; by default the first GPU, or the CPU if there is none.

    Raises:
        ValueError: PyTorch does not know the name, or there is no such GPU.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of the {torch.cuda.device_count()} GPUs that PyTorch sees, got {name!r}")
    return device


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def device_slug(device: torch.device) -> str:
    """The device's name as a folder name: ``nvidia-h200``, ``amd-epyc``; ``amd-epyc-avx2`` with AVX-512 switched
    off."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return name + ("" if device.type == "cuda" else folder_suffix(instruction_sets()))


def save_record(folder: Path, record: dict[str, Any], path: Path | None = None) -> Path:
    """Add one run's record to a folder as ``<date>-<commit>.json``; no run replaces another's file.

    If ``path``, returned by an earlier call in this run, is given, the longer record replaces it whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    claimed = path is None
    if path is None:
        stamp = re.sub(r"[^0-9T]", "", record["provenance"]["date"].split("+")[0])
        path = _claim(folder, f"{stamp}-{(record['provenance']['commit'] or 'unknown')[:9]}")
    draft = path.with_suffix(".tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        if claimed:
            path.unlink()
        raise
    return path


def _claim(folder: Path, stem: str) -> Path:
    """A new, empty file in the folder, safe against other processes that choose a name at the same time."""
    for number in itertools.count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        with contextlib.suppress(FileExistsError):
            path.touch(exist_ok=False)
            return path
    raise AssertionError("itertools.count ends")


def _commit() -> str | None:
    """The checkout's commit, with "+changes" if tracked files differ from it; None outside a checkout."""
    folder = Path(__file__).parent
    commit = _run(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if commit is None or _run(["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__]) is None:
        return None
    changed = _run(["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _nvidia_smi(fields: Sequence[str], device: torch.device) -> dict[str, str]:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    out = _run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which])
    if out is None:
        return {}
    return dict(zip(fields, (value.strip() for value in out.splitlines()[0].split(",")), strict=False))


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
