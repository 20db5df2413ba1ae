"""Latency, queue and accuracy of each policy under one load, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokcomp.serve.load import Profile
from tokcomp.serve.report import PERCENTILES, Run

_ADAPTIVE = "#111827"


def draw(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]], profile: Profile, *, title: str = "") -> bytes:
    """A PNG of four parts: load and the degree of the last run over time, queue lengths, latencies, and accuracy
    against latency.

    Args:
        runs: one per policy, the adaptive one last.
        summaries: one per run.
        profile: the load.
        title: over the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    (load, latency), (queue, trade) = figure.subplots(2, 2)
    shades = colormaps["viridis_r"](np.linspace(0.1, 0.9, len(runs) - 1))
    colours = dict(zip([run.policy for run in runs], [*shades, _ADAPTIVE], strict=True))
    end = max(float(run.finished.max()) for run in runs)
    _draw_load(load, runs[-1], profile, end)
    _draw_queues(queue, runs, colours, end)
    _draw_latencies(latency, summaries, colours)
    _draw_trade(trade, summaries, colours)
    figure.suptitle(title)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    return picture.getvalue()


def _draw_load(axes: Any, run: Run, profile: Profile, end: float) -> None:
    width = profile.seconds / min(max(len(run.arrival) // 8, 8), 40)
    counts, edges = np.histogram(run.arrival, bins=np.arange(0, profile.seconds + width, width))
    axes.bar(edges[:-1], counts / width, width, align="edge", color="#d1d5db", label="arrived")
    axes.plot(*zip(*profile.points, strict=True), color="#6b7280", label="wanted rate")
    axes.set(xlabel="seconds", ylabel="requests per second", xlim=(0, end), title=f"load, and degree ({run.policy})")
    moments, _, degrees = run.batches()
    degree = axes.twinx()
    degree.step([*moments, end], [*degrees, degrees[-1]], where="post", color=_ADAPTIVE, linewidth=1, label="degree")
    degree.set(ylabel="degree", yticks=sorted(set(degrees.tolist())))
    degree.margins(y=0.1)
    axes.legend(loc="upper left", frameon=False)


def _draw_queues(axes: Any, runs: Sequence[Run], colours: Mapping[str, Any], end: float) -> None:
    for run in runs:
        moments, waiting, _ = run.batches()
        axes.step(moments, waiting, where="post", color=colours[run.policy], linewidth=1, label=run.policy)
    axes.set(xlabel="seconds", ylabel="requests waiting", xlim=(0, end), yscale="log", title="queue")
    axes.legend(frameon=False, fontsize="small")


def _draw_latencies(axes: Any, summaries: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> None:
    for index, one in enumerate(summaries):
        values = [one[f"p{part}_ms"] for part in PERCENTILES]
        places = np.arange(len(values)) + (index - (len(summaries) - 1) / 2) * 0.8 / len(summaries)
        axes.bar(places, values, 0.72 / len(summaries), color=colours[one["policy"]], label=one["policy"])
    axes.set_xticks(range(len(PERCENTILES)), [f"p{part}" for part in PERCENTILES])
    axes.set(ylabel="milliseconds", yscale="log", title="latency")
    axes.legend(frameon=False, fontsize="small", ncols=len(summaries), loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _draw_trade(axes: Any, summaries: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> None:
    fixed = summaries[:-1]
    axes.plot([one["p95_ms"] for one in fixed], [one["top1"] for one in fixed], color="#d1d5db", zorder=1)
    for index, one in enumerate(summaries):
        adaptive = index == len(summaries) - 1
        style = {"s": 130, "marker": "*"} if adaptive else {"s": 45, "marker": "o"}
        axes.scatter(one["p95_ms"], one["top1"], color=colours[one["policy"]], zorder=2, **style)
        place = (one["p95_ms"], one["top1"])
        axes.annotate(one["policy"], place, xytext=(7, -12 if adaptive else 5), textcoords="offset points")
    axes.set(xlabel="p95 latency, ms", ylabel="top-1, %", xscale="log", title="accuracy against latency")
    axes.margins(0.15)
