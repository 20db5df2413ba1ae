"""The build driver: what it hands to CMake, and when it keeps the objects of an earlier build."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The driver in an empty folder, with tools that are names alone."""
    import native

    monkeypatch.setattr(native, "ROOT", tmp_path)
    monkeypatch.setattr(native, "program", lambda name: f"/tools/{name}")
    for name in native.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return native


@pytest.fixture
def commands(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the driver runs, caught."""
    caught: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        caught.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(native.subprocess, "run", run)
    return caught


def test_in_place_is_for_this_machine(native: ModuleType, commands: list[list[str]]):
    native.build()
    configure, _ = commands
    assert "-UTOKCOMP_CPU_ARCH" in configure and "-UTOKCOMP_OUTPUT_DIR" in configure


def test_a_wheel_is_for_every_machine(
    native: ModuleType, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    output = tmp_path / "lib"
    output.mkdir()
    stale = output / "_C.cpython-311-x86_64-linux-gnu.avx2.so"
    stale.touch()
    native.build()
    native.build(output)
    monkeypatch.setenv("TOKCOMP_CPU_ARCH", "avx2")
    native.build(output)
    in_place, wheel, chosen = commands[::2]
    assert "-DTOKCOMP_CPU_ARCH=dispatch" in wheel and f"-DTOKCOMP_OUTPUT_DIR={output}" in wheel
    assert "-DTOKCOMP_CPU_ARCH=avx2" in chosen
    folders = [command[command.index("-B") + 1] for command in (in_place, wheel, chosen)]
    assert folders[0] != folders[1] == folders[2], "neither build throws the other's objects away"
    assert not stale.exists(), "what an earlier build left would be packed"


def test_sanitizers_have_a_package_of_their_own(native: ModuleType, commands: list[list[str]]):
    package = native.ROOT / "tokcomp_kernels"
    package.mkdir()
    for name in ("__init__.py", "_C.cpython-311-x86_64-linux-gnu.so"):
        (package / name).touch()
    native.build()
    folder = native.build(sanitize="address,undefined")
    in_place, sanitized = commands[::2]
    assert "-UTOKCOMP_SANITIZE" not in sanitized and "-UTOKCOMP_SANITIZE" in in_place
    assert "-DTOKCOMP_SANITIZE=address,undefined" in sanitized and "-DTOKCOMP_BUILD_CUDA=0" in sanitized
    assert f"-DTOKCOMP_OUTPUT_DIR={folder / 'tokcomp_kernels'}" in sanitized
    assert sanitized[sanitized.index("-B") + 1] == str(folder) != in_place[in_place.index("-B") + 1]
    assert [path.name for path in (folder / "tokcomp_kernels").iterdir()] == ["__init__.py"], "not the kernels in place"


def test_kernels_are_built_unless_switched_off(native: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TOKCOMP_BUILD_KERNELS", raising=False)
    assert native.wanted()
    for value, wanted in (("", True), ("1", True), ("0", False)):
        monkeypatch.setenv("TOKCOMP_BUILD_KERNELS", value)
        assert native.wanted() == wanted
    monkeypatch.setenv("TOKCOMP_BUILD_KERNELS", "no")
    with pytest.raises(ValueError, match="TOKCOMP_BUILD_KERNELS must be 0 or 1, got 'no'"):
        native.wanted()


@pytest.mark.parametrize(
    ("ninja", "generator", "make_program", "stale"),
    [
        (True, "Ninja", "/gone/ninja", False),  # as pip's temporary environment leaves it
        (True, "Unix Makefiles", "/gone/make", True),
        (False, "Ninja", "/gone/ninja", True),
        (False, "Unix Makefiles", "/bin/sh", False),
    ],
)
def test_objects_are_kept(
    native: ModuleType,
    commands: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    ninja: bool,
    generator: str,
    make_program: str,
    stale: bool,
):
    native.build()
    cache = Path(commands[0][commands[0].index("-B") + 1]) / "CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.write_text(
        f"CMAKE_MAKE_PROGRAM:FILEPATH={make_program}\nCMAKE_COMMAND:INTERNAL=/gone/cmake\n"
        f"CMAKE_GENERATOR:INTERNAL={generator}\n"
    )
    monkeypatch.setattr(native, "program", lambda name: f"/tools/{name}" if ninja or name == "cmake" else None)
    commands.clear()
    native.build()
    assert ("--fresh" in commands[0]) == stale
