"""The torch libraries that hold the operators' schemas, and what was built."""

from __future__ import annotations

import torch

from tokcomp_kernels._schema import NAMESPACE, NATIVE_NAMESPACES, OPERATORS

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_NATIVE = [torch.library.Library(namespace, "DEF") for namespace in NATIVE_NAMESPACES.values()]
for _operator in OPERATORS:
    for _library in (LIBRARY, *_NATIVE):
        _library.define(_operator.schema, tags=(torch.Tag.pt2_compliant_tag,))

load_error: str | None = None


def build_info() -> dict[str, object]:
    return {}


def native_kernels() -> dict[str, frozenset[str]]:
    return {"cpu": frozenset(), "cuda": frozenset()}
