"""NaFlex's own batches: images of different sizes as patches, padded to the longest.

Images of as many patches run together and without their padding, which therefore cannot be kept, merged or attended,
and every block runs on the kernels that it always has. A method is asked what it is for that many tokens
(:meth:`Method.for_tokens`). The host must know how many patches each image has: it waits for the device once per batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.adapters.blocks import refuse_mask
from tokcomp.blocks.places import Places
from tokcomp_kernels._numbers import accumulate_dtype


class Patches(NamedTuple):
    """A batch as timm's collator makes it, checked."""

    patches: Tensor  # [B, P, patch * patch * C], or [B, P, patch, patch, C]
    coord: Tensor  # [B, P, 2] int64: row and column of each, 0 for padding
    counts: tuple[int, ...]  # of each image: its patches, which come before the padding

    @property
    def valid(self) -> Tensor:
        """[B, P] bool: which are no padding."""
        counts = torch.tensor(self.counts, device=self.patches.device, dtype=torch.int64)
        return torch.arange(self.patches.shape[1], device=counts.device) < counts[:, None]

    def groups(self) -> dict[int, Tensor]:
        """The images of each number of patches, [G] int64 of B; one group of none where there are no images."""
        found: dict[int, list[int]] = {} if self.counts else {self.patches.shape[1]: []}
        for image, count in enumerate(self.counts):
            found.setdefault(count, []).append(image)
        device = self.patches.device
        return {count: torch.tensor(images, device=device, dtype=torch.int64) for count, images in found.items()}


class Group(NamedTuple):
    """Images of as many patches, after the last block."""

    x: Tensor  # [G, M, C]
    size: Tensor | None  # [G, M], None where all are one patch; 0 where a method left an image fewer tokens
    sources: list[Tensor]  # of each block, if wanted: [G, N]
    maps: list[Tensor]  # before block 0 and of each block, if wanted: [G, N, C] every position's token

    @property
    def size_or_ones(self) -> Tensor:
        return torch.ones_like(self.x[..., 0], dtype=accumulate_dtype(self.x)) if self.size is None else self.size


def read_patches(
    embeds: Any, x: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
) -> Patches | None:
    """The batch that these arguments of timm's ``NaFlexVit.forward`` give to ``embeds``; None: they give images.

    Raises:
        ValueError: an attention mask, no coordinates or no validity, shapes that do not fit, padding before patches, an
            image without patches or with more than its coordinates span.
        TypeError: no tensors.
    """
    if isinstance(x, dict):
        missing = [name for name in ("patches", "patch_coord", "patch_valid") if x.get(name) is None]
        if missing:
            raise ValueError(f"a batch of patches must have patches, patch_coord and patch_valid, got no {missing[0]}")
        x, patch_coord, patch_valid, attn_mask = x["patches"], x["patch_coord"], x["patch_valid"], x.get("attn_mask")
    refuse_mask(attn_mask)
    if patch_coord is None:
        if patch_valid is not None:
            raise ValueError("patch_valid must come with patch_coord, got no patch_coord")
        return None
    _check_tensors(embeds, x, patch_coord, patch_valid)
    valid = torch.ones_like(patch_coord[..., 0], dtype=torch.bool) if patch_valid is None else patch_valid.bool()
    coord = patch_coord.masked_fill(~valid[..., None], 0)
    count = valid.sum(1)
    first = torch.arange(valid.shape[1], device=valid.device) < count[:, None]
    span = (coord.amax(1) + 1).prod(1) if coord.shape[1] else count
    facts = torch.stack((count, span, (valid == first).all(1).to(count.dtype)))  # one copy to the host for all
    rows: list[tuple[int, int, int]] = list(zip(*facts.tolist(), strict=True))
    for image, (patches, spanned, in_front) in enumerate(rows):
        if patches < 1 or not in_front:
            what = "padding before a patch" if patches else "none"
            raise ValueError(
                f"patch_valid must mark at least one patch of every image and padding after them alone, got {what} in "
                f"image {image}"
            )
        if patches > spanned:
            raise ValueError(
                f"patch_coord must span as many patches as patch_valid marks, got {spanned} for {patches} in image "
                f"{image}"
            )
    return Patches(x, coord.long(), tuple(row[0] for row in rows))


