"""Bytes and multiply-adds of single kernels, from the shapes, types and tiles that they are launched with.

``bytes_read`` and ``bytes_written`` count each byte of a tensor that a kernel touches once: what a memory of unlimited
cache moves. ``bytes_loaded`` and ``bytes_stored`` count every unmasked element of every load and store: what the
kernel's programs ask of the caches, where a row that two programs read counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelCost:
    """One kernel launch.

    ``block`` is the index of the model's block, None outside the blocks. ``multiply_adds`` are those of the result;
    ``tile_multiply_adds`` what the matrix units do for it where tiles are padded (0: the library's own affair).
    ``matrix`` is the shape of a library's product: rows, inputs, outputs; ``programs`` the blocks of threads that share
    the tiles of any other kernel (0: not known).
    """

    name: str
    block: int | None
    multiply_adds: int = 0
    tile_multiply_adds: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    exponentials: int = 0
    matrix: tuple[int, int, int] | None = None
    programs: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of the products: two per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def bytes_moved(self) -> int:
        return self.bytes_read + self.bytes_written


def ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)


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
        matrix=(rows, inputs, outputs),
    )


def elementwise(name: str, block: int | None, read: int, written: int, item: int) -> KernelCost:
    """A pass that loads and stores the given numbers of elements, each once."""
    return KernelCost(
        name,
        block,
        bytes_read=read * item,
        bytes_written=written * item,
        bytes_loaded=read * item,
        bytes_stored=written * item,
    )


def plain_attention(
    batch: int,
    heads: int,
    num_tokens: int,
    width: int,
    item: int,
    block: int | None,
    *,
    tile: tuple[int, int] = (128, 64),
) -> KernelCost:
    """A library's fused attention: q, k, v and the output once, products in tiles of queries by keys."""
    rows = batch * heads * num_tokens * width
    pairs = batch * heads
    for side in tile:
        pairs *= ceil_div(num_tokens, side) * side
    return KernelCost(
        "sdpa",
        block,
        multiply_adds=2 * rows * num_tokens,
        tile_multiply_adds=2 * pairs * width,
        exponentials=pairs,
        bytes_read=3 * rows * item,
        bytes_written=rows * item,
        programs=batch * heads * ceil_div(num_tokens, tile[0]),
    )
