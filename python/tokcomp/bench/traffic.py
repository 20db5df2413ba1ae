"""Bytes and multiply-adds of single kernels, from the shapes, types and tiles that they are launched with.

``bytes_read`` and ``bytes_written`` count each byte of a tensor that a kernel touches once: what a memory of unlimited
cache moves. ``bytes_loaded`` and ``bytes_stored`` count every unmasked element of every load and store: what the
kernel's programs ask of the caches, where a row that two programs read counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCost:
    """One kernel launch. ``block``: index of the model's block, None outside the blocks."""

    name: str
    block: int | None
    multiply_adds: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    exponentials: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the products: two per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


def linear(
    name: str,
    block: int | None,
    rows: int,
    inputs: int,
    outputs: int,
    item: int,
    *,
    bias: bool = True,
    residual: bool = False,
) -> KernelCost:
    """rows x inputs by a weight [outputs, inputs]: each matrix once, whatever tiles the library chooses."""
    read = rows * inputs + inputs * outputs + outputs * bias + rows * outputs * residual
    return KernelCost(
        name,
        block,
        multiply_adds=rows * inputs * outputs,
        bytes_read=read * item,
        bytes_written=rows * outputs * item,
    )
