from __future__ import annotations

import numpy as np
import pytest
from tokcomp.serve.load import Profile, choose_images

SHAPES = {
    "hill": Profile.hill(10, 20, 300),
    "flat": Profile(((0, 100), (10, 100))),
    "rise from nothing": Profile(((0, 0), (10, 200))),
    "fall to nothing": Profile(((0, 200), (4, 0), (10, 0))),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_arrivals_are_a_poisson_process_of_the_rate(shape):
    profile, parts, runs = SHAPES[shape], 20, 200
    edges = np.linspace(0, profile.seconds, parts + 1)
    counts = np.array([np.histogram(profile.arrivals(seed), edges)[0] for seed in range(runs)])
    fine = np.linspace(0, profile.seconds, parts * 400 + 1)
    middles = (fine[1:] + fine[:-1]) / 2
    rates = np.array([profile.rate(moment) for moment in middles]).reshape(parts, -1)
    expected = rates.mean(1) * profile.seconds / parts
    # Counts of a Poisson process have the mean as their variance; 5 standard errors of the mean, and of the variance.
    assert np.all(np.abs(counts.mean(0) - expected) <= 5 * np.sqrt(expected / runs) + 1e-9)
    error = np.sqrt((expected + 2 * expected**2) / runs)
    assert np.all(np.abs(counts.var(0, ddof=1) - expected) <= 5 * error + 1e-9)
    assert profile.expected() == pytest.approx(expected.sum(), rel=1e-3)


def test_arrivals_rise_within_the_time_and_follow_from_the_seed():
    profile = SHAPES["hill"]
    arrivals = profile.arrivals(3)
    assert arrivals[0] >= 0 and arrivals[-1] <= profile.seconds and np.all(np.diff(arrivals) > 0)
    assert np.array_equal(arrivals, profile.arrivals(3)) and not np.array_equal(arrivals[:9], profile.arrivals(4)[:9])
    chosen = choose_images(7, 500, 3)
    assert set(chosen) == set(range(7)) and np.array_equal(chosen, choose_images(7, 500, 3))


def test_a_hill_rises_and_falls():
    profile = Profile.hill(20, 1, 5)
    assert [profile.rate(moment) for moment in (0, 2, 4.5, 7, 12, 14.5, 17, 20)] == [1, 1, 3, 5, 5, 3, 1, 1]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((0, 1),), r"points must be two or more, the first at 0 seconds, in order of time, got \[0\]"),
        (((1, 1), (2, 1)), r"points must be two or more, .* got \[1, 2\]"),
        (((0, 1), (2, 1), (2, 3)), r"points must be two or more, .* got \[0, 2, 2\]"),
        (((0, 1), (2, -1)), r"rates must be 0 or more, got \[1, -1\]"),
    ],
)
def test_wrong_input(points, message):
    with pytest.raises(ValueError, match=message):
        Profile(points)
