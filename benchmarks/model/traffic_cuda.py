"""What compiled CUDA kernels read, write and multiply where that is not what Triton's do; as ``traffic_triton``."""

from __future__ import annotations

from benchmarks.model.traffic import KernelCost, ceil_div

_FLOAT = 4
#: Keys and queries of a step; what a head's width is rounded up to; the most keys that stay in shared memory.
_TILE, _WIDTHS, _RESIDENT = 16, (32, 48, 64, 80), 256
_STREAMED_ROWS, _STREAMED_KEYS = 64, 64


def attention(
    batch: int, heads: int, num_tokens: int, width: int, item: int, *, has_size: bool, mean: bool = True
) -> list[KernelCost]:
    """A block per head while its keys fit in shared memory; then one for every 64 queries, keys in tiles of 64.

    Raises:
        ValueError: a width that this kernel is not for.
    """
    if width > _WIDTHS[-1]:
        raise ValueError(f"width must be at most {_WIDTHS[-1]}, got {width}")
    padded = next(one for one in _WIDTHS if width <= one)
    resident = num_tokens <= _RESIDENT
    blocks = 1 if resident else ceil_div(num_tokens, _STREAMED_ROWS)
    queries = ceil_div(num_tokens, _TILE) * _TILE if resident else blocks * _STREAMED_ROWS
    step = _TILE if resident else _STREAMED_KEYS
    pairs = queries * ceil_div(num_tokens, step) * step
    rows = heads * num_tokens * width * item  # of q, k, v or out, of one image
    sizes, cls = num_tokens * _FLOAT * has_size, heads * num_tokens * _FLOAT
    forward = KernelCost(
        "attention.forward",
        None,
        multiply_adds=batch * heads * 2 * num_tokens**2 * width,
        tile_multiply_adds=batch * heads * 2 * pairs * padded,
        exponentials=batch * heads * (pairs + num_tokens),
        bytes_read=batch * (3 * rows + sizes),
        bytes_written=batch * (rows + cls),
        bytes_loaded=batch * (rows + blocks * (2 * rows + heads * sizes) + cls),  # the class row's scores come back
        bytes_stored=batch * (rows + 2 * cls),
        programs=batch * heads * blocks,
    )
    if not mean:
        return [forward]
    written = num_tokens * _FLOAT
    moved = {"bytes_read": batch * cls, "bytes_loaded": batch * cls}
    return [
        forward,
        KernelCost("attention.class_row", None, bytes_written=batch * written, bytes_stored=batch * written, **moved),
    ]
