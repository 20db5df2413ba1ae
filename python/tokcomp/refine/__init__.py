"""The second stage of a search: moves of a schedule's counts, judged by the loss with tokens really dropped."""

from tokcomp.refine.run import Refinement, RefineResult, RefineSettings, refine
from tokcomp.refine.starts import starts_for

__all__ = ["RefineResult", "RefineSettings", "Refinement", "refine", "starts_for"]
