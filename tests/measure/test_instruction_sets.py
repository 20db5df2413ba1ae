"""What the CPU was allowed to use: said in records, and in the name of their folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tokcomp.measure import instruction_sets as module
from tokcomp.measure import provenance
from tokcomp.measure.instruction_sets import folder_suffix, in_words, instruction_sets, level_in_force


def found(cpu: str, torch: str, onednn: str, tokcomp: str) -> dict[str, str]:
    return {"cpu": cpu, "torch": torch, "onednn": onednn, "tokcomp": tokcomp}


@pytest.mark.parametrize(
    ("sets", "level", "suffix", "words"),
    [
        (found("avx512", "avx512", "avx512", "avx512"), "avx512", "", "AVX-512"),
        (found("avx512", "avx512", "avx512", "avx512") | {"tiles": "amx"}, "avx512", "-amx", "AMX"),
        (found("avx512", "avx2", "avx2", "avx2"), "avx2", "-avx2", "AVX-512 switched off"),
        (found("avx2", "avx2", "avx2", "avx2"), "avx2", "-avx2-only", "AVX2 at most"),
        (found("avx512", "default", "default", "default"), "default", "-default", "held to no AVX2"),
        (
            found("avx512", "avx2", "avx512", "avx2"),
            "mixed",
            "-mixed",
            "libraries at different levels: torch avx2, onednn avx512, tokcomp avx2",
        ),
        ({}, None, "", ""),
    ],
)
def test_a_level_in_words_and_as_a_folder(sets: dict[str, str], level: str | None, suffix: str, words: str) -> None:
    assert (level_in_force(sets), folder_suffix(sets), in_words(sets)) == (level, suffix, words)


@pytest.mark.parametrize(
    ("limit", "level"),
    [("", "avx512"), ("ALL", "avx512"), ("AVX512_CORE", "avx512"), ("AVX2_VNNI", "avx2"), ("SSE41", "default")],
)
def test_onednn_has_its_own_names(monkeypatch: pytest.MonkeyPatch, limit: str, level: str) -> None:
    monkeypatch.setattr(module, "_flags", lambda: frozenset({"sse2", "avx2", "avx512f"}))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert instruction_sets()["onednn"] == level
    monkeypatch.setattr(module, "_flags", lambda: frozenset({"sse2", "avx2"}))
    assert instruction_sets()["onednn"] == min(level, "avx2", key=module.LEVELS.index)
    monkeypatch.setattr(module, "_flags", lambda: frozenset({"asimd"}))
    assert instruction_sets() == {}


@pytest.mark.parametrize(
    ("limit", "tiles"), [("", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_BF16", False), ("AVX2", False)]
)
def test_tiles_are_said_where_onednn_may_use_them(monkeypatch: pytest.MonkeyPatch, limit: str, tiles: bool) -> None:
    flags = frozenset({"sse2", "avx2", "avx512f", "amx_tile", "amx_bf16"})
    monkeypatch.setattr(module, "_flags", lambda: flags)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert ("tiles" in instruction_sets()) == tiles
    monkeypatch.setattr(module, "_flags", lambda: flags - {"amx_bf16"})
    assert "tiles" not in instruction_sets()


def test_kernels_of_another_level_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_flags", lambda: frozenset({"sse2", "avx2", "avx512f"}))
    for own, level in (("avx512_bf16", "avx512"), ("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "default")):
        monkeypatch.setattr(module.tokcomp_kernels, "build_info", lambda own=own: {"cpu_capability": own})
        assert instruction_sets()["tokcomp"] == level
    monkeypatch.setattr(module.tokcomp_kernels, "build_info", dict)
    assert "tokcomp" not in instruction_sets()


def test_records_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "instruction_sets", lambda: found("avx512", "avx2", "avx2", "avx2"))
    monkeypatch.setattr(provenance, "device_name", lambda device: "AMD EPYC 9999 64-Core")
    cpu = torch.device("cpu")
    assert provenance.device_slug(cpu) == "amd-epyc-9999-64-core-avx2"
    assert provenance.provenance(cpu)["host"]["instruction_sets"]["onednn"] == "avx2"
    assert provenance.device_slug(torch.device("cuda")) == "amd-epyc-9999-64-core"


@pytest.mark.slow
def test_pytorch_s_own_switch_is_seen() -> None:
    """Read from PyTorch itself, in a process of its own."""
    if instruction_sets().get("cpu") not in ("avx2", "avx512"):
        pytest.skip("needs AVX2")
    code = "from tokcomp.measure.instruction_sets import instruction_sets as found; print(found()['torch'])"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "default"
