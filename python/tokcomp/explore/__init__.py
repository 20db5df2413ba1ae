"""An explorer: one HTML page, without network, that steps through what methods do to the tokens of pictures."""

from tokcomp.explore.page import MARK, Choice, Figure, render
from tokcomp.explore.record import Block, watch

__all__ = ["MARK", "Block", "Choice", "Figure", "render", "watch"]
