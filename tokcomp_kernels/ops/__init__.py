"""The operators, one module each. Importing this package registers them as ``torch.ops.tokcomp.*``."""

from importlib import import_module

from tokcomp_kernels._schema import OPERATORS
from tokcomp_kernels.ops._register import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS"]

for _operator in OPERATORS:
    if _operator.public:
        import_module(f"{__name__}.{_operator.name}")
