"""What instructions the CPU has, and up to which level each library may use them: a figure is of both.

Levels are "default" (below AVX2), "avx2" and "avx512". ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and
TOKCOMP_CPU_CAPABILITY lower them for PyTorch, oneDNN and tokcomp; together they are the same CPU without AVX-512.

Tiles (AMX) come on top of "avx512": they multiply bfloat16 and int8 several times faster, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

import tokcomp_kernels

LEVELS = ("default", "avx2", "avx512")
#: The libraries that take a level.
_LIBRARIES = ("torch", "onednn", "tokcomp")
#: What multiplies tiles of bfloat16.
_AMX = ("avx512f", "amx_tile", "amx_bf16")


def instruction_sets() -> dict[str, str]:
    """The level that the CPU has ("cpu"), and what "torch", "onednn", "tokcomp" may use. Empty but on x86-64.

    "tiles" is "amx" where the CPU multiplies tiles and oneDNN may use them.
    """
    flags = _flags()
    best = _cpu_level(flags)
    if best is None:
        return {}
    found = {"cpu": best, "torch": _level(torch.backends.cpu.get_cpu_capability())}
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    # oneDNN takes a limit above what the CPU has for no limit.
    found["onednn"] = min(best if limit.upper() in ("ALL", "DEFAULT") else _level(limit), best, key=LEVELS.index)
    own = tokcomp_kernels.build_info().get("cpu_capability")
    if own:
        found["tokcomp"] = _level(str(own))
    tiles = flags.issuperset(_AMX) and (limit.upper() in ("ALL", "DEFAULT") or "AMX" in limit.upper())
    return found | ({"tiles": "amx"} if tiles and found["onednn"] == "avx512" else {})


def level_in_force(found: Mapping[str, str]) -> str | None:
    """The level that every library uses, "mixed" where they differ, None where nothing is known."""
    levels = {found[name] for name in _LIBRARIES if name in found}
    return next(iter(levels)) if len(levels) == 1 else "mixed" if levels else None


def folder_suffix(found: Mapping[str, str]) -> str:
    """What tells records of one CPU name apart: nothing with AVX-512 in force, "-amx" with tiles as well, "-avx2" where
    AVX-512 was switched off, "-avx2-only" where the CPU has no more, "-mixed" where the libraries differ."""
    level = level_in_force(found)
    if level in (None, "avx512"):
        return "-amx" if level == "avx512" and found.get("tiles") == "amx" else ""
    return f"-{level}-only" if level == found["cpu"] else f"-{level}"


def in_words(found: Mapping[str, str]) -> str:
    """For a heading: "AMX", "AVX-512", "AVX-512 switched off", "AVX2 at most"; empty where nothing is known."""
    level = level_in_force(found)
    if level is None:
        return ""
    if level == "mixed":
        differing = ", ".join(f"{name} {found[name]}" for name in _LIBRARIES if name in found)
        return f"libraries at different levels: {differing}"
    if level == "avx512" and found.get("tiles") == "amx":
        return "AMX"
    name = {"avx512": "AVX-512", "avx2": "AVX2", "default": "no AVX2"}[level]
    if level == found["cpu"]:
        return name if level == "avx512" else f"{name} at most"
    return "AVX-512 switched off" if (level, found["cpu"]) == ("avx2", "avx512") else f"held to {name}"


def _level(name: str) -> str:
    """The level of a capability as PyTorch, oneDNN or tokcomp call it: AVX512_CORE, avx512_bf16, AVX2_VNNI, NO AVX."""
    name = name.lower()
    if name.startswith(("avx512", "avx10", "amx")):
        return "avx512"
    return "avx2" if name.startswith("avx2") else "default"


def _cpu_level(flags: frozenset[str]) -> str | None:
    if "sse2" not in flags:
        return None
    return "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "default"


def _flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
