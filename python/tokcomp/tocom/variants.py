"""The paper's choices and their ablations (ToCom, Table 5): which matrices lead between two degrees, which loss."""

from __future__ import annotations

#: The published arithmetic: Eq. 6-7.
STEPS = "steps"
#: name -> what it is.
ARITHMETICS = {
    STEPS: "one step per pair of neighbouring degrees, subtracted on the way back",
    "two_way": "further steps of their own for the way back: no inversion",
    "shared": "one group, as large as all steps together, for every pair of degrees",
    "shared_by_distance": "that group times the share of all degrees that lies between the two",
}

#: What a student's answers are compared with in training: the teacher's, or the classes of the images.
LOSSES = ("distillation", "labels")


def check_arithmetic(arithmetic: str) -> str:
    """``arithmetic`` if there is one of that name.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}, got {arithmetic!r}")
    return arithmetic


def num_slots(arithmetic: str, rank: int, max_degree: int) -> int:
    """Rows of a down matrix, and columns of an up matrix."""
    return rank * max_degree * (2 if arithmetic == "two_way" else 1)


def slots_between(arithmetic: str, rank: int, max_degree: int, source: int, target: int) -> tuple[slice, float]:
    """The slots that lead from degree ``source`` to ``target``, and the factor on their products besides the scale."""
    low, high = sorted((source, target))
    factor = 1.0 if target > source else -1.0
    if arithmetic == "two_way" and target < source:
        low, high = max_degree + low, max_degree + high
    elif arithmetic.startswith("shared") and source != target:
        if arithmetic == "shared_by_distance":
            factor *= (high - low) / max_degree
        low, high = 0, max_degree
    return slice(rank * low, rank * high), factor
