"""What was recorded of the published code, and whether PyTorch draws the numbers here that its runs were given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

#: For tests that hold float64 results to what was recorded for weights and images drawn by seed.
draws_what_was_recorded = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector instructions PyTorch draws normal numbers that differ in their last bits",
)


def recorded(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the settings in tests/data/published_NAME.safetensors."""
    with safe_open(Path(__file__).parent / "data" / f"published_{name}.safetensors", framework="pt") as file:
        settings = {name: json.loads(text) for name, text in file.metadata().items()}
        return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118 (not a dict)
