"""Settings for every test. Nothing here assumes a GPU, or its absence."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton kernels run on CPU tensors through the interpreter; set before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
