from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
from tokcomp.serve.load import Profile
from tokcomp.serve.plot import draw
from tokcomp.serve.report import FIELDS, as_csv, collect, summary, table_of
from tokcomp.serve.server import Answer

LABELS = torch.tensor([2, 0, 1])


def answer(arrival, started, finished, degree, batch, size, waiting, label):
    logits = torch.zeros(3)
    logits[label] = 1
    return Answer(logits, 100 + arrival, 100 + started, 100 + finished, degree, batch, size, waiting)


@pytest.fixture
def run():
    """Five requests in three batches, one of them answered wrong."""
    answers = [
        answer(0.0, 0.1, 0.3, 0, 0, 1, 1, 2),
        answer(0.1, 0.3, 0.5, 4, 1, 3, 4, 0),
        answer(0.2, 0.3, 0.5, 4, 1, 3, 4, 1),
        answer(0.3, 0.3, 0.5, 4, 1, 3, 4, 0),
        answer(0.4, 0.5, 1.0, 0, 2, 1, 1, 0),
    ]
    return collect("adaptive", 100.0, answers, np.array([0, 1, 2, 0, 1]), LABELS)


def test_summary_by_hand(run):
    found = summary(run)
    np.testing.assert_allclose(run.latency, [300, 400, 300, 200, 600])
    assert (found["p50_ms"], found["mean_ms"], found["max_ms"]) == (300, 360, 600)
    assert found["p95_ms"] == pytest.approx(560) and found["p99_ms"] == pytest.approx(592)
    assert found["images_per_second"] == 5  # five from the first arrival at 0 to the last answer at 1.0
    assert found["top1"] == 80 and found["requests"] == 5
    assert (found["longest_queue"], found["batches"], found["mean_batch"]) == (4, 3, 1.67)
    assert found["degrees"] == {"0": 0.4, "4": 0.6}
    moments, waiting, degrees = run.batches()
    np.testing.assert_allclose(moments, [0.1, 0.3, 0.5])
    assert waiting.tolist() == [1, 4, 1] and degrees.tolist() == [0, 4, 0]


def test_the_table_has_a_cell_per_column(run):
    header, rows = table_of([summary(run)])
    assert all(len(row) == len(header) for row in rows)
    assert rows[0][0] == "adaptive" and rows[0][-1] == "0:40% 4:60%"


def test_the_csv_holds_what_the_summary_is_made_of(run):
    rows = list(csv.DictReader(io.StringIO(as_csv([run, run]))))
    assert len(rows) == 10 and tuple(rows[0]) == FIELDS
    latency = [1000 * (float(row["finished"]) - float(row["arrival"])) for row in rows[:5]]
    np.testing.assert_allclose(latency, run.latency)
    assert [row["request"] for row in rows] == [*"01234"] * 2
    assert sum(row["answer"] == row["label"] for row in rows[:5]) == 4


def test_nothing_answered():
    with pytest.raises(ValueError, match="answers must hold at least one, got none"):
        collect("fixed 0", 0.0, [], np.array([], dtype=int), LABELS)


def test_picture(run):
    pytest.importorskip("matplotlib")
    other = collect("fixed 0", 100.0, [answer(0.0, 0.1, 0.3, 0, 0, 1, 1, 2)], np.array([0]), LABELS)
    picture = draw([other, run], [summary(other), summary(run)], Profile.hill(1, 1, 9), title="a title")
    assert picture[:4] == b"\x89PNG"
