from __future__ import annotations

import pytest
from tokcomp.serve.policy import Fixed, QueueLength


def test_fixed():
    policy = Fixed(8)
    assert policy.name == "fixed 8" and policy.degrees == (8,)
    assert [policy.choose(waiting) for waiting in (1, 1000)] == [8, 8]


def test_the_queue_drives_the_degree_with_hysteresis():
    policy = QueueLength([0, 8, 16], up=[10, 20], down=[4, 12])
    steps = [
        (9, 0),
        (10, 8),  # at the threshold
        (9, 8),  # below it again, but not low enough to go back
        (5, 8),
        (4, 0),
        (9, 0),
        (19, 8),
        (20, 16),
        (13, 16),
        (12, 8),
        (11, 8),
        (4, 0),
    ]
    for waiting, degree in steps:
        assert policy.choose(waiting) == degree, waiting


def test_several_steps_at_once():
    policy = QueueLength([0, 4, 8, 12], up=[2, 4, 6], down=[1, 2, 3])
    assert [policy.choose(waiting) for waiting in (100, 1, 4, 5, 1)] == [12, 0, 8, 8, 0]


@pytest.mark.parametrize(("up", "down"), [([5, 9, 40], [4, 8, 39]), ([2, 3, 4], [1, 2, 3]), ([9, 20, 30], [1, 2, 3])])
def test_a_steady_queue_changes_nothing(up, down):
    """Whatever the queue's length, a second look at it finds the degree that the first found."""
    for before in range(1, 50):
        for waiting in range(1, 50):
            policy = QueueLength([0, 1, 2, 3], up, down)
            policy.choose(before)
            assert policy.choose(waiting) == policy.choose(waiting)


def test_thresholds_of_full_batches():
    policy = QueueLength.by_batches([0, 4, 8], 16)
    assert policy.up == (32, 48) and policy.down == (8, 16)
    policy = QueueLength.by_batches([0, 4, 8, 12], 1)
    assert policy.up == (2, 3, 4) and policy.down == (1, 2, 3)


WRONG = {
    "falling degrees": (([4, 0], [2], [1]), r"degrees must rise, got \[4, 0\]"),
    "one degree": (([4], [], []), r"degrees must be two or more to choose from, got \[4\]"),
    "too few up": (([0, 4, 8], [2], [1, 2]), "up must have one number per step between degrees, 2, got 1"),
    "too many down": (([0, 4], [2], [0, 1]), "down must have one number per step between degrees, 1, got 2"),
    "no gap": (([0, 4], [2], [2]), "down must be below up at each step, got 2 and 2"),
    "falling up": (([0, 4, 8], [3, 2], [1, 2]), r"up must rise, got \[3, 2\]"),
    "down 0": (([0, 4], [3], [0]), "down must be 1 or more, since a batch's own requests count, got 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        QueueLength(*arguments)
