"""Settings for every test. Nothing here assumes a GPU, or its absence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton kernels run on CPU tensors through the interpreter; set before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

SPREAD = Path(__file__).parent / "ops"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under loadgroup a file's tests stay together, for they share what they build; those of the operators do not."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            if SPREAD not in item.path.parents:
                item.add_marker(pytest.mark.xdist_group(str(item.path)))
