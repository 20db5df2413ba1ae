"""Thresholds for DToMe under which images merge a given number of tokens on average (DyMU, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.api import compress, restore
from tokcomp.methods.base import Assignment, Evidence, Geometry, Reduced, is_list, non_negative, require_depth
from tokcomp.methods.dtome import DToMe, matched, merge_pairs
from tokcomp.methods.varying import alive_tokens


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], r: int | Sequence[int], *, prop_attn: bool = True) -> DToMe:
    """DToMe whose blocks merge r tokens of the average image.

    In every batch of B images a block merges the r * B most similar pairs of all images together; its threshold is the
    mean over the batches of the similarity of the first pair that does not, or 0 if that is negative.

    Args:
        model: of a family that :func:`tokcomp.compress` understands, in evaluation mode; left as it was.
        batches: images [B, 3, H, W] as the model takes them, without labels; a few hundred images, in batches as large
            as fit: the average is taken within each.
        r: tokens merged away in each block, or one number per block; where fewer pairs are left, a block merges all
            that resemble each other at all.
        prop_attn: as for :class:`tokcomp.DToMe`.

    Raises:
        TypeError: r is not a whole number or a list of them; batches cannot be gone through, or one is no tensor of
            images; or (UnsupportedModelError) the model is not understood.
        ValueError: there are no images, or some that are no numbers; r is negative or not one per block; the model is
            in training mode or hierarchical.
    """
    adapter = find_adapter(model)
    geometry = adapter.geometry(model)
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode; call model.eval() first")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of images [B, 3, H, W], got a {type(batches).__name__}")
    DToMe(0.0).validate(geometry)
    watcher = _Calibration(r, geometry, prop_attn)
    before, stock = adapter.method(model), adapter.keeps_attention(model)
    count = 0
    try:
        compress(model, watcher)
        for images in batches:
            if not isinstance(images, Tensor):
                kind = type(images).__name__
                raise TypeError(f"batches must hold images [B, 3, H, W], of one size in each, got a {kind}")
            count += len(images)
            if len(images):
                model(images)
    finally:
        if before is None:
            restore(model)
        else:
            compress(model, before, "stock" if stock else "tokcomp")
    if count == 0:
        raise ValueError("batches must hold images to calibrate on, got none")
    return DToMe(watcher.means(), prop_attn, watcher.rates)


class _Calibration(DToMe):
    """Merges by batch, and keeps the thresholds that come of it: the one method with a state, for one thread."""

    def __init__(self, r: int | Sequence[int], geometry: Geometry, prop_attn: bool) -> None:
        super().__init__(0.0, prop_attn)
        given = [non_negative("r", one) for one in r] if is_list(r) else [non_negative("r", r)] * geometry.depth  # type: ignore[union-attr]
        require_depth("r", len(given), geometry)
        self.rates = given[: geometry.depth]
        self._seen: list[list[Tensor]] = [[] for _ in self.rates]
        self._block = 0

    def means(self) -> list[float]:
        """Per block; 1 where nothing is to merge."""
        return [float(torch.stack(seen).mean().clamp(max=1)) if seen else 1.0 for seen in self._seen]

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        return Assignment(num_tokens, num_tokens, num_tokens) if self.rates[block] else None

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        self._block = block
        return super().score(evidence, block, x)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        if not bool(score.isfinite().all()):
            raise ValueError(
                f"batches must hold images, and the model weights, that are finite numbers, got keys in block "
                f"{self._block} that are not"
            )
        alive = alive_tokens(x, size)
        similarity, partner = matched(score[..., :-1], alive, num_prefix_tokens)
        pairs = similarity[similarity > float("-inf")].sort(descending=True).values
        rank = self.rates[self._block] * len(x)
        threshold = pairs[rank].clamp_min(0) if rank < len(pairs) else similarity.new_zeros(())
        self._seen[self._block].append(threshold.double().cpu())
        return merge_pairs(x, size, alive, similarity > threshold, partner, num_prefix_tokens)
