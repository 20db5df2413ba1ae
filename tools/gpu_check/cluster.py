"""One small launch of a cluster, for compute-sanitizer to watch: ``python -m tools.gpu_check.cluster``."""

from __future__ import annotations

import argparse

import torch

from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.testing import Sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    backend = "cuda" if device == "cuda" else "cpp"
    generator = torch.Generator().manual_seed(0)
    # Two images of 600 channels: clusters of four blocks on a GPU that has them, and two tiles of sources.
    x, branch = (torch.randn(2, 40, 600, generator=generator).half().to(device) for _ in range(2))
    importance = torch.rand(2, 40, generator=generator).to(device)
    for op, args in (
        ("prune_merge", (x, importance, 38, 20)),
        ("prune_merge_norm", (x, branch, importance, 38, 20)),
    ):
        outputs = IMPLEMENTATIONS[op].callable(backend)(*args)
        assert_right(Sample(op, "cluster", args), outputs)
        print(f"{op} by {backend}: right", flush=True)


if __name__ == "__main__":
    main()
