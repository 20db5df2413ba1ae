"""The CUDA kernels' machine code is what their source means: 16-byte accesses, no fence or barrier too many, as many
blocks a multiprocessor as designed. Read from the committed report, which is of these very sources
(tests/bench/test_kernel_reports.py), so this needs neither nvcc nor a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools import sass

ROOT = Path(__file__).resolve().parents[2]
KERNELS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results/kernels/cuda.json").read_text())["kernels"]
THREADS = {"attention_resident_kernel": 128, "attention_streaming_kernel": 128}  #: of a block; 256 of the others
REGISTERS = 64 * 1024  # of a multiprocessor
#: Blocks a multiprocessor: of float32, and of the others. Shared memory for as many is tests/cuda/host_shim_suite.py's.
BLOCKS = {
    "prune_merge_resident_kernel": (2, 3),
    "prune_merge_streaming_kernel": (2, 3),
    "class_attention_sort_kernel": (3, 3),
    "attention_received_kernel": (2, 3),
    "attention_resident_kernel": (3, 3),  # four but for heads of 80: below
    "attention_streaming_kernel": (3, 3),
    "masked_softmax_kernel": (4, 4),
    "masked_softmax_backward_kernel": (2, 2),
    "add_layer_norm_kernel": (3, 3),
    "merge_backward_kernel": (4, 4),
    "partial_sums_kernel": (6, 6),
    "rank_kernel": (6, 6),
    "inverse_norm_kernel": (8, 8),
    "partition_kernel": (8, 8),
    "match_kernel": (2, 3),
    "join_kernel": (8, 8),
    "slot_kernel": (8, 8),
    "joined_rows_kernel": (4, 4),
    "cosine_kernel": (2, 3),
    "select_diverse_kernel": (5, 5),
}
#: The most shuffles and block barriers. A loop that is unrolled repeats them, and so do the copies of a loop for
#: a cluster of one block and of several.
LIMITS = {
    "prune_merge_resident_kernel": (30, 19),
    "prune_merge_streaming_kernel": (28, 7),
    "class_attention_sort_kernel": (28, 3),
    "attention_received_kernel": (30, 4),
    "attention_resident_kernel": (114, 1),
    "attention_streaming_kernel": (56, 2),
    "masked_softmax_kernel": (10, 0),
    "masked_softmax_backward_kernel": (30, 1),
    "add_layer_norm_kernel": (10, 0),
    "merge_backward_kernel": (10, 0),
    "partial_sums_kernel": (0, 0),
    "rank_kernel": (0, 2),
    "inverse_norm_kernel": (5, 0),
    "partition_kernel": (0, 2),
    "match_kernel": (40, 3),
    "join_kernel": (0, 2),
    "slot_kernel": (0, 2),
    "joined_rows_kernel": (0, 0),
    "cosine_kernel": (0, 3),
    "select_diverse_kernel": (20, 3),
}
#: Whose rows or sums lie in shared memory or in device memory, as they fit; the resident one reads other blocks'.
EITHER_MEMORY = (
    *("class_attention_sort_kernel", "masked_softmax_backward_kernel", "select_diverse_kernel"),
    *("prune_merge_streaming_kernel", "prune_merge_resident_kernel"),
)


def of(kernel: str, architecture: int = 90) -> list[dict[str, Any]]:
    found = [row for row in KERNELS if row["kernel"] == kernel and row["architecture"] == architecture]
    assert found
    return found


def blocks_by_registers(row: dict[str, Any]) -> int:
    """Registers are given to a warp in units of 256, so to a thread in units of 8."""
    return REGISTERS // (-(-row["registers"] // 8) * 8 * THREADS.get(row["kernel"], 256))


def test_every_kernel_has_its_limits() -> None:
    assert {row["kernel"] for row in KERNELS} == BLOCKS.keys() == LIMITS.keys()
    assert all(row["instructions"].keys() == sass.KINDS.keys() for row in KERNELS)


@pytest.mark.parametrize("kernel", BLOCKS)
def test_as_many_blocks_a_multiprocessor_as_designed(kernel: str) -> None:
    for row in (*of(kernel, 80), *of(kernel)):
        designed = BLOCKS[kernel][row["dtype"] != "float32"]
        assert blocks_by_registers(row) >= designed, row
        assert not row["instructions"]["local"], row


@pytest.mark.parametrize("kernel", LIMITS)
def test_no_more_shuffles_and_barriers_than_meant(kernel: str) -> None:
    shuffles, barriers = LIMITS[kernel]
    for row in (*of(kernel, 80), *of(kernel)):
        counts = row["instructions"]
        assert counts["shuffles"] <= shuffles and counts["block_barriers"] <= barriers, row
        assert kernel in EITHER_MEMORY or not counts["generic"], row


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: f"{row['kernel']}-{row['dtype']}-{row['architecture']}")
def test_only_a_clusters_barriers_fence(row: dict[str, Any]) -> None:
    """A fence waits for every store that is under way. Two relaxed arrivals of the resident kernel have none: that its
    blocks run, and that nothing of another is read any more."""
    resident = row["kernel"] == "prune_merge_resident_kernel" and row["architecture"] == 90
    counts = row["instructions"]
    assert counts["fences"] <= (6 if resident else 0) and counts["cluster_barriers"] <= (8 if resident else 0)
    assert not resident or counts["cluster_barriers"] - counts["fences"] >= 2


@pytest.mark.parametrize("architecture", [80, 90])
def test_rows_move_16_bytes_at_a_time(architecture: int) -> None:
    """Rows in shared memory: stored as they are loaded (four under way, or two); on merging read, a source's row too,
    and written back; read for the output. Products take theirs by matrix, or in float32 four numbers at a time."""
    for kernel, least in (("prune_merge_resident_kernel", 8), ("prune_merge_streaming_kernel", 2)):
        for row in of(kernel, architecture):
            counts = row["instructions"]
            assert counts["shared_128"] >= least + (16 if row["dtype"] == "float32" else 0), row
            assert (counts["matrices"] > 0) == (counts["products"] > 0) == (row["dtype"] != "float32"), row


def width_of(row: dict[str, Any]) -> int:
    """Of the heads that a variant of attention is for."""
    [width] = re.findall(r"Li(\d+)E", row["symbol"])
    return int(width)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel", ["attention_resident_kernel", "attention_streaming_kernel"])
def test_attention_moves_pieces_and_multiplies_matrices(kernel: str, architecture: int) -> None:
    """Four steps of 16 keys are held: in each, a matrix load for 16 keys and channels and two products of it with the
    queries, and as many with the values. Keys and values reach shared memory past the registers, 16 bytes at a time."""
    found = of(kernel, architecture)
    assert sorted({width_of(row) for row in found}) == [32, 48, 64, 80]
    for row in found:
        counts, loads = row["instructions"], 2 * 4 * width_of(row) // 16
        assert (counts["matrices"], counts["products"]) == (loads, 2 * loads), row
        assert counts["copies_128"] >= 2 and not counts["copies_narrow"], row
        assert not counts["shared_128"], row
        if kernel == "attention_resident_kernel" and width_of(row) <= 64:
            assert row["registers"] <= 128 and blocks_by_registers(row) >= 4, row


def test_instructions_are_counted_by_kernel_and_kind() -> None:
    listing = """
Fatbin elf code:
arch = sm_90
\tcode for sm_90
\t\tFunction : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDS.128 R4, [R2] ;              /* 0x0 */
        /*0020*/                   STS.U16 [R2], R4 ;              /* 0x0 */
        /*0030*/                   LDSM.16.M88.4 R8, [R3] ;        /* 0x0 */
        /*0040*/                   MEMBAR.ALL.GPU ;                /* 0x0 */
        /*0048*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64], P0 ;  /* 0x0 */
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;   /* 0x0 */
\tcode for sm_80
\t\tFunction : first
        /*0000*/             @UP1  UCGABAR_ARV ;                   /* 0x0 */
        /*0010*/                   LD.E.64 R2, [R4.64] ;           /* 0x0 */
"""
    found = sass.count(listing)
    assert found.keys() == {("first", 90), ("first", 80)}
    kinds = {kind: 0 for kind in sass.KINDS}
    seen = ("shared_128", "shared_narrow", "copies_128", "matrices", "fences", "block_barriers")
    assert found["first", 90] == {**kinds, **dict.fromkeys(seen, 1)}
    assert found["first", 80] == {**kinds, "cluster_barriers": 1, "generic": 1}