def rotary_places(rope: Any, batch: Patches, num_prefix_tokens: int, dtype: torch.dtype) -> Places:
    """The places of all tokens [B, prefix + P]: one table of all grids of the batch, and where each token's place is.

    Padding has any place.
    """
    grids = [(int(rows), int(columns)) for rows, columns in (batch.coord.amax(1) + 1).tolist()]
    starts: dict[tuple[int, int], int] = {}
    total = 0
    for grid in grids:
        if grid not in starts:
            starts[grid], total = total, total + grid[0] * grid[1]
    shapes: Sequence[tuple[int, int]] = list(starts) or [(1, max(batch.patches.shape[1], 1))]
    table = torch.cat([rope.get_embed(shape=grid) for grid in shapes], -2).to(dtype)
    start = torch.tensor([starts[grid] for grid in grids], device=table.device, dtype=torch.int64)
    place = start[:, None] + torch.arange(batch.patches.shape[1], device=table.device)
    origin = F.pad(place.clamp(max=table.shape[-2] - 1) + num_prefix_tokens, (num_prefix_tokens, 0))
    return Places(table, origin)


def together(parts: Sequence[Tensor], groups: dict[int, Tensor], length: int | None = None, fill: float = 0) -> Tensor:
    """What the groups gave, in the order of the batch.

    Args:
        parts: [G, ...] of each group, or [G, M, ...] with another M in each.
        groups: the images of each.
        length: of the second dimension, which ``fill`` makes up for; None: that of the longest part.
    """
    if parts[0].ndim > 1:
        wanted = max(part.shape[1] for part in parts) if length is None else length
        parts = [F.pad(one, (*(0, 0) * (one.ndim - 2), 0, wanted - one.shape[1]), value=fill) for one in parts]
    return torch.cat(list(parts))[torch.cat(list(groups.values())).argsort()]


def filled_sources(
    sources: Sequence[Tensor | None], shape: Sequence[int], device: torch.device, from_start: bool
) -> list[Tensor]:
    """A group's source maps, with one for blocks that drop nothing.

    Args:
        sources: [G, N] of each block, or None.
        shape: G and the N of block 0.
        device: of the maps.
        from_start: whether maps lead from block 0 rather than from the block before.
    """
    found: list[Tensor] = []
    left = torch.full((shape[0], 1), shape[1], device=device)
    width = shape[1]
    for source in sources:
        if source is None and from_start and found:
            source = found[-1]
        elif source is None:
            every = torch.arange(width, device=device).expand(shape[0], -1)
            source = every.masked_fill(every >= left, -1)
        found.append(source)
        left = source.amax(1, keepdim=True) + 1
        width = int(left.max()) if len(left) else width
    return found


def _check_tensors(embeds: Any, x: Any, patch_coord: Any, patch_valid: Any) -> None:
    named = {"patches": x, "patch_coord": patch_coord}
    if patch_valid is not None:
        named["patch_valid"] = patch_valid
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not embeds.is_linear:
        raise ValueError("model must embed patches by a linear layer to take them as such (embed_proj_type='linear')")
    if x.ndim not in (3, 5):
        raise ValueError(f"patches must be [B, P, patch * patch * C] or [B, P, patch, patch, C], got {list(x.shape)}")
    resized = x.ndim == 5 and embeds.enable_patch_interpolator
    if not resized and math.prod(x.shape[2:]) != embeds.proj.in_features:
        raise ValueError(f"patches must hold {embeds.proj.in_features} values each, got a tensor {list(x.shape)}")
    wanted = list(x.shape[:2])
    if list(patch_coord.shape) != [*wanted, 2] or patch_coord.is_floating_point():
        raise ValueError(
            f"patch_coord must be whole numbers {[*wanted, 2]} for patches of shape {list(x.shape)}, got "
            f"{str(patch_coord.dtype).removeprefix('torch.')} {list(patch_coord.shape)}"
        )
    if patch_valid is not None and list(patch_valid.shape) != wanted:
        raise ValueError(f"patch_valid must be {wanted}, one for each patch, got {list(patch_valid.shape)}")
