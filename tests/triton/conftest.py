"""Without a GPU these tests run the kernels through Triton's interpreter, asked for before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
