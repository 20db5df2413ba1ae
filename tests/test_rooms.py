"""Imports go in one direction: the order that docs/architecture.md writes down, held against every import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tokcomp

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
#: Lowest first.
ROOMS = re.findall(r"^(\w+) ", re.search(r"```rooms\n(.*?)```", PAGE, re.S)[1], re.M)
#: Lowest first; what stands at one level may use each other.
LEVELS = [level.split(", ") for level in re.search(r"^    (tokcomp_kernels <- .*)$", PAGE, re.M)[1].split(" <- ")]
FOLDERS = {name: ROOT / ("python/tokcomp" if name == "tokcomp" else name) for level in LEVELS for name in level}


def imported(source: str, package: str) -> Iterator[str]:
    """Dotted names that a module of ``package`` imports, anywhere in it; public names of tokcomp by their homes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (home_of(f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tokcomp":
            yield home_of(f"tokcomp.{node.attr}")


def home_of(name: str) -> str:
    first, _, rest = name.partition(".")
    return tokcomp._HOMES.get(rest, name) if first == "tokcomp" else name


def modules(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, path.read_text(encoding="utf-8")


def package_of(path: Path, folder: Path, name: str) -> str:
    return ".".join([name, *path.parent.relative_to(folder).parts])


def upward(order: list[list[str]], start: str, names: Iterator[str], place: int) -> list[str]:
    """Of the imported names, those of a later package or room (the part at ``place``) than ``start``."""
    parts = [name.split(".") for name in names]
    own = next(number for number, level in enumerate(order) if start in level)
    later = {name for level in order[own + 1 :] for name in level}
    return [".".join(part) for part in parts if len(part) > place and part[place] in later]


def test_the_page_names_every_room_once():
    folder = FOLDERS["tokcomp"]
    found = {path.name for path in folder.iterdir() if list(path.glob("*.py"))} | {
        path.stem for path in folder.glob("*.py")
    }
    assert sorted(ROOMS) == sorted(found - {"__init__", "__main__"})


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_above_it(room):
    folder = FOLDERS["tokcomp"]
    for path, source in modules(folder):
        if path.relative_to(folder).with_suffix("").parts[0] == room:
            names = (
                name for name in imported(source, package_of(path, folder, "tokcomp")) if name.startswith("tokcomp.")
            )
            assert upward([[one] for one in ROOMS], room, names, 1) == [], path


@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_those_before_it(package):
    for path, source in modules(FOLDERS[package]):
        assert upward(LEVELS, package, imported(source, package), 0) == [], path


def test_what_points_up_is_found():
    source = "import tokcomp\nfrom tokcomp import ToMe\nfrom ..search import run\ndef f():\n    tokcomp.compress(1)\n"
    names = list(imported(source, "tokcomp.runs"))
    assert upward([[one] for one in ROOMS], "schedule", iter(names), 1) == [
        "tokcomp.methods",
        "tokcomp.search.run",
        "tokcomp.api",
    ]
    assert upward(LEVELS, "tokcomp_kernels", iter(names), 0) == ["tokcomp", *names[1:]]


def test_no_folder_of_tests_is_passed_over(pytestconfig: pytest.Config) -> None:
    """pytest does not look into folders of some names, `build` and `dist` among them."""
    passed_over = pytestconfig.getini("norecursedirs")
    for path in Path(__file__).parent.rglob("test_*.py"):
        folders = path.relative_to(Path(__file__).parent).parts[:-1]
        assert not any(fnmatch(folder, pattern) for folder in folders for pattern in passed_over), path
