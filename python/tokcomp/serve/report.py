"""The outcome of a policy's run: latency, throughput, accuracy, and which degrees it used."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcomp.serve.server import Answer

PERCENTILES = (50, 95, 99)
FIELDS = (
    "policy",
    "request",
    "image",
    "label",
    "answer",
    "arrival",
    "started",
    "finished",
    "degree",
    "batch",
    "batch_size",
    "waiting",
)


@dataclass(frozen=True)
class Run:
    """One policy under the load: an entry per request, in the order they arrived. Times are seconds from the start."""

    policy: str
    image: np.ndarray  # int64, as everything but the times
    label: np.ndarray
    answer: np.ndarray
    arrival: np.ndarray  # float64
    started: np.ndarray
    finished: np.ndarray
    degree: np.ndarray
    batch: np.ndarray
    batch_size: np.ndarray
    waiting: np.ndarray

    @property
    def latency(self) -> np.ndarray:
        """Milliseconds from each request's arrival to its answer."""
        return 1000 * (self.finished - self.arrival)

    def batches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per batch, in order: when it started, how many requests were waiting then, its degree."""
        _, first = np.unique(self.batch, return_index=True)
        return self.started[first], self.waiting[first], self.degree[first]


def collect(policy: str, start: float, answers: Sequence[Answer], image: np.ndarray, labels: Tensor) -> Run:
    """The run of one policy.

    Args:
        policy: its name.
        start, answers: as :func:`tokcomp.serve.load.send` returns them.
        image: which image each request sent.
        labels: [n] labels of all images.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("answers must hold at least one, got none")
    times = np.array([(one.arrival, one.started, one.finished) for one in answers]) - start
    counts = np.array([(one.degree, one.batch, one.batch_size, one.waiting) for one in answers])
    answer = torch.stack([one.logits for one in answers]).argmax(-1).numpy()
    return Run(policy, np.asarray(image), labels.numpy()[image], answer, *times.T, *counts.T)


def summary(run: Run) -> dict[str, Any]:
    """JSON data: latencies in milliseconds, images per second from the first arrival to the last answer, accuracy in
    per cent, and the share of requests answered at each degree."""
    count = len(run.arrival)
    shares = Counter(run.degree.tolist())
    seconds = float(run.finished.max() - run.arrival[0])
    latency = run.latency
    return {
        "policy": run.policy,
        "requests": count,
        **{f"p{part}_ms": round(float(np.percentile(latency, part)), 3) for part in PERCENTILES},
        "mean_ms": round(float(latency.mean()), 3),
        "max_ms": round(float(latency.max()), 3),
        "images_per_second": round(count / seconds, 2),
        "top1": round(100.0 * float((run.answer == run.label).mean()), 4),
        "longest_queue": int(run.waiting.max()),
        "batches": int(run.batch.max()) + 1,
        "mean_batch": round(count / (int(run.batch.max()) + 1), 2),
        "degrees": {str(degree): round(shares[degree] / count, 4) for degree in sorted(shares)},
    }


def table_of(summaries: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that is printed."""
    header = ["policy", *(f"p{part} ms" for part in PERCENTILES), "images/s", "top-1 %", "queue", "batch", "degrees"]
    rows = []
    for one in summaries:
        mix = " ".join(f"{degree}:{100 * share:.0f}%" for degree, share in one["degrees"].items())
        rows.append(
            [
                one["policy"],
                *(f"{one[f'p{part}_ms']:.1f}" for part in PERCENTILES),
                f"{one['images_per_second']:.0f}",
                f"{one['top1']:.2f}",
                f"{one['longest_queue']}",
                f"{one['mean_batch']:.1f}",
                mix,
            ]
        )
    return header, rows


def as_csv(runs: Sequence[Run]) -> str:
    """Every request of every run, one per line; times in seconds from the start of its run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for run in runs:
        columns = [getattr(run, name).tolist() for name in FIELDS[2:]]
        for number, values in enumerate(zip(*columns, strict=True)):
            numbers = [f"{value:.6f}" if isinstance(value, float) else value for value in values]
            writer.writerow([run.policy, number, *numbers])
    return text.getvalue()
