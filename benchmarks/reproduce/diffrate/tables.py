"""Markdown tables of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.reproduce.spread import Series, difference, markdown, mean_and_deviation, spread


def comparison(rows: Mapping[str, Series], uncompressed: Sequence[float], baseline: str) -> str:
    """One row per series; differences are to the row named ``baseline``."""
    header = ["", "cost", "top-1", "cross entropy", "same answer", f"top-1 less {baseline}'s (seeds ahead)"]
    reference = rows[baseline]["top1"]
    body = []
    for name, series in rows.items():
        shares = [100e6 * m / dense for m, dense in zip(series["mflops"], uncompressed, strict=True)]
        body.append(
            [
                name,
                f"{mean_and_deviation(shares)[0]:.1f} %",
                f"{spread(series['top1'])} %",
                spread(series["cross_entropy"], 4),
                f"{mean_and_deviation(series['same'])[0]:.1f} %",
                difference(series["top1"], reference),
            ]
        )
    return markdown(header, body)


def _percent(share: str | float) -> str:
    return f"{100 * float(share):g} %"


def all_tables(summary: Mapping[str, Any]) -> str:
    """The whole page of tables."""
    settings, dense = summary["settings"], summary["uncompressed"]["flops"]
    plain = summary["uncompressed"]
    ablation = _percent(settings["ablation_share"])
    parts = [
        f"Uncompressed: {spread(plain['top1'])} % top-1, cross entropy {spread(plain['cross_entropy'], 4)}, "
        f"{dense[0] / 1e6:.2f} M multiply-adds; {len(dense)} models."
    ]
    for share, table in summary["equal_cost"].items():
        parts.append(f"## Methods at {_percent(share)} of the cost")
        parts.append(comparison(table["rows"], dense, "DiffRate"))
        found = [100e6 * m / flops for m, flops in zip(table["found"]["mflops"], dense, strict=True)]
        parts.append(
            f"Before the fit to the budget the searches stood at {spread(found)} % of the cost, "
            f"with {spread(table['found']['top1'])} % top-1."
        )
        counts = [
            [str(seed), " ".join(map(str, before)), " ".join(map(str, kept))]
            for seed, (before, kept) in zip(settings["seeds"], table["counts"], strict=True)
        ]
        parts.append(markdown(["seed", "tokens after pruning, per block", "after merging"], counts))
    bundled = summary["bundled"]
    parts.append("## The model that comes with the package")
    parts.append(
        f"Uncompressed: {bundled['uncompressed']['top1'][0]:.2f} % top-1, cross entropy "
        f"{bundled['uncompressed']['cross_entropy'][0]:.4f}."
    )
    for share, table in bundled["equal_cost"].items():
        parts.append(f"At {_percent(share)} of the cost:")
        parts.append(comparison(table["rows"], bundled["uncompressed"]["flops"], "DiffRate"))
    parts.append("## Among random schedules (Fig. 4)")
    parts.append(_random_table(summary["random"]))
    baselines = {"metric": "cls_attn", "pipeline": "prune_merge", "images": "all", "epochs": "3"}
    titles = {
        "metric": "Sorting metric (Table 4a)",
        "pipeline": "Pipeline (Table 4b)",
        "images": "Pictures searched on (Table 4c)",
        "epochs": "Epochs of search (Table 4d)",
    }
    for kind, rows in summary["ablations"].items():
        parts.append(f"## {titles[kind]}, at {ablation} of the cost")
        baseline = baselines[kind] if baselines[kind] in rows else next(iter(rows))
        parts.append(comparison(rows, dense, baseline))
    parts.append("## With and without the clamp of sizes (`match_inference`)")
    for share, table in summary["match_inference"].items():
        parts.append(f"At {_percent(share)} of the cost:")
        parts.append(comparison(table["rows"], dense, "clamped (published)"))
        gaps = [
            [name, spread(gap["logits"], 3), spread(gap["search"], 4), spread(gap["inference"], 4)]
            for name, gap in table["gap"].items()
        ]
        header = ["", "mean difference of logits", "cross entropy in search", "and in inference"]
        parts.append(markdown(header, gaps))
    parts.append("## Schedules of other models (Fig. 6)")
    for share, table in summary["transfer"].items():
        parts.append(f"At {_percent(share)} of the cost:")
        parts.append(comparison(table, dense, "own"))
    return "\n\n".join(parts) + "\n"


def _random_table(panels: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "cost, pipeline",
        "random, median",
        "random, best",
        "best on training pictures",
        "DiffRate",
        "random ones that DiffRate beats: top-1",
        "cross entropy",
    ]
    body = []
    for panel in panels:
        seeds = panel["seeds"]
        middle = [sorted(seed["top1"])[len(seed["top1"]) // 2] for seed in seeds]
        body.append(
            [
                f"{_percent(panel['share'])}, {panel['pipeline']}",
                f"{spread(middle)} %",
                f"{spread([max(seed['top1']) for seed in seeds])} %",
                f"{spread([seed['chosen_top1'] for seed in seeds])} %",
                f"{spread(panel['DiffRate']['top1'])} %",
                f"{100 * mean_and_deviation([seed['below_top1'] for seed in seeds])[0]:.0f} %",
                f"{100 * mean_and_deviation([seed['above_cross_entropy'] for seed in seeds])[0]:.0f} %",
            ]
        )
    return markdown(header, body)
