"""Measured latency as a budget: a table of a model's parts against token count, on the device that serves it."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.budgets.base import Budget, check_number, check_target, least_counts
from tokcomp.budgets.staircase import Staircase
from tokcomp.budgets.vit_parts import PARTS, uniform_blocks
from tokcomp.cost import TokenCounts, counts_of
from tokcomp.files import write_whole
from tokcomp.reading import read_json

FORMAT = "tokcomp.LatencyTable"
VERSION = 1


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per batch of each part of a model, at the token counts that were measured.

    A batch takes ``embed + sum over blocks of (attention(num_in) + reduce(num_in) where num_out < num_in +
    mlp(num_out)) + head(last num_out)``. Made by :func:`tokcomp.budgets.measure_latency`.

    Raises:
        ValueError: a list has the wrong length, is not ascending (``counts``), or does not hold times.
    """

    depth: int
    num_tokens: int  # tokens that enter block 0, prefix included
    num_prefix_tokens: int
    block: dict[str, int]  # the blocks' shape, as in BlockCost
    batch_size: int
    dtype: str  # "float32", "bfloat16", "float16"
    embed_ms: float
    counts: list[int]  # ascending; the last is num_tokens
    attention_ms: list[float]
    reduce_ms: list[float]
    mlp_ms: list[float]
    head_ms: list[float]
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.counts or self.counts != sorted(set(self.counts)) or self.counts[0] < 1:
            raise ValueError(f"counts must be ascending and positive, got {self.counts}")
        if self.counts[-1] != self.num_tokens:
            raise ValueError(f"counts must end with the {self.num_tokens} tokens of the model, got {self.counts[-1]}")
        for part in PARTS:
            times = self._times(part)
            if len(times) != len(self.counts):
                raise ValueError(f"{part}_ms must have one entry per count, {len(self.counts)}, got {len(times)}")
            for time in (*times, self.embed_ms):
                check_number(f"{part}_ms", time)

    def _times(self, part: str) -> list[float]:
        return getattr(self, f"{part}_ms")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON: the file at ``path`` is either replaced whole or left as it was."""
        data = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_whole(Path(path), json.dumps(data, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not JSON, not a latency table, or written by a newer version; the message names the file.
        """
        path = Path(path)
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a latency table; `tokcomp search --target-ms` writes one")
        version = data.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path}: version must be {VERSION}, got {version!r}; a newer tokcomp wrote it")
        try:
            return cls(**data)
        except (TypeError, ValueError, OverflowError) as error:  # of a number beyond any float
            raise ValueError(f"{path}: not a valid latency table ({error})") from error

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless the table is for a model of this shape: token count, depth, block."""
        adapter = find_adapter(model)
        geometry = adapter.geometry(model)
        shape = {
            "depth": geometry.depth,
            "num_tokens": adapter.num_tokens(model),
            "num_prefix_tokens": geometry.num_prefix_tokens,
            "block": uniform_blocks(model)._asdict(),
        }
        for name, value in shape.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"the latency table must be for this model: its {name} is {getattr(self, name)}, the model's "
                    f"{value}; measure this model, or name its own table"
                )

    def milliseconds(self, counts: TokenCounts) -> float:
        """The time of a batch at these counts, by the table."""
        return TabulatedLatency(self)(counts).item()

    def _every_count(self, times: list[float]) -> Tensor:
        table = torch.empty(self.num_tokens + 1, dtype=torch.float64)
        table[: self.counts[0] + 1] = times[0]
        pairs = list(zip(self.counts, times, strict=True))
        for (count, time), (next_count, next_time) in itertools.pairwise(pairs):
            steps = torch.arange(1, next_count - count, dtype=torch.float64) / (next_count - count)
            table[count + 1 : next_count] = time + (next_time - time) * steps
            table[next_count] = next_time
        return table


class TabulatedLatency:
    """A table as a function of token counts: milliseconds per batch, 0-dim float64, with smoothed gradients."""

    def __init__(self, table: LatencyTable) -> None:
        self._embed_ms = table.embed_ms
        self._stairs = {part: Staircase(table._every_count(table._times(part))) for part in PARTS}
        self._device = torch.device("cpu")

    def __call__(self, counts: TokenCounts) -> Tensor:
        device = counts.num_in.device
        if self._device != device:
            self._stairs = {part: stairs.to(device) for part, stairs in self._stairs.items()}
            self._device = device
        stairs = self._stairs
        drops = (counts.num_out < counts.num_in).detach()
        blocks = stairs["attention"](counts.num_in) + stairs["mlp"](counts.num_out)
        blocks = blocks + drops * stairs["reduce"](counts.num_in)
        return self._embed_ms + blocks.sum() + stairs["head"](counts.num_out[-1])


class LatencyBudget(Budget):
    """((E - T) / E0)^2 with E and T in ms per batch and E0 the uncompressed model's time.

    E is the table's own, stepwise value; its gradient is smoothed (:class:`Staircase`). The loss is relative, so that
    one weight suits batches of microseconds and of seconds: the default of 100 pulls as strongly as lambda_f = 5 on
    DeiT-S's multiply-adds (5 * 4.6^2 = 106).

    Args:
        model: the timm model, compressed or not.
        table: a table for a model of this shape.
        target_ms: T, milliseconds for a batch of ``table.batch_size`` images; or instead
        target_images_per_s: the same as a rate, ``T = 1000 * table.batch_size / target_images_per_s``.
        weight: factor on the loss.
        granularity: the search's granularity, which determines the smallest reachable time.

    Raises:
        TargetError: the target is beyond the uncompressed model's time or the reachable minimum.
        ValueError: the table is for another model, or not exactly one target is given.
    """

    name = "latency"
    unit = "ms"

    def __init__(
        self,
        model: nn.Module,
        table: LatencyTable,
        *,
        target_ms: float | None = None,
        target_images_per_s: float | None = None,
        weight: float = 100.0,
        granularity: int = 1,
    ) -> None:
        table.check_model(model)
        self.table = table
        self._latency = TabulatedLatency(table)
        self.weight = check_number("weight", weight)
        least, most = (self.cost(counts).item() for counts in (least_counts(model, granularity), counts_of(model)))
        self.uncompressed = most
        ends = f"for a batch of {table.batch_size} in {table.dtype}"
        if (target_ms is None) == (target_images_per_s is None):
            raise ValueError("exactly one of target_ms and target_images_per_s must be given")
        if target_images_per_s is None:
            assert target_ms is not None
            self.target = check_target("target_ms", target_ms, f"ms {ends}", smallest=least, uncompressed=most)
        else:
            images = 1e3 * table.batch_size
            rate = check_target(
                "target_images_per_s",
                target_images_per_s,
                f"images/s {ends}",
                smallest=images / least,
                uncompressed=images / most,
            )
            self.target = images / rate

    def cost(self, counts: TokenCounts) -> Tensor:
        return self._latency(counts)

    def loss(self, counts: TokenCounts) -> Tensor:
        return ((self.cost(counts) - self.target) / self.uncompressed).square()

    def describe(self) -> dict[str, Any]:
        table = self.table
        return {
            **super().describe(),
            "batch_size": table.batch_size,
            "dtype": table.dtype,
            "images_per_second": 1e3 * table.batch_size / self.target,
            "uncompressed": self.uncompressed,
            "table": table.provenance,
        }
