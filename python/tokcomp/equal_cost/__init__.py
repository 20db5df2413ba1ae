"""Methods at a given number of multiply-adds, so that they can be compared at equal cost."""

from tokcomp.equal_cost.budget import (
    BY_COUNT,
    BY_PREDICTOR,
    BY_RATE,
    count_for_budget,
    evit_blocks,
    evit_for_budget,
    predictor_for_budget,
    rate_for_budget,
    tome_for_budget,
)
from tokcomp.equal_cost.counts import Counts, Ruler
from tokcomp.equal_cost.measured import BY_IMAGES, Measured, ats_for_budget, avit_for_budget, dtome_for_budget
from tokcomp.equal_cost.schedules import at_cost, fit, nearest_published, random_schedule, uniform

__all__ = [
    "BY_COUNT",
    "BY_IMAGES",
    "BY_PREDICTOR",
    "BY_RATE",
    "Counts",
    "Measured",
    "Ruler",
    "at_cost",
    "ats_for_budget",
    "avit_for_budget",
    "count_for_budget",
    "dtome_for_budget",
    "evit_blocks",
    "evit_for_budget",
    "fit",
    "nearest_published",
    "predictor_for_budget",
    "random_schedule",
    "rate_for_budget",
    "tome_for_budget",
    "uniform",
]
