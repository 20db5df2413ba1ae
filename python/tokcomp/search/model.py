"""DiffRateSearch: a frozen model whose compression schedule learns."""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.blocks.search import MIN_WEIGHTED_SIZE, BlockProxies, BlockSearch
from tokcomp.cost import TokenCounts, flops_of
from tokcomp.methods.diffrate import DiffRate, published_settings
from tokcomp.schedule import CompressionSchedule
from tokcomp.search.proxy import KeptNumber, Relaxed, relax

_STEPS = ("prune", "merge")


class DiffRateSearch(nn.Module):
    """Learns how many tokens each block should prune and merge (DiffRate, Alg. 1).

    The model is frozen (``requires_grad`` of its parameters becomes False) and otherwise left as it is. What learns is
    one :class:`KeptNumber` per block for pruning and one for merging, in ``prune`` and ``merge``. No token is dropped:
    tokens that the current schedule would drop are masked in attention (Eq. 10-12), and the masks carry the gradient.
    Block 0 keeps every token, and so does the last block of a model whose head reads patch tokens.

    Dropout on the attention map is never applied; drop path and other dropout are, in ``train()`` mode.

    Args:
        model: a plain timm model of a family that :func:`tokcomp.compress` understands.
        granularity: step between the candidate numbers of tokens to keep.
        metric, pipeline: as in :class:`tokcomp.DiffRate`; with ``prune`` or ``merge`` the proxies of the other kind
            never move. By default ``cls_attn``, or ``image_attn`` without a class token, and ``prune_merge``, or
            ``merge`` for CAFormers.
        match_inference: merged tokens add their size times their similarity, as in inference, and keep their own size.
            In the published search they add at least 1, and what they add becomes their size, which enters their mask's
            gradient.
        seed: the seed of the ``random`` metric.
        similarity_weighted_size: as in :class:`tokcomp.DiffRate`; by default True, for CAFormers False.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the model is compressed, or an argument is out of range.
    """

    prune: nn.ModuleList
    merge: nn.ModuleList

    def __init__(
        self,
        model: nn.Module,
        granularity: int = 1,
        *,
        metric: str | None = None,
        pipeline: str | None = None,
        match_inference: bool = False,
        seed: int = 0,
        similarity_weighted_size: bool | None = None,
    ) -> None:
        super().__init__()
        adapter = find_adapter(model)
        if adapter.method(model) is not None:
            raise ValueError("model must be plain, got a compressed one; tokcomp.restore it first")
        adapter.check_search(model)
        geometry, self.num_tokens = adapter.geometry(model), adapter.num_tokens(model)
        depth, prefix = geometry.depth, geometry.num_prefix_tokens
        self.granularity = _granularity(granularity, self.num_tokens - prefix)
        every = [self.num_tokens] * depth
        published = published_settings(geometry)
        method = DiffRate(
            CompressionSchedule(every, every),
            published.metric if metric is None else metric,
            published.pipeline if pipeline is None else pipeline,
            seed,
            published.similarity_weighted_size if similarity_weighted_size is None else similarity_weighted_size,
        )
        adapter.validate(model, method)
        method.validate(geometry)
        self.metric, self.pipeline, self.seed = method.metric, method.pipeline, method.seed
        self.match_inference = bool(match_inference)
        self.similarity_weighted_size = method.similarity_weighted_size
        self.num_prefix_tokens = prefix
        self._adapter, self._cost = adapter, adapter.cost(model)
        self.model = model.requires_grad_(False)
        fixed = {0} | ({depth - 1} if adapter.reads_patches(model) else set())
        device = next(model.parameters()).device
        for step in _STEPS:
            numbers = [
                KeptNumber(self.num_tokens - prefix, self.granularity, prefix, fixed=block in fixed)
                for block in range(depth)
            ]
            setattr(self, step, nn.ModuleList(numbers).to(device))
        # No loss sees the patch tokens of a class-token model's last block.
        self._prefix_only_block = None if adapter.reads_patches(model) else depth - 1
        self._free = [block for block in range(depth) if block not in fixed]

    def extra_repr(self) -> str:
        return f"granularity={self.granularity}, metric={self.metric!r}, pipeline={self.pipeline!r}"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] of images [B, 3, H, W], and the multiply-adds of one image: 0-dim float64.

        Both are differentiable in the proxies' logits, and only in them.

        Raises:
            ValueError: the images are not of the model's own size.
        """
        relaxed = self._relax()
        blocks = [self._block(block, relaxed) for block in range(len(self.prune))]
        logits = self._adapter.search(self.model, images, blocks)
        return logits, self.flops(self._counts(relaxed))

    def counts(self) -> TokenCounts:
        """Tokens that enter each block and that its compression leaves, [L] float64 each, with gradients (Alg. 2)."""
        return self._counts(self._relax())

    def flops(self, counts: TokenCounts | None = None) -> Tensor:
        """Multiply-adds of one image by Alg. 2, patch embedding and classifier included: 0-dim float64."""
        return flops_of(self._cost, self.counts() if counts is None else counts, self.num_tokens)

    @torch.no_grad()
    def schedule(self) -> CompressionSchedule:
        """The current counts of each block, which need not decrease monotonically, with token numbers and method.

        Raises:
            ValueError: a logit is not a number.
        """
        counts: dict[str, list[int] | None] = {}
        for step in _STEPS:
            kept = torch.stack([number() for number in getattr(self, step)]).tolist()
            if any(number != number for number in kept):
                raise ValueError(f"{step}[{[n != n for n in kept].index(True)}].logits must be numbers, got NaN")
            counts[f"num_{step}_kept"] = [int(number) for number in kept] if step in self.pipeline else None
        method = {
            "metric": self.metric,
            "pipeline": self.pipeline,
            "similarity_weighted_size": self.similarity_weighted_size,
        }
        if self.metric == "random":
            method["seed"] = self.seed
        return CompressionSchedule(
            counts["num_prune_kept"],
            counts["num_merge_kept"],
            num_tokens=self.num_tokens,
            num_prefix_tokens=self.num_prefix_tokens,
            method=method,
        )

    def method(self) -> DiffRate:
        """The compression that the search has arrived at, for :func:`tokcomp.compress`."""
        return DiffRate(self.schedule())

    def proxy_state(self) -> dict[str, Tensor]:
        """Only the logits, by name: all that a search has learnt."""
        return {name: value.detach().clone() for name, value in self.state_dict().items() if not _is_model(name)}

    def load_proxy_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what :meth:`proxy_state` returned.

        Raises:
            ValueError: the names or shapes are not this search's; nothing is changed.
        """
        own = {name: value for name, value in self.state_dict().items() if not _is_model(name)}
        if state.keys() != own.keys():
            odd = sorted(state.keys() ^ own.keys())[0]
            raise ValueError(f"state must hold exactly this search's {len(own)} logits, got {len(state)}; see {odd!r}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(f"{name} must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
        for name, value in own.items():
            value.copy_(state[name])

    def _relax(self) -> dict[str, Relaxed]:
        """Kept numbers and token probabilities of the blocks that may compress, all blocks at once."""
        patches = self.num_tokens - self.num_prefix_tokens
        relaxed = {}
        for step in _STEPS:
            if step in self.pipeline and self._free:
                logits = torch.stack([getattr(self, step)[block].logits for block in self._free])
                relaxed[step] = relax(logits, patches, self.granularity, self.num_prefix_tokens)
        return relaxed

    def _counts(self, relaxed: dict[str, Relaxed]) -> TokenCounts:
        device = next(self.prune.parameters()).device
        every = torch.full((len(self.prune),), float(self.num_tokens), dtype=torch.float64, device=device)
        least, gradient = every, torch.zeros_like(every)
        for step in relaxed.values():
            row = torch.cat([every[: self._free[0]], step.kept, every[self._free[-1] + 1 :]])  # [L]
            least = torch.minimum(least, row.detach())
            gradient = gradient + (row - row.detach())  # to both counts, whichever is smaller
        num_out = least.cummin(0).values + gradient
        return TokenCounts(torch.cat([every[:1], num_out[:-1]]), num_out)

    def _block(self, block: int, relaxed: dict[str, Relaxed]) -> BlockSearch:
        proxies = None
        if block in self._free:
            row = self._free.index(block)
            chosen = [relaxed.get(step) for step in _STEPS]
            kept = [None if one is None else one.kept[row] for one in chosen]
            probability = [None if one is None else one.probability[row] for one in chosen]
            proxies = BlockProxies((kept[0], kept[1]), (probability[0], probability[1]))
        return BlockSearch(
            block,
            proxies,
            metric=self.metric,
            pipeline=self.pipeline,
            seed=self.seed,
            similarity_weighted_size=self.similarity_weighted_size,
            min_weighted_size=None if self.match_inference else MIN_WEIGHTED_SIZE,
            num_prefix_tokens=self.num_prefix_tokens,
            num_tokens=self.num_tokens,
            prefix_only=block == self._prefix_only_block,
        )


def _is_model(name: str) -> bool:
    return name.startswith("model.")


def _granularity(value: int, num_patches: int) -> int:
    try:
        granularity = operator.index(value)
    except TypeError:
        raise TypeError(f"granularity must be an integer, got {value!r}") from None
    if not 1 <= granularity <= num_patches:
        raise ValueError(f"granularity must be between 1 and the model's {num_patches} patches, got {granularity}")
    return granularity
