"""What a comparison recommends, in words, in the table and in the plots."""

from __future__ import annotations

import re

import pytest
import torch
from tokcomp.compare.answers import packed, paired
from tokcomp.compare.page import render
from tokcomp.compare.recommend import best_overall, overall_sentence, recommend, sentence
from tokcomp.compare.summary import header, summarize, table_of

COUNT = 100


def row(name, top1, half, speed=None, best=90.0, **more):
    speeds = {} if speed is None else {"speedup": speed}
    return {"name": name, "top1": top1, "less_best": [top1 - best, half], **speeds, **more}


def test_the_fastest_of_those_as_good_as_the_best():
    rows = [row("slow", 90.0, 0.0, 50), row("near", 89.5, 0.5, 70), row("quick", 88.0, 1.9, 99)]
    found = recommend(rows)
    assert found == {"name": "near", "best": "slow", "as_good": ["slow", "near"], "by_speed": True}
    assert sentence(found) == (
        "Recommended: near, the fastest of those that these images cannot tell from the best: slow; near."
    )
    found = recommend([{**one, "less_best": [one["less_best"][0], 0.1]} for one in rows])
    assert found["name"] == "slow" and sentence(found).endswith("no other is within its interval.")
    found = recommend([rows[0], row("near", 89.5, 0.5), rows[2]])
    assert found["name"] == "slow" and not found["by_speed"]
    assert sentence(found).startswith("Recommended: slow, the best by top-1 of those that")


def test_random_schedules_are_not_recommended():
    random = row("random, median of 2", 90.0, 0.0, random=[89.0, 90.0])
    assert recommend([]) is None and recommend([random]) is None
    found = recommend([random, row("a", 80.0, 1.0, 5), row("b", 70.0, 1.0, 9)])
    assert (found["name"], found["as_good"]) == ("a", ["a"])


def hits(*right):
    """[n] bool, as many right as said, from the first image on."""
    return {f"m{number}": torch.arange(COUNT) < one for number, one in enumerate(right)}


def test_the_best_on_average():
    budgets = [{**hits(90, 80, 89), "alone": torch.ones(COUNT, dtype=torch.bool)}, hits(60, 80, 60)]
    found = best_overall(budgets)
    assert (found["name"], found["top1"]) == ("m1", 80.0)
    # m0's mean is 5 points lower: by 10 images' halves up to 90, by 20 images' halves between 60 and 80.
    means = [torch.stack([one[name] for one in budgets]).double().mean(0) for name in ("m0", "m1")]
    assert paired(*means)[0] == pytest.approx(-5) and -5 + paired(*means)[1] > 0
    assert found["as_good"] == ["m1", "m0"]  # m2's 5.5 points are told apart
    assert overall_sentence(found).endswith("80.00 %; these images cannot tell it from m0.")
    assert best_overall(budgets[:1]) is None and best_overall([]) is None
    assert best_overall([hits(1), {"other": torch.ones(COUNT, dtype=torch.bool)}]) is None


def test_table_and_plots_show_it():
    labels = torch.zeros(COUNT, dtype=torch.int64)

    def cell(entry, target, right, speed):
        figures = {"gflops": target, "top1": float(right), "same": 0.0, "cross_entropy": 1.0, "num_images": COUNT}
        speeds = {"images_per_second": speed, "uncompressed_images_per_second": 1.0, "speedup": speed}
        answers = {"answers": packed((torch.arange(COUNT) >= right).long()), "labels": packed(labels)}
        kind = "none" if entry == "uncompressed" else entry
        return {"entry": entry, "kind": kind, "target": target, **answers, **figures, **speeds}

    cells = [cell("uncompressed", 2.0, 95, 1.0)]
    cells += [cell("tome", 1.0, 90, 2.0), cell("evit", 1.0, 89, 3.0), cell("tome", 0.5, 80, 4.0)]
    cells += [cell("evit", 0.5, 60, 5.0), {"entry": "dtome", "kind": "dtome", "target": 0.5, "impossible": "why"}]
    record = {**summarize(cells), "facts": {}, "machine": {"cpu": "a CPU", "gpus": []}}
    assert [budget["recommended"]["name"] for budget in record["budgets"]] == ["evit", "tome"]
    assert record["recommended"]["name"] == "tome" and record["recommended"]["as_good"] == ["tome"]
    assert header(record)[-1] == "verdict"
    verdicts = [[line[-1] for line in table_of(record, budget)] for budget in record["budgets"]]
    assert verdicts == [["", "as good", "recommended"], ["", "recommended", ""]]
    page = render(record, "title")
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    # Around each recommended point, which its series has drawn there, and once in the legend.
    for plot in plots:
        rings = re.findall(r'<circle class="ring" cx="([\d.]+)" cy="([\d.]+)"', plot)
        assert len(rings) == 3 and all(f'<circle cx="{x}" cy="{y}" r="3.5"' in plot for x, y in rings[:2])
    assert len(plots) == 2 and page.count("Recommended: ") == 3  # and the note on what it means
    assert "Over all budgets: tome has the highest top-1 on average, 85.00 %." in page
