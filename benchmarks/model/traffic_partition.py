"""What the Triton kernels of bipartite_merge and select_diverse read, write and multiply: as ``traffic_triton``."""

from __future__ import annotations

from benchmarks.model.traffic import KernelCost, ceil_div
from tokcomp_kernels.triton._configs import DEFAULT, launch_config

_FLOAT, _INDEX, _LONG = 4, 4, 8  # bytes of float32, int32, int64


def bipartite_merge(
    batch: int,
    num_tokens: int,
    num_sources: int,
    num_destinations: int,
    r: int,
    channels: int,
    width: int,
    item: int,
    *,
    has_size: bool,
    gpu: str = DEFAULT,
) -> list[KernelCost]:
    """Every image with the same numbers of sources (at least r) and destinations; rows of ``width`` are compared.

    The sources' rows are read once more for each tile of destinations, and the destinations' for each of sources.
    """
    sources, destinations, kept = num_sources, num_destinations, num_tokens - r
    lists = (sources + destinations) * _INDEX
    written = lists + num_tokens * _FLOAT + (num_tokens - sources) * _INDEX + 2 * _INDEX
    partition = KernelCost(
        "bipartite_merge.partition",
        None,
        bytes_read=batch * num_tokens * _LONG,
        bytes_written=batch * written,
        bytes_loaded=batch * num_tokens * _LONG,
        bytes_stored=batch * written,
        programs=batch,
    )
    tiles = launch_config("bipartite_merge", "match", gpu, K=width, itemsize=item)
    blocks, parts = ceil_div(sources, tiles["BLOCK_S"]), ceil_div(destinations, tiles["BLOCK_D"])
    programs = ceil_div(num_tokens, tiles["BLOCK_S"])
    padded = ceil_div(width, tiles["BLOCK_C"]) * tiles["BLOCK_C"]
    row, written = width * item, sources * (_FLOAT + _INDEX)
    looked_at = (programs + blocks) * _INDEX + sources * 2 * _INDEX + blocks * destinations * _INDEX
    match = KernelCost(
        "bipartite_merge.match",
        None,
        multiply_adds=batch * sources * destinations * width,
        tile_multiply_adds=batch * blocks * tiles["BLOCK_S"] * parts * tiles["BLOCK_D"] * padded,
        bytes_read=batch * (2 * _INDEX + lists + (sources + destinations) * row),
        bytes_written=batch * written,
        bytes_loaded=batch * (looked_at + (sources * (1 + parts) + blocks * destinations) * row),
        bytes_stored=batch * written,
        programs=batch * programs,
    )
    tiles = launch_config("bipartite_merge", "rank", gpu, N=num_tokens)
    blocks = ceil_div(num_tokens, tiles["BLOCK_N"])
    rank = KernelCost(
        "bipartite_merge.rank",
        None,
        bytes_read=batch * (_INDEX + sources * (_FLOAT + 2 * _INDEX)),
        bytes_written=batch * sources * _INDEX,
        bytes_loaded=batch * (blocks * _INDEX + sources * ((1 + blocks) * _FLOAT + 2 * _INDEX)),
        bytes_stored=batch * sources * _INDEX,
        programs=batch * blocks,
    )
    written = num_tokens * (_LONG + _INDEX) + r * _INDEX
    assign = KernelCost(
        "bipartite_merge.assign",
        None,
        bytes_read=batch * num_tokens * _INDEX,
        bytes_written=batch * written,
        bytes_loaded=batch * (1 + blocks) * num_tokens * _INDEX,
        bytes_stored=batch * written,
        programs=batch * blocks,
    )
    return [partition, match, rank, assign, _rows(batch, num_tokens, kept, channels, item, has_size, gpu)]


def _rows(batch: int, num_tokens: int, kept: int, channels: int, item: int, has_size: bool, gpu: str) -> KernelCost:
    """Each row once, the places and sizes of tokens for each block of channels, the slots of sources everywhere."""
    tiles = launch_config("bipartite_merge", "apply", gpu, S=num_tokens - kept, C=channels)
    blocks, parts = ceil_div(kept, tiles["BLOCK_M"]), ceil_div(channels, tiles["BLOCK_C"])
    merged, written = num_tokens - kept, kept * (channels * item + _FLOAT)
    beside, rows = num_tokens * (_INDEX + _FLOAT * has_size), num_tokens * channels * item
    return KernelCost(
        "bipartite_merge.apply",
        None,
        bytes_read=batch * (rows + beside + merged * _INDEX),
        bytes_written=batch * written,
        bytes_loaded=batch * (rows + parts * (beside + blocks * merged * _INDEX)),
        bytes_stored=batch * written,
        programs=batch * blocks * parts,
    )


def select_diverse(
    batch: int,
    num_patches: int,
    num_chosen: int,
    width: int,
    item: int,
    *,
    rule: str = "farthest",
    num_prefix_tokens: int = 1,
    gpu: str = DEFAULT,
) -> list[KernelCost]:
    """The cosines of all pairs, below the diagonal and mirrored; then a row of them for each choice.

    For ``dpp``, with relevance of float32, each choice reads the Cholesky rows of those before it and writes its own.
    """
    tiles = launch_config("select_diverse", "cosine", gpu, K=width, itemsize=item)
    blocks = ceil_div(num_patches, tiles["BLOCK_P"])
    padded = ceil_div(width, tiles["BLOCK_C"]) * tiles["BLOCK_C"]
    row, pairs = num_patches * _FLOAT, num_patches * (num_patches + 1) // 2
    beside = (blocks + 1) * row if rule == "farthest" else row
    cosine = KernelCost(
        "select_diverse.cosine",
        None,
        multiply_adds=batch * pairs * width,
        tile_multiply_adds=batch * blocks * (blocks + 1) // 2 * tiles["BLOCK_P"] ** 2 * padded,
        bytes_read=batch * num_patches * width * item,
        bytes_written=batch * (num_patches**2 * _FLOAT + beside),
        bytes_loaded=batch * 2 * (blocks + 1) * num_patches * width * item,
        bytes_stored=batch * (2 * pairs * _FLOAT + beside),
        programs=batch * blocks**2,
    )
    order = (num_prefix_tokens + num_chosen) * _LONG
    if rule == "farthest":
        # What is chosen already is not compared any more.
        compared = (num_chosen * num_patches - num_chosen * (num_chosen + 1) // 2) * _FLOAT
        read = loaded = beside + compared
        written = order
    else:
        earlier = num_chosen * (num_chosen - 1) // 2
        read = (2 + num_chosen + num_chosen - 1) * row
        loaded = 2 * row + num_chosen * (2 * _FLOAT + row) + earlier * (_FLOAT + row)
        written = order + num_chosen * row
    choice = KernelCost(
        f"select_diverse.{rule}",
        None,
        bytes_read=batch * read,
        bytes_written=batch * written,
        bytes_loaded=batch * loaded,
        bytes_stored=batch * written,
        programs=batch,
    )
    return [cosine, choice]
