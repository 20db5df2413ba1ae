"""Whether PyTorch draws the numbers here that the published runs were given."""

from __future__ import annotations

import pytest
import torch

#: For tests that hold float64 results to what was recorded for weights and images drawn by seed.
draws_what_was_recorded = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector instructions PyTorch draws normal numbers that differ in their last bits",
)
