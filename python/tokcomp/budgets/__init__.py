"""Budgets for the search of schedules: multiply-adds, measured latency, modelled hardware."""

from tokcomp.budgets.base import Budget, TargetError, TokenCounts, counts_of, least_counts
from tokcomp.budgets.flops import FlopsBudget, flops_of

__all__ = ["Budget", "FlopsBudget", "TargetError", "TokenCounts", "counts_of", "flops_of", "least_counts"]
