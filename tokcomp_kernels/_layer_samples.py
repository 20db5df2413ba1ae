"""Samples of the operators made of a model's layers, for :mod:`tokcomp_kernels.testing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tokcomp_kernels._sample_maker import Case, Maker


def add_layer_norm(
    make: Callable[[str], Maker], token_counts: Sequence[tuple[int, int]], channels: int
) -> Iterator[Case]:
    for num_tokens, images in token_counts:
        m = make(f"N{num_tokens}")
        x, branch = m.randn(images, num_tokens, channels), m.strided(images, num_tokens, channels)
        weight, bias = m.randn(x.shape[2]), m.randn(x.shape[2])
        yield f"N{num_tokens}", (x, branch, weight, bias), {}, False
        yield f"N{num_tokens}-plain", (branch, x), {"norm_eps": 1e-5}, False
    m = make("layouts")
    x, branch, weight, bias = m.randn(3, 7, 33), m.randn(3, 7, 33), m.randn(33), m.strided(33)
    yield "transposed", (x.mT, m.randn(3, 33, 7), m.randn(7)), {}, False
    yield "last-dim-strided", (x[:, :, ::2], branch[:, :, ::2], weight[::2], bias[::2]), {}, False
    yield "rows", (x[0], branch[0], weight, bias), {}, False
    yield "C1", (x[:, :, :1], branch[:, :, :1], weight[:1], bias[:1]), {}, False
    yield "constant-rows", (torch.ones_like(x), torch.ones_like(x), weight, bias), {}, False
    yield "far-from-zero", (x + 40, branch + 40, weight, bias), {}, False
    yield "B0", (x[:0], branch[:0], weight, bias), {}, False


def linear_gelu(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    sizes = ((1, 3, 2), (5, 4, 3), (9, 7, 5)) if small else ((1, 24, 40), (33, 48, 96), (70, 130, 65), (197, 64, 33))
    for num_tokens, width, features in sizes:
        m = make(f"N{num_tokens}")
        x, weight, bias = m.randn(2, num_tokens, width), m.randn(features, width) * width**-0.5, m.randn(features)
        yield f"N{num_tokens}", (x, weight, bias), {}, False
        yield f"N{num_tokens}-strided", (m.strided(2, num_tokens, width), weight), {}, False
    m = make("layouts")
    x, weight, bias = m.randn(3, 17, 33), m.randn(9, 17), m.randn(18)
    yield "transposed", (x.mT, weight, bias[::2]), {}, False
    yield "last-dim-strided", (x[:, :, ::2], m.randn(9, 34)[:, ::2], bias[:9]), {}, False
    yield "rows", (x[0].T, weight, bias[:9]), {}, False
    yield "far-from-zero", (x.mT * 20, weight, bias[:9] * 20), {}, False
    yield "B0", (x[:0].mT, weight, bias[:9]), {}, False


def embed_patches(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    """Grids of patches behind no, one or five prefix tokens."""
    grids = ((1, 1, 0), (1, 1, 1), (2, 4, 1)) if small else ((1, 1, 0), (1, 1, 1), (4, 8, 1), (14, 14, 1), (16, 16, 1))
    for rows, columns, prefix in (*grids, (4, 7, 5)):
        tokens = rows * columns + prefix
        name = f"N{tokens}" if prefix < 2 else f"prefix{prefix}"
        m = make(f"{name}, {prefix}")
        channels, side = (5, 2) if small else (48, 4)
        images, weight = m.randn(2, 3, rows * side, columns * side), m.randn(channels, 3, side, side)
        position, first = m.randn(tokens, channels), m.randn(prefix, channels) if prefix else None
        args = (images, weight, m.randn(channels), position, first)
        yield name, (*args, m.randn(channels), m.randn(channels)), {}, False
        yield f"{name}-plain", (*args[:2], None, *args[3:]), {"norm_eps": 1e-5}, False
    m = make("layouts")
    images, weight, position, first = m.randn(3, 8, 12, 2), m.randn(33, 2, 4, 2), m.strided(13, 33), m.strided(1, 33)
    bias = m.randn(66)[::2]
    yield "channels-last", (images.permute(0, 3, 1, 2), weight, bias, position, first, bias, bias), {}, False
    turned = images.permute(0, 3, 2, 1)[:, :, ::3], weight.mT.contiguous().mT[:, :, :, :1]  # patches of 4 x 1
    yield "transposed", (*turned, None, m.randn(9, 33), first), {}, False
    yield "far-from-zero", (images.permute(0, 3, 1, 2), weight, None, position + 40, first, bias), {}, False
    yield "B0", (images[:0].permute(0, 3, 1, 2), weight, bias, position, first), {}, False
