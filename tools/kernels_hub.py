"""The operators as a repository of the `kernels` hub: relative imports, a namespace of their own, a card, a benchmark.

    python -m tools.kernels_hub OUT          # or: make kernels-hub
    kernels upload OUT ...                   # by the package `kernels`, if you may write there

A variant holds ``tokcomp_kernels`` without its compiled module: Triton kernels on CUDA, the reference elsewhere. Its
operators are ``torch.ops.tokcomp_<backend>_<digest>.*``, so that it may be loaded beside an installed tokcomp and
beside other versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tokcomp_kernels"
#: Variant -> the type that its metadata names.
BACKENDS = {"torch-cuda": "cuda", "torch-cpu": "cpu"}
#: Namespaces of the package, in strings and after torch.ops.
_NAMESPACE = re.compile(
    r"""(?:(?<=torch\.ops\.)|(?<=["']))tokcomp(?=(?:_cpu|_cuda|_python|_int8|_tiles)?(?:["'.]|::))"""
)
_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}((?:\.\w+)*) import ", re.MULTILINE)
_BY_NAME = re.compile(rf"""importlib\.import_module\((f?)(["']){PACKAGE}\.(.+?)\2\)""")


def sources() -> list[Path]:
    """What a variant holds, relative to the package."""
    package = ROOT / PACKAGE
    found = [path for kind in ("*.py", "*.json", "py.typed") for path in package.rglob(kind)]
    return sorted(path.relative_to(package) for path in found if not path.name.startswith("_C."))


def moved(text: str, path: Path, namespace: str) -> str:
    """A module's source with imports relative to the package and operators in ``namespace``."""
    up = "." * len(path.parts)

    def relative(match: re.Match[str]) -> str:
        return f"{match[1]}from {up}{match[2].removeprefix('.')} import "

    text = _IMPORT.sub(relative, text)
    text = _BY_NAME.sub(rf"importlib.import_module(\1\2{up}\3\2, __package__)", text)
    return _NAMESPACE.sub(namespace, text)


def write_repository(out: Path) -> list[str]:
    """Write the repository into a new or empty folder, and return the namespaces of its variants' operators.

    Raises:
        FileExistsError: there is something in the folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"OUT must be a new or empty folder, got '{out}'")
    package, files = ROOT / PACKAGE, sources()
    sha = hashlib.sha256(b"".join(str(path).encode() + (package / path).read_bytes() for path in files))
    digest, namespaces = sha.hexdigest()[:8], []
    for variant, backend in BACKENDS.items():
        folder, namespace = out / "build" / variant, f"tokcomp_{backend}_{digest}"
        namespaces.append(namespace)
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".py":
                (folder / path).write_text(moved((package / path).read_text("utf-8"), path, namespace), "utf-8")
            else:
                shutil.copyfile(package / path, folder / path)
        metadata = {
            "name": "tokcomp",
            "id": f"_{namespace}",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "README.md").write_text(_CARD.replace("NAMESPACE", namespaces[0]), "utf-8")
    (out / "benchmarks").mkdir()
    (out / "benchmarks" / "benchmark.py").write_text(_BENCHMARK, "utf-8")
    return namespaces


_CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- token-compression
- vision-transformer
---

# tokcomp

Operators that drop and merge the tokens of vision transformers, in Triton on CUDA and in PyTorch elsewhere: attention
that also gives the class token's row, prune_merge, tome_merge, unmerge, their gradients, and the search's masked forms.
Where tokens go, what equal values do and which errors wrong arguments raise is the same on every backend.

```python
import torch
from kernels import get_kernel

tokcomp = get_kernel("owner/tokcomp", version=1)
out, cls_attn = tokcomp.attention(q, k, v, size=size)           # [B, H, N, D], [B, N]
x, size, source = tokcomp.prune_merge(x, cls_attn, 150, 120)    # [B, 120, C]
```

The operators are `torch.ops.NAMESPACE.*`; every function has a docstring with shapes. Whole models, compiled CPU and
CUDA kernels, searching and training are in the package tokcomp.

`kernels benchmark owner/tokcomp` times and verifies them. **No GPU has run them yet**: they are tested in Triton's
interpreter and compiled for sm_80 to sm_120.
"""

_BENCHMARK = '''"""What a block of DeiT-S asks of the operators at batch 64; each is compared with plain PyTorch."""

import torch
from kernels.benchmark import Benchmark


class BlockBenchmark(Benchmark):
    seed = 0

    def setup(self):
        dtype = torch.float16 if self.device != "cpu" else torch.float32
        make = lambda *shape: torch.randn(*shape, device=self.device, dtype=dtype)  # noqa: E731
        self.q, self.k, self.v = (make(64, 6, 197, 64) for _ in range(3))
        self.x, self.importance = make(64, 197, 384), torch.rand(64, 197, device=self.device)

    def benchmark_attention(self):
        self.out, _ = self.kernel.attention(self.q, self.k, self.v)

    def verify_attention(self):
        return torch.nn.functional.scaled_dot_product_attention(self.q, self.k, self.v)

    def benchmark_prune(self):
        # Every merge goes to what is pruned first: what is left are the most important tokens, unchanged.
        self.out, _, _ = self.kernel.prune_merge(self.x, self.importance, 120, 120)

    def verify_prune(self):
        order = self.importance[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :119] + 1
        kept = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
        return self.x.gather(1, kept[..., None].expand(-1, -1, self.x.shape[2]))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    out = parser.parse_args().out
    print(f"{out}: operators of {', '.join(f'torch.ops.{one}' for one in write_repository(out))}")
    print(f"upload it:  kernels upload {out}")


if __name__ == "__main__":
    main()
