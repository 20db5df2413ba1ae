"""Budgets for the search of schedules: multiply-adds, measured latency, modelled hardware."""

from tokcomp.budgets.base import Budget, TargetError, least_counts
from tokcomp.budgets.flops import FlopsBudget
from tokcomp.budgets.gemmini import Gemmini, GemminiCost, Technology
from tokcomp.budgets.gemmini_search import GemminiSearch
from tokcomp.budgets.latency import LatencyBudget, LatencyTable
from tokcomp.budgets.measure import MeasurementStopped, find_latency_table, measure_latency
from tokcomp.cost import TokenCounts, counts_of, flops_of

__all__ = [
    "Budget",
    "FlopsBudget",
    "Gemmini",
    "GemminiCost",
    "GemminiSearch",
    "LatencyBudget",
    "LatencyTable",
    "MeasurementStopped",
    "TargetError",
    "Technology",
    "TokenCounts",
    "counts_of",
    "find_latency_table",
    "flops_of",
    "least_counts",
    "measure_latency",
]
