"""What launches would compile, as JSON: run by test_compile.py where Triton's kernels are not interpreted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from tokcomp_kernels.triton import _compile, _configs
from tokcomp_kernels.triton._cases import Case, block_cases, cases
from tools.kernel_report import triton_kernels, triton_report

SCHEDULES = Path(__file__).resolve().parents[2] / "python" / "tokcomp" / "published_schedules.json"
#: Models of published schedules: heads, their width, tokens.
MODELS = {
    "ViT-T-DeiT": (3, 64, 197),
    "ViT-S-DeiT": (6, 64, 197),
    "ViT-B-DeiT": (12, 64, 197),
    "ViT-L-MAE": (16, 64, 197),
    "ViT-H-MAE": (16, 80, 257),
}


def rows(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(2, *shape, dtype=dtype)


def published() -> Iterator[Case]:
    """The calls of every block under every published schedule."""
    schedules = json.loads(SCHEDULES.read_text())
    for name, (heads, width, num_tokens) in MODELS.items():
        vector = rows(heads * width)[0]
        for budget, schedule in schedules[name].items():
            tokens, size = num_tokens, None
            for pruned, merged in zip(schedule["prune_kept_num"], schedule["merge_kept_num"], strict=True):
                case, x = f"{name} {budget} N{tokens}", rows(tokens, heads * width)
                qkv = rows(tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
                yield Case("attention", case, qkv, {"size": size})
                yield Case("add_layer_norm", case, (x, x, vector, vector))
                kept = min(pruned, merged)
                if kept < tokens:
                    importance = rows(tokens, dtype=torch.float32)
                    norm = (x, x, importance, min(pruned, tokens), min(merged, tokens), vector, vector)
                    yield Case("prune_merge_norm", case, norm, {"size": size})
                    tokens, size = kept, rows(kept, dtype=torch.float32)


def main() -> None:
    lookups = set()
    lookup = _configs._lookup

    def recorded(*arguments):
        lookups.add(arguments)
        return lookup(*arguments)

    _configs._lookup = recorded
    listed = list(triton_kernels(cases(), 90, only_list=True))
    reported = triton_kernels(block_cases(), 90, only_list=True)
    known = {kernel.identity for _, kernel in listed}
    launched = list(triton_kernels(published(), 90, only_list=True))
    _compile.SHARED_LIMIT[90] = 1
    large = [case for case in cases() if (case.op, case.name) == ("_merge_backward", "S float16")]
    found = {
        "kernels": sorted({kernel.name for _, kernel in listed}),
        "reported": [(case.op, case.name, kernel.name) for case, kernel in reported],
        "lookups": sorted(lookups),
        "published": len(launched),
        "unknown": [(case.name, kernel.name) for case, kernel in launched if kernel.identity not in known],
        "too large": triton_report(large, [90]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
