"""The mixin that turns a MetaFormer's third stage into a compressing one, and where its blocks keep their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.images import refuse_symbols
from tokcomp.adapters.layout import Layout
from tokcomp.adapters.swap import Swapped
from tokcomp.blocks.state import BlockState, compose_sources
from tokcomp.methods.base import Method
from tokcomp_kernels.product_types import unless_emulated, widened


class StageState(BlockState):
    """A block's state that keeps the tokens as they were when some of them were pruned."""

    before: Tensor | None = None  # [B, N, C] after attention, in a block that prunes

    def reduce(self, x: Tensor) -> Tensor:
        if self.assignment is not None and self.assignment.num_prune_kept < x.shape[1]:
            self.before = x
        return super().reduce(x)


class MetaFormerLayout(Layout):
    """timm's MetaFormerBlock: the residual has a scale of its own, and a branch is scaled last."""

    def add_attention(self, block: Any, x: Tensor, branch: Tensor) -> Tensor:
        return block.res_scale1(x) + block.layer_scale1(block.drop_path1(branch))

    def mlp_branch(self, block: Any, x: Tensor) -> Tensor:
        return block.layer_scale2(block.drop_path2(block.mlp(block.norm2(x))))

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        return block.res_scale2(x) + self.mlp_branch(block, x)


LAYOUT = MetaFormerLayout(
    attention="token_mixer", scale1="layer_scale1", scale2="layer_scale2", norms=None, out_norm=None
)


class CompressedStage(Swapped):
    """timm's MetaFormerStage that compresses by ``_tokcomp_method`` and gives every position a token again at its end.

    A merged position takes the token it was merged into. A pruned one keeps the value it had, after attention, in the
    block that pruned it: the residual stream without the later blocks' updates.
    """

    _tokcomp_method: Method

    def forward(self, x: Tensor) -> Tensor:
        refuse_symbols(x)
        with unless_emulated(x.device.type):
            with widened(x):
                x, height, width = split_grid(self.downsample(x))
            x, source, fill = self.tokens(x)
        if source is not None:
            x = torch.ops.tokcomp.unmerge(x, source, pruned_fill=None if fill is None else fill.to(x.dtype))
        return join_grid(x, height, width)

    def tokens(
        self, x: Tensor, sources: list[Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Run the blocks.

        Args:
            x: [B, N, C], every position of the grid.
            sources: collects each block's source map.

        Returns:
            The tokens left [B, M, C]; the slot each position is in, [B, N], -1 = pruned; and, where any block prunes,
            the values of pruned positions [B, N, C].
        """
        self._tokcomp_method.check_tokens(x.shape[1], 0)
        size: Tensor | None = None
        source: Tensor | None = None
        fill: Tensor | None = None
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, size, step, before = checkpoint(self._run_block, block, index, x, size, use_reentrant=False)
            else:
                x, size, step, before = self._run_block(block, index, x, size)
            if sources is not None:
                sources.append(step)
            if step is None:
                continue
            arrived, source = source, step if source is None else compose_sources(source, step)
            if before is not None:
                fill = _keep_pruned(before, arrived, source, fill)
        return x, source, fill

    def _run_block(
        self, block: torch.nn.Module, index: int, x: Tensor, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        state = StageState(self._tokcomp_method, index, x.shape[1], 0, size, layout=LAYOUT)
        with widened(x):
            x = block(x, state=state)
        return x, state.size, state.source, state.before


def split_grid(x: Tensor) -> tuple[Tensor, int, int]:
    """[B, C, H, W] -> tokens [B, H * W, C] in row order, H, W."""
    return x.flatten(2).transpose(1, 2), x.shape[2], x.shape[3]


def join_grid(x: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`split_grid`."""
    return x.transpose(1, 2).unflatten(2, (height, width))


def _keep_pruned(before: Tensor, arrived: Tensor | None, left: Tensor, fill: Tensor | None) -> Tensor:
    """Values [B, N, C] of pruned positions, once a block's tokens ``before`` are pruned too.

    Args:
        before: [B, M, C], the block's tokens when it pruned.
        arrived, left: [B, N], the slots of the positions before and after the block; None = each in its own.
        fill: the values so far.
    """
    if arrived is None:
        arrived = torch.arange(left.shape[1], device=left.device).expand_as(left)
    gone = arrived.masked_fill(left >= 0, -1)
    return torch.ops.tokcomp.unmerge(before, gone, pruned_fill=None if fill is None else fill.to(before.dtype))
