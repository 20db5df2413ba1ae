"""What each Triton kernel of this package reads, writes and multiplies, from its loops: `tests/bench` counts after it.

Functions are named after operators and return one cost per kernel launch, in launch order. ``item`` is the bytes of an
element of the tokens; sizes and class attention are float32. ``gpu`` names a table of tile sizes (a device's name as
PyTorch says it; unknown ones get the default).
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.model.traffic import KernelCost, ceil_div
from tokcomp_kernels.triton._configs import (
    DEFAULT,
    MAX_RESIDENT,
    ONE_TILE,
    ORDER_BLOCK,
    REDUCE_BLOCK,
    launch_config,
)

_FLOAT, _INDEX, _LONG = 4, 4, 8  # bytes of float32, int32, int64
#: What tiles of keys and of a head's width add up to multiples of.
_TILE_STEP = 16


def attention(
    batch: int,
    heads: int,
    num_tokens: int,
    width: int,
    item: int,
    *,
    has_size: bool,
    mean: bool = True,
    block: int | None = None,
    gpu: str = DEFAULT,
) -> list[KernelCost]:
    """The forward kernel, where each block of queries goes over all keys, and with ``mean`` that of the class rows.

    A head's first block finds the class row of its own, by the keys at hand or by reading them twice more. More keys
    than ONE_TILE in a single pass, and widths up to it, come in tiles that add up to a multiple of 16.
    """
    tiles = launch_config("attention", "forward", gpu, N=num_tokens, D=width, itemsize=item)
    blocks, pairs, padded = _attention_tiles(tiles, num_tokens, width)
    rows = heads * num_tokens * width * item  # of q, k, v or out, of one image
    sizes = num_tokens * _FLOAT * has_size
    written = rows + heads * num_tokens * _FLOAT
    passes, query_loads = _class_row_passes(tiles, num_tokens)
    class_row = heads * (query_loads * width * item + passes * sizes) + (2 * rows if passes > 1 else 0)
    forward = KernelCost(
        "attention.forward",
        block,
        multiply_adds=batch * heads * 2 * num_tokens**2 * width,
        tile_multiply_adds=batch * heads * 2 * pairs * padded,
        exponentials=batch * heads * (pairs + 2 * num_tokens),
        bytes_read=batch * (3 * rows + sizes),
        bytes_written=batch * written,
        bytes_loaded=batch * (rows + blocks * (2 * rows + heads * sizes) + class_row),
        bytes_stored=batch * written,
        programs=batch * heads * blocks,
    )
    if not mean:
        return [forward]
    return [forward, _mean_over_groups("attention.class_row", batch, heads, num_tokens, block, of_logits=False)]


def _class_row_passes(tiles: Mapping[str, int], num_tokens: int) -> tuple[int, int]:
    """How often a head's class row goes over its keys, and over how many tiles of them in all."""
    if num_tokens > tiles["BLOCK_N"]:
        return 2, 2 * ceil_div(num_tokens, tiles["BLOCK_N"])
    if tiles["BLOCK_N"] <= ONE_TILE:
        return 1, 1
    full, rest = divmod(_up(num_tokens, _TILE_STEP), 64)
    return 1, full + (rest // _TILE_STEP).bit_count()


def _attention_tiles(tiles: Mapping[str, int], num_tokens: int, width: int) -> tuple[int, int, int]:
    """Blocks of queries, pairs of a query and a key in their tiles, channels of the tiles: of one image's head."""
    blocks = ceil_div(num_tokens, tiles["BLOCK_M"])
    several = num_tokens <= tiles["BLOCK_N"] and tiles["BLOCK_N"] > ONE_TILE
    pairs = blocks * tiles["BLOCK_M"] * _up(num_tokens, _TILE_STEP if several else tiles["BLOCK_N"])
    return blocks, pairs, _up(width, _TILE_STEP) if width <= ONE_TILE else next_power_of_2(width)


def attention_received(
    batch: int,
    heads: int,
    num_tokens: int,
    width: int,
    item: int,
    *,
    has_size: bool,
    block: int | None = None,
    gpu: str = DEFAULT,
) -> list[KernelCost]:
    """Sums of columns, of each block of queries, and the mean of these. Keys that no single pass holds come twice."""
    tiles = launch_config("attention_received", "forward", gpu, N=num_tokens, D=width, itemsize=item)
    blocks, pairs, padded = _attention_tiles(tiles, num_tokens, width)
    passes = 1 if num_tokens <= tiles["BLOCK_N"] else 2
    rows = heads * num_tokens * width * item  # of q or k, of one image
    sizes = num_tokens * _FLOAT * has_size
    written = heads * blocks * num_tokens * _FLOAT
    sums = KernelCost(
        "attention_received.sums",
        block,
        multiply_adds=batch * heads * num_tokens**2 * width,
        tile_multiply_adds=batch * heads * passes * pairs * padded,
        exponentials=batch * heads * passes * pairs,
        bytes_read=batch * (2 * rows + sizes),
        bytes_written=batch * written,
        bytes_loaded=batch * (rows + passes * blocks * (rows + heads * sizes)),
        bytes_stored=batch * written,
        programs=batch * heads * blocks,
    )
    mean = _mean_over_groups("attention_received.mean", batch, heads * blocks, num_tokens, block, of_logits=False)
    return [sums, mean]


def _mean_over_groups(
    name: str, batch: int, groups: int, num_tokens: int, block: int | None, *, of_logits: bool = True
) -> KernelCost:
    """The mean of an image's rows, of heads or parts of them; with ``of_logits``, of their softmax."""
    rows, stats = groups * num_tokens * _FLOAT, 2 * groups * _FLOAT * of_logits
    return KernelCost(
        name,
        block,
        exponentials=batch * groups * ceil_div(num_tokens, REDUCE_BLOCK) * REDUCE_BLOCK * of_logits,
        bytes_read=batch * (rows + stats),
        bytes_written=batch * num_tokens * _FLOAT,
        bytes_loaded=batch * (rows + stats * ceil_div(num_tokens, REDUCE_BLOCK)),
        bytes_stored=batch * num_tokens * _FLOAT,
    )


def class_attention_sort(
    batch: int,
    heads: int,
    num_tokens: int,
    width: int,
    item: int,
    *,
    has_size: bool,
    num_prefix_tokens: int = 1,
    block: int | None = None,
) -> list[KernelCost]:
    """Scores per head, the mean of their softmax, and ranks by counting (up to 1024 tokens)."""
    keys, sizes = heads * num_tokens * width * item, num_tokens * _FLOAT * has_size
    written = heads * (num_tokens + 2) * _FLOAT
    scores = KernelCost(
        "class_attention_sort.scores",
        block,
        multiply_adds=batch * heads * num_tokens * width,
        bytes_read=batch * (keys + heads * width * item + sizes),
        bytes_written=batch * written,
        bytes_loaded=batch * (keys + heads * (width * item + sizes)),
        bytes_stored=batch * written,
    )
    others = (num_tokens - num_prefix_tokens) * ceil_div(num_tokens, ORDER_BLOCK)  # each block looks at all of them
    order = KernelCost(
        "class_attention_sort.order",
        block,
        bytes_read=batch * num_tokens * _FLOAT,
        bytes_written=batch * num_tokens * _LONG,
        bytes_loaded=batch * (num_tokens + others) * _FLOAT,
        bytes_stored=batch * num_tokens * _LONG,
    )
    return [scores, _mean_over_groups("class_attention_sort.mean", batch, heads, num_tokens, block), order]


def prune_merge(
    batch: int,
    num_tokens: int,
    num_prune_kept: int,
    num_merge_kept: int,
    channels: int,
    item: int,
    *,
    has_size: bool,
    fused: bool = False,
    heads: int = 1,
    num_prefix_tokens: int = 1,
    destinations: int | None = None,
    block: int | None = None,
    gpu: str = DEFAULT,
) -> list[KernelCost]:
    """Ranks; kept rows, written as if nothing joined them; rows that something joined, once more.

    Every block of slots reads all sources of its image, and each part of the sources all slots: from the cache, after
    the first.

    Args:
        fused: prune_merge_norm: a branch is added to each row that is read, and each row's LayerNorm written beside it,
            with weight and bias.
        heads: whose importance is averaged.
        destinations: slots that something joins, over all images, which the values decide; all that can be, by default.

    Raises:
        ValueError: rows too wide for these kernels.
    """
    if channels * item > MAX_RESIDENT:
        raise ValueError(f"channels must take at most {MAX_RESIDENT} bytes for whole rows, got {channels} x {item}")
    kept = min(num_tokens, num_prune_kept)
    slots = min(kept, num_merge_kept)
    sources = kept - slots
    destinations = batch * min(sources, slots - num_prefix_tokens) if destinations is None else destinations
    name = "prune_merge_norm" if fused else "prune_merge"
    row = channels * item
    row_in, row_out, vectors = row * (1 + fused), row * (1 + fused), 2 * row * fused
    beside = _INDEX + _FLOAT * has_size  # a token's place in the order, and its size

    tiles = launch_config("prune_merge", "kept", gpu, C=channels, S=sources, itemsize=item)
    blocks, parts = ceil_div(slots, tiles["BLOCK_M"]), max(1, ceil_div(sources, tiles["BLOCK_S"]))
    padded = ceil_div(channels, tiles["BLOCK_C"]) * tiles["BLOCK_C"] * (sources > 0)
    found = blocks * (_FLOAT + _INDEX) + _FLOAT  # of a source: each block's best slot and its product; its inverse norm
    written = slots * (row_out + _FLOAT) + sources * found
    sizes = slots * _FLOAT * has_size
    # A program per block of slots and part of the sources: those of the first part write.
    each_part = slots * (row_in + _INDEX) + blocks * vectors
    costs = [
        _select(f"{name}.select", batch, heads, num_tokens, kept, sources, num_prefix_tokens, block, gpu),
        KernelCost(
            f"{name}.kept",
            block,
            multiply_adds=batch * sources * (slots - num_prefix_tokens) * channels,
            tile_multiply_adds=batch * blocks * tiles["BLOCK_M"] * parts * tiles["BLOCK_S"] * padded,
            bytes_read=batch * (kept * (row_in + _INDEX) + sizes) + vectors,
            bytes_written=batch * written,
            bytes_loaded=batch * (parts * each_part + sources * (blocks * (row_in + _INDEX) + row_in) + sizes),
            bytes_stored=batch * written,
            programs=batch * blocks * parts,
        ),
    ]
    if not sources:
        return costs
    tiles = launch_config("prune_merge", "join", gpu, C=channels)
    parts = ceil_div(sources, tiles["BLOCK_R"])
    # A program looks at its own sources, at all up to them, and at all.
    earlier = sum(
        min(sources, _up(part * tiles["BLOCK_R"] + tiles["BLOCK_R"], tiles["BLOCK_S"])) for part in range(parts)
    )
    looked_at = (sources + earlier + parts * sources) * found
    joined = destinations * (row_in + beside)
    written = batch * sources * _LONG + destinations * (row_out + _FLOAT)
    costs.append(
        KernelCost(
            f"{name}.join",
            block,
            bytes_read=batch * sources * (found + row_in + beside) + joined + vectors,
            bytes_written=written,
            bytes_loaded=batch * (looked_at + sources * (row_in + beside + _INDEX) + parts * vectors) + joined,
            bytes_stored=written,
        )
    )
    return costs


def add_layer_norm(
    rows: int, channels: int, item: int, *, block: int | None = None, name: str = "add_layer_norm"
) -> list[KernelCost]:
    """x + branch and its LayerNorm: two rows in, two out; weight and bias for each row, from the cache."""
    row = channels * item
    return [
        KernelCost(
            name,
            block,
            bytes_read=2 * rows * row + 2 * row,
            bytes_written=2 * rows * row,
            bytes_loaded=4 * rows * row,
            bytes_stored=2 * rows * row,
        )
    ]


def linear_gelu(
    rows: int, inputs: int, outputs: int, item: int, *, block: int | None = None, gpu: str = DEFAULT
) -> list[KernelCost]:
    """A product with bias and GELU on its tiles. Rows beyond the last are read from the start again, not masked."""
    tiles = launch_config("linear_gelu", "forward", gpu, F=outputs, K=inputs, itemsize=item)
    blocks_m, blocks_f = ceil_div(rows, tiles["BLOCK_M"]), ceil_div(outputs, tiles["BLOCK_F"])
    tile_rows, tile_columns = tiles["BLOCK_M"] * blocks_m, tiles["BLOCK_F"] * blocks_f
    loaded = tile_rows * blocks_f * inputs + tile_columns * blocks_m * inputs + outputs * blocks_m
    return [
        KernelCost(
            "linear_gelu",
            block,
            multiply_adds=rows * inputs * outputs,
            tile_multiply_adds=tile_rows * tile_columns * _up(inputs, tiles["BLOCK_K"]),
            bytes_read=(rows * inputs + inputs * outputs + outputs) * item,
            bytes_written=rows * outputs * item,
            bytes_loaded=loaded * item,
            bytes_stored=rows * outputs * item,
            matrix=(rows, inputs, outputs),
            programs=blocks_m * blocks_f,
        )
    ]


def _select(
    name: str,
    batch: int,
    heads: int,
    num_tokens: int,
    kept: int,
    sources: int,
    num_prefix_tokens: int,
    block: int | None,
    gpu: str,
) -> KernelCost:
    tiles = launch_config("prune_merge", "select", gpu, N=num_tokens)
    others = (num_tokens - num_prefix_tokens) * ceil_div(num_tokens, tiles["BLOCK_N"])
    written = kept * _INDEX + (num_tokens - sources) * _LONG
    return KernelCost(
        name,
        block,
        bytes_read=batch * heads * num_tokens * _FLOAT,
        bytes_written=batch * written,
        bytes_loaded=batch * heads * (num_tokens + others) * _FLOAT,
        bytes_stored=batch * written,
    )


def _up(value: int, step: int) -> int:
    return ceil_div(value, step) * step


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()
