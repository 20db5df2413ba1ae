"""Folders and repositories of the Hugging Face hub that hold a schedule, a plugin or a configuration, with a card."""

from tokcomp.hub.card import Bars, Card
from tokcomp.hub.counts import card_of_counts
from tokcomp.hub.shareable import Shareable, fetch, fetch_beside

__all__ = ["Bars", "Card", "Shareable", "card_of_counts", "fetch", "fetch_beside"]
