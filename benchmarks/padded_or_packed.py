"""Batches whose images keep different numbers of tokens: padded to the longest, or packed side by side.

    python -m benchmarks.padded_or_packed

times twelve blocks of DeiT-S in three forms, in turns, over batches of several spreads, after checking that the class
tokens agree. Padded: [B, longest, C], and nobody attends to a token of size 0. Packed: all tokens of the batch as one
row of them, [1, total, C], and attention image by image. Left out, as a compressed ViT runs on a CPU: padded, with
padding left out of linear layers and of attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from tokcomp.blocks.attention import attend_each
from tokcomp.fastpath.rows import Rows
from tokcomp.measure.timing import interleave, stopwatch
from torch import Tensor

import tokcomp_kernels  # noqa: F401  the operators

MODEL = "deit_small_patch16_224"
#: Mean number of tokens, about as many as half of a model's multiply-adds leave on average.
MEAN = 104
#: How far the longest and the shortest image are from the mean, as a share of it.
SPREADS = (0.0, 0.1, 0.2, 0.4, 0.6)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def lengths(batch: int, spread: float) -> list[int]:
    """Tokens of each image, evenly from the least to the most; one image alone has the mean."""
    if batch == 1:
        return [MEAN]
    return [round(MEAN * (1 + spread * (2 * one / (batch - 1) - 1))) for one in range(batch)]


def run(blocks: Sequence[Any], x: Tensor, attend: Attend, rows: Rows | None = None) -> Tensor:
    """x [B, N, C] through timm's blocks, with an attention of q, k, v [B, H, N, D]; rows: those in linear layers."""

    def linear(layers: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return layers(x) if rows is None else rows.padded(layers(rows.packed(x)))

    for block in blocks:
        qkv = linear(block.attn.qkv, block.norm1(x))
        heads = qkv.unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + linear(block.attn.proj, attend(*heads.unbind(0)).transpose(1, 2).flatten(2))
        x = x + linear(block.mlp, block.norm2(x))
    return x


def padded(blocks: Sequence[Any], tokens: Sequence[Tensor], leave_out: bool = False) -> Tensor:
    """The class tokens [B, C] of images [N_i, C]."""
    x = torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True)
    size = torch.nn.utils.rnn.pad_sequence([one.new_ones(len(one)) for one in tokens], batch_first=True)
    rows = Rows.of(size) if leave_out else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if rows is None:
            return torch.ops.tokcomp.attention(q, k, v, size=size)[0]
        return attend_each(q, k, v, rows.counts, scale=q.shape[3] ** -0.5)[0]

    return run(blocks, x, attend, rows)[:, 0]


def left_out(blocks: Sequence[Any], tokens: Sequence[Tensor]) -> Tensor:
    """As :func:`padded`."""
    return padded(blocks, tokens, leave_out=True)


def packed(blocks: Sequence[Any], tokens: Sequence[Tensor]) -> Tensor:
    """As :func:`padded`."""
    counts = [len(one) for one in tokens]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        images = zip(*(one.split(counts, 2) for one in (q, k, v)), strict=True)
        return torch.cat([torch.ops.tokcomp.attention(*image)[0] for image in images], 2)

    x = run(blocks, torch.cat(list(tokens))[None], attend)[0]
    return torch.stack([one[0] for one in x.split(counts)])


FORMS = (padded, left_out, packed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    blocks = timm.create_model(MODEL).to(args.device).eval().blocks
    print("| batch | tokens | padded, images/s | left out | packed |\n|---:|---:|---:|---:|---:|")
    with torch.inference_mode():
        for batch in args.batches:
            for spread in SPREADS:
                counts = lengths(batch, spread)
                tokens = [torch.randn(count, blocks[0].norm1.weight.shape[0], device=args.device) for count in counts]
                want = padded(blocks, tokens)
                for form in FORMS[1:]:
                    torch.testing.assert_close(form(blocks, tokens), want, rtol=1e-3, atol=1e-3)
                calls = {form.__name__: lambda form=form, tokens=tokens: form(blocks, tokens) for form in FORMS}
                found = interleave(calls, stopwatch(args.device), rounds=args.rounds)
                cells = [f"{batch / found['padded'].median:.1f}"]
                for form in FORMS[1:]:
                    samples = found[form.__name__]
                    median, least, most = samples.speedup_over(found["padded"])
                    cells.append(f"{batch / samples.median:.1f}, {median:.2f}x ({least:.2f}x - {most:.2f}x)")
                print(f"| {batch} | {min(counts)} - {max(counts)} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
