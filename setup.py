"""Puts the compiled module into the distribution; CMake builds it, pyproject.toml says the rest."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
import native


class BuildNative(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        native.build(None if in_place else Path(self.build_lib).resolve() / "tokcomp_kernels")


class PinTorch(egg_info):
    """Kernels fit the torch they are built against and no other, so what is built requires that one.

    Else pip may exchange it in the same command, for the newest torchvision's sake. A source distribution keeps the
    range of pyproject.toml.
    """

    def run(self) -> None:
        version = native.torch_version() if native.wanted() else None
        if version and "sdist" not in self.distribution.commands:
            pin = f"torch=={version.partition('+')[0]}"
            requires = [re.sub(r"^torch\b(?![\w-]).*", pin, name) for name in self.distribution.install_requires]
            self.distribution.install_requires = self.distribution.metadata.install_requires = requires
        super().run()


setup(
    ext_modules=[Extension("tokcomp_kernels._C", sources=[])] if native.wanted() else [],
    cmdclass={"build_ext": BuildNative, "egg_info": PinTorch},
)
