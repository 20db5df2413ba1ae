"""What a model costs: multiply-adds per image (DiffRate, Alg. 2), from the token counts of every block."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter, Cost, find_adapter
from tokcomp.methods import Method


class TokenCounts(NamedTuple):
    """Tokens of one image in every block, prefix tokens included. Floating point, so that gradients can flow."""

    num_in: Tensor  # [L] tokens that enter the block: its attention sees these
    num_out: Tensor  # [L] tokens that the block's compression leaves: its MLP sees these


def counts_of(model: nn.Module, method: Method | None = None, img_size: tuple[int, int] | None = None) -> TokenCounts:
    """The token counts [L] (float64, CPU) of a model under a method; without one, of the uncompressed model.

    ``img_size``: height and width of the images, by default the model's own.
    """
    geometry = find_adapter(model).geometry(model)
    return counts_under(method, _num_tokens(model, img_size), geometry.depth, geometry.num_prefix_tokens)


def counts_under(method: Method | None, num_tokens: int, depth: int, prefix: int) -> TokenCounts:
    """The same for any model of ``depth`` blocks that ``num_tokens`` enter, ``prefix`` of them no patches."""
    if method is None:
        found = [(num_tokens, num_tokens)] * depth
    else:
        method.check_tokens(num_tokens, prefix)
        found = method.counts(depth, num_tokens, prefix)
    return TokenCounts(*torch.tensor(found, dtype=torch.float64).reshape(depth, 2).unbind(1))


def flops(model: nn.Module, img_size: int | tuple[int, int] | None = None, images: Any = None) -> int:
    """Multiply-adds of one image, compressed or not (DiffRate, Alg. 2).

    Patch embedding and classifier are included (no classifier if ``num_classes`` is 0); norms, softmax, residuals and
    compression itself are not counted.

    Args:
        model: a model that :func:`tokcomp.compress` understands.
        img_size: pixels of the image, one number or height and width; by default the model's own. A model built for
            other images is counted as if it were built for these.
        images: [B, 3, H, W], or a padded batch of patches that the model takes: the mean over these, from the tokens
            that each really keeps; for methods under which that differs from image to image, of which otherwise only
            the expectation is known, and for images that do themselves. Runs the model.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the model's schedule is for another number of tokens, or the size does not divide into whole
            patches; both img_size and images are given, or there are no images.
    """
    adapter = find_adapter(model)
    if images is not None:
        if img_size is not None:
            raise ValueError("img_size must be left out where images are given, which have a size")
        return round(flops_by_image(model, images).mean().item())
    size = None if img_size is None else _pair(img_size)
    method, num_tokens = adapter.method(model), _num_tokens(model, size)
    counts = counts_of(model, method, size)
    added = added_cost(method, adapter, model, counts, num_tokens)
    return int(flops_of(adapter.cost(model, size), counts, num_tokens) + added)


def flops_by_image(model: nn.Module, images: Any) -> Tensor:
    """Multiply-adds of each of the images [B, 3, H, W] by the tokens that it keeps, [B] float64 on the CPU.

    Args:
        model: compressed or not.
        images: as :func:`flops` takes them.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: there are no images.
    """
    adapter = find_adapter(model)
    size = (images.shape[-2], images.shape[-1]) if isinstance(images, Tensor) else None
    method, cost = adapter.method(model), adapter.cost(model, size)
    found = []
    for num_tokens, *one in zip(_tokens_of(adapter, model, images), *counts_by_image(model, images), strict=True):
        counts = TokenCounts(*one)
        found.append(flops_of(cost, counts, num_tokens) + added_cost(method, adapter, model, counts, num_tokens))
    return torch.stack(found)


@torch.no_grad()
def counts_by_image(model: nn.Module, images: Any) -> TokenCounts:
    """The token counts of each of the images [B, 3, H, W], [B, L] each; runs the model. Errors as above."""
    adapter = find_adapter(model)
    entering = torch.tensor(_tokens_of(adapter, model, images), dtype=torch.float64)
    if len(entering) == 0:
        raise ValueError("images must hold at least one image, got none")
    method = adapter.method(model)
    num_in, num_out = [], []
    for source in adapter.sources(model, images)[1]:
        left = entering if source is None else (source.amax(1) + 1).double().cpu()
        num_in.append(left if method is not None and method.between else entering)
        num_out.append(left)
        entering = entering if method is not None and method.unmerges else left
    return TokenCounts(torch.stack(num_in, 1), torch.stack(num_out, 1))


def _tokens_of(adapter: Adapter, model: nn.Module, images: Any) -> list[int]:
    """Tokens that enter block 0 of each image."""
    if not isinstance(images, Tensor):
        return adapter.tokens_of_batch(model, images)
    return [_num_tokens(model, (images.shape[-2], images.shape[-1]))] * len(images)


def added_cost(
    method: Method | None, adapter: Adapter, model: nn.Module, counts: TokenCounts, num_tokens: int
) -> float:
    """Multiply-adds of one image by the parts that a method adds to a model, where its blocks see these counts."""
    if method is None or not method.between:
        return 0.0
    prefix = adapter.geometry(model).num_prefix_tokens
    arriving = [num - prefix for num in (num_tokens, *counts.num_out.tolist()[:-1])]
    return method.added_cost(adapter.token_shape(model), arriving)


def _num_tokens(model: nn.Module, img_size: tuple[int, int] | None) -> int:
    """Tokens that enter block 0, prefix included, at an image size; None: the model's own."""
    adapter = find_adapter(model)
    if img_size is None:
        return adapter.num_tokens(model)
    rows, columns = adapter.grid(model, *img_size)
    if rows < 1 or columns < 1:
        raise ValueError(f"img_size must give at least one patch, got {img_size[0]} x {img_size[1]} pixels")
    return rows * columns + adapter.geometry(model).num_prefix_tokens


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    sides = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"img_size must be a number of pixels, or height and width, got {img_size!r}")
    return sides[0], sides[1]


def flops_of(cost: Cost, counts: TokenCounts, num_tokens: int) -> Tensor:
    """Multiply-adds of one image (Alg. 2, patch embedding and head included): 0-dim float64, differentiable.

    Args:
        cost: the model's cost coefficients, from its adapter.
        counts: [L] tokens of each block, of any floating type. Integers give the exact integer.
        num_tokens: tokens that the patch embedding makes, prefix included.

    Raises:
        ValueError: there is not one count per block.
    """
    num_in, num_out = counts.num_in.double(), counts.num_out.double()
    shape = (len(cost.blocks),)
    if num_in.shape != shape or num_out.shape != shape:
        raise ValueError(
            f"counts must have one entry per block, {shape[0]}, got shapes {tuple(num_in.shape)} and "
            f"{tuple(num_out.shape)}"
        )
    projections, attention, mlp = _coefficients(cost, num_in.device)
    blocks = (projections + attention * num_in) * num_in + mlp * num_out
    return blocks.sum() + cost.head_per_token * num_out[-1] + (cost.embed * num_tokens + cost.head)


@lru_cache(maxsize=64)
def _coefficients(cost: Cost, device: torch.device) -> tuple[Tensor, ...]:
    """Multiply-adds per token in, per token in squared and per token out, each [L]; copied to a device only once."""
    rows = [[block.projections, 2 * block.width, block.mlp] for block in cost.blocks]
    with torch.inference_mode(False):  # the copy serves later calls too, which may want gradients
        return torch.tensor(rows, dtype=torch.float64).T.to(device).unbind(0)
