"""setuptools' build backend, which asks for torch as a build requirement only where the environment has none.

A fixed requirement would be installed into pip's isolated build environment at the newest version, whatever version
the environment that gets the kernels holds; kernels fit one version only.
"""

from __future__ import annotations

import re
from typing import Any

import native
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def torch_requirements() -> list[str]:
    """Nothing where the environment has a torch, or no kernels are wanted.

    Else what makes the resolver pick the one it will install later. That choice is torchvision's too, which timm needs
    and which goes with one version of torch.
    """
    if not native.wanted() or native.torch_version() is not None:
        return []
    torch = re.search(r'"(torch[^"a-z]*)"', (native.ROOT / "pyproject.toml").read_text())
    assert torch is not None
    return [torch[1], "torchvision"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirements()]
