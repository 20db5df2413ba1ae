"""Random inputs for the samples of :mod:`tokcomp_kernels.testing`, from one seed each."""

from __future__ import annotations

import zlib
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype

#: A sample's name, arguments, keyword arguments, and whether its discrete choices must equal the reference's.
Case: TypeAlias = tuple[str, tuple[Any, ...], dict[str, Any], bool]


class Maker:
    """Random tensors from one seed, moved to a device and dtype; every second one is laid out non-contiguously."""

    def __init__(self, seed: str, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        self.dtype, self.device = dtype, device
        self.accumulate = accumulate_dtype(torch.empty(0, dtype=dtype))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype).to(self.device)

    def strided(self, *shape: int) -> Tensor:
        """As randn, a view with a gap after every row."""
        wide = self.randn(*shape[:-1], shape[-1] + 3)
        return wide[..., : shape[-1]]

    def per_token(self, batch: int, num_tokens: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(batch, num_tokens, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * values).to(self.accumulate).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def counts(self, num_before_merge: int, num_merge_kept: int) -> Tensor:
        return torch.tensor([num_before_merge, num_merge_kept], device=self.device)

    def packed_qkv(self, batch: int, heads: int, num_tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as a model has them: [B, H, N, D] views of [B, N, 3, H, D]."""
        q, k, v = self.randn(batch, num_tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def signs(self, batch: int, num_tokens: int, channels: int) -> Tensor:
        """Rows of four nonzero signs: every norm is 2 and every cosine exact in any precision, so ties are ties."""
        rows = torch.zeros(batch, num_tokens, channels, dtype=torch.float64)
        places = torch.rand(rows.shape, generator=self.generator).topk(4, dim=-1).indices
        values = torch.randint(0, 2, places.shape, generator=self.generator).double() * 2 - 1
        return rows.scatter(-1, places, values).to(self.dtype).to(self.device)

    def source(self, batch: int, num_tokens: int, num_kept: int) -> Tensor:
        """A source map in which every slot has a token, some tokens are pruned and one index is out of range."""
        source = torch.randint(-1, num_kept, (batch, num_tokens), generator=self.generator)
        source[:, :num_kept] = torch.arange(num_kept)
        if num_tokens > num_kept + 1:
            source[:, -1] = num_kept + 5
        return source[:, torch.randperm(num_tokens, generator=self.generator)].to(self.device)
