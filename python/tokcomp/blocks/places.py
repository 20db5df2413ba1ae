"""Where in the image the tokens of a block are, for attention that goes by it: they take their places along."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """Each token's place, and what the model family looks up by it."""

    table: Any  # the family's own: rotary angles of every place, say
    origin: Tensor | None = None  # [B, N] int64: the token of block 0 whose place each token has; None: its own

    def follow(self, kept: Tensor) -> Places:
        """The places of tokens that took those of the tokens ``kept`` [B, M]."""
        return self._replace(origin=kept if self.origin is None else self.origin.gather(1, kept))
