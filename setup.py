"""Puts the compiled module into the distribution; CMake builds it, pyproject.toml says the rest."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
import native


class BuildNative(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        native.build(None if in_place else Path(self.build_lib).resolve() / "tokcomp_kernels")


setup(ext_modules=[Extension("tokcomp_kernels._C", sources=[])], cmdclass={"build_ext": BuildNative})
