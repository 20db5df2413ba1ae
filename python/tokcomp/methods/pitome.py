"""PiToMe (NeurIPS 2024): only tokens that resemble many others may merge, so that what stands alone is protected."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokcomp.methods.base import Assignment, Evidence, Geometry, number
from tokcomp.methods.partition import DESTINATION, SOURCE, PartitionMethod, order_of, with_rank
from tokcomp.methods.tome import ToMe
from tokcomp_kernels._numbers import accumulate_dtype

#: Rows of the similarity that are held at a time.
_CHUNK = 256


class PiToMe(PartitionMethod):
    """The 2r patch tokens of highest energy pair up: every second one merges into the most similar of the others.

    The energy of token i is the mean over j of ELU(cos_ij - m), m = margin * (1 - l / L) in block l of L, where cos is
    the cosine of the keys, averaged over heads. Merged tokens are size-weighted means.

    Args:
        r: tokens merged away in each block, or one number per block; at most half of a block's patch tokens merge.
        margin: of block 0.
        prop_attn: proportional attention: add log(size) to the attention scores from the first merge on.
        unprotected: share of the blocks, from the first on, in which all patch tokens pair up rather than 2r of them,
            and the r most similar pairs merge (0.5 in the published code for DeiT).

    Raises:
        TypeError, ValueError: r is neither a non-negative integer nor a list of them; margin outside [-1, 1];
            unprotected outside [0, 1].
    """

    needs = frozenset({"keys"})

    def __init__(
        self, r: int | Sequence[int], margin: float = 0.9, prop_attn: bool = True, unprotected: float = 0.0
    ) -> None:
        self._counts = ToMe(r, prop_attn)
        self.margin = _number("margin", margin, -1, ", as cosines are")
        self.unprotected = _number("unprotected", unprotected, 0)
        self.proportional_attention = self.prop_attn = self._counts.prop_attn
        self._geometry: Geometry | None = None

    @property
    def r(self) -> int | tuple[int, ...]:
        return self._counts.r

    def __repr__(self) -> str:
        rest = f", unprotected={self.unprotected}" if self.unprotected else ""
        return f"PiToMe(r={self.r}, margin={self.margin}, prop_attn={self.prop_attn}{rest})"

    def validate(self, geometry: Geometry) -> None:
        self._counts.validate(geometry)

    def fitted(self, geometry: Geometry) -> PiToMe:
        fitted = copy.copy(self)
        fitted._geometry = geometry
        return fitted

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        return self._counts.assign(block, num_tokens, num_prefix_tokens)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        """The keys [B, N, D], and each token's role."""
        geometry = self._geometry
        if geometry is None:
            raise RuntimeError("PiToMe must know the model's depth: call fitted(geometry), as tokcomp.compress does")
        keys = evidence.require("keys").detach()
        keys = keys.to(accumulate_dtype(keys)).mean(1)
        prefix, num_tokens = geometry.num_prefix_tokens, keys.shape[1]
        rank = F.pad(energy(keys[:, prefix:], self.margin * (1 - block / geometry.depth)), (prefix, 0))
        pairing = order_of(rank, prefix)
        assignment = self.assign(block, num_tokens, prefix)
        if assignment is not None and block >= self.unprotected * geometry.depth:
            pairing = pairing[:, : 2 * (num_tokens - assignment.num_tokens_out)]
        role = torch.zeros_like(rank).scatter(1, pairing[:, ::2], SOURCE)
        return with_rank(keys, role.scatter(1, pairing[:, 1::2], DESTINATION))

    def roles(self, rank: Tensor, num_dropped: int, num_prefix_tokens: int) -> Tensor:
        return rank.long()


def energy(features: Tensor, margin: float) -> Tensor:
    """How many others each token [B, P, D] resembles, [B, P]: the mean over j of ELU(cos_ij - margin)."""
    unit = F.normalize(features, dim=-1)
    with torch.autocast(features.device.type, enabled=False):
        chunks = [F.elu(rows @ unit.mT - margin).mean(-1) for rows in unit.split(_CHUNK, 1)]
    return torch.cat(chunks, 1)


def _number(name: str, value: float, least: float, why: str = "") -> float:
    if not least <= number(name, value) <= 1:
        raise ValueError(f"{name} must be in [{least}, 1]{why}, got {value}")
    return float(value)
