"""How fast a compressed vision transformer could be: multiply-adds and bytes of its kernels over a device's own rates.

The bound of :func:`ideal_seconds` is what nothing that runs kernel by kernel can beat: every product at the measured
matrix rate or its bytes at the measured copy rate, whichever takes longer; LayerNorm, bias, GELU and residual inside
the products; one pass over the kept rows for a compression. :func:`kernels` lists what tokcomp launches on a GPU, each
kernel with the bytes that it moves and the tiles that it multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.methods import DiffRate, EViT, Method, ToMe
from tokcomp.schedule import CompressionSchedule
from torch import nn

from benchmarks.model import traffic, traffic_triton
from benchmarks.model.traffic import KernelCost
from tokcomp_kernels.triton._configs import DEFAULT

#: Bytes of the float32 values that stand beside the tokens: sizes, class attention.
_SCALAR = 4


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a timm VisionTransformer that its cost follows from. Tokens include the prefix."""

    depth: int
    num_tokens: int
    num_prefix_tokens: int
    channels: int
    heads: int
    head_width: int
    hidden: int  # of the MLP
    patch_inputs: int  # pixels of a patch, times colours
    image_elements: int
    head_multiply_adds: int

    @property
    def num_patches(self) -> int:
        return self.num_tokens - self.num_prefix_tokens

    @classmethod
    def of(cls, model: nn.Module | str | ModelShape, **options: Any) -> ModelShape:
        """The shape of a model, or of timm's model of that name (``options`` go to timm; no weights are made).

        Raises:
            TypeError: (UnsupportedModelError) no VisionTransformer whose blocks are all of one shape.
        """
        if isinstance(model, ModelShape):
            return model
        if isinstance(model, str):
            import timm

            with torch.device("meta"):
                model = timm.create_model(model, **options)
        adapter: Any = find_adapter(model)
        found: Any = model
        if not hasattr(found, "blocks") or not hasattr(found, "patch_embed"):
            raise UnsupportedModelError(
                f"the roofline knows timm's VisionTransformer, not a {type(model).__name__}; use tokcomp.flops there"
            )
        cost = adapter.cost(model)
        if len(set(cost.blocks)) != 1:
            raise UnsupportedModelError(f"the roofline needs blocks of one shape, got {len(set(cost.blocks))} shapes")
        block = found.blocks[0]
        if getattr(block.mlp, "fc1", None) is None:
            raise UnsupportedModelError(f"the roofline knows timm's Mlp, not a {type(block.mlp).__name__}")
        height, width = found.patch_embed.img_size
        geometry = adapter.geometry(model)
        return cls(
            depth=geometry.depth,
            num_tokens=adapter.num_tokens(model),
            num_prefix_tokens=geometry.num_prefix_tokens,
            channels=found.embed_dim,
            heads=block.attn.num_heads,
            head_width=block.attn.head_dim,
            hidden=block.mlp.fc1.out_features,
            patch_inputs=cost.embed // found.embed_dim,
            image_elements=found.patch_embed.proj.in_channels * height * width,
            head_multiply_adds=cost.head,
        )


class BlockTokens(NamedTuple):
    """Tokens of one block: arriving, read by the compression, leaving; whether attention adds a bias of sizes."""

    num_in: int
    num_read: int
    num_out: int
    has_size: bool

    @property
    def compresses(self) -> bool:
        return self.num_out < self.num_in


def as_method(method: Method | CompressionSchedule | None) -> Method | None:
    """A schedule stands for DiffRate by it."""
    return DiffRate(method) if isinstance(method, CompressionSchedule) else method


def token_counts(shape: ModelShape, method: Method | CompressionSchedule | None) -> list[BlockTokens]:
    """Tokens of each block, under a method or (None) without compression."""
    method = as_method(method)
    blocks, num_tokens, has_size = [], shape.num_tokens, False
    for index in range(shape.depth):
        step = None if method is None else method.assign(index, num_tokens, shape.num_prefix_tokens)
        if method is None or step is None:
            blocks.append(BlockTokens(num_tokens, num_tokens, num_tokens, has_size))
            continue
        reads_all = isinstance(method, ToMe) or (isinstance(method, EViT) and method.fuse)
        reads_all |= isinstance(method, DiffRate) and method.pipeline == "merge_prune"
        num_read = num_tokens if reads_all else step.num_prune_kept
        blocks.append(BlockTokens(num_tokens, num_read, step.num_tokens_out, has_size))
        merges = step.num_merge_kept < num_read
        has_size |= method.proportional_attention and merges
        num_tokens = step.num_tokens_out
    return blocks


def ideal_kernels(
    model: nn.Module | str | ModelShape, method: Method | CompressionSchedule | None, batch: int, dtype: torch.dtype
) -> list[KernelCost]:
    """The fewest kernels and bytes of a batch of images: everything that can go into a product's ends goes there."""
    shape, item = ModelShape.of(model), dtype.itemsize
    channels, hidden = shape.channels, shape.hidden
    costs = [_embed(shape, batch, item)]
    for index, (num_in, num_read, num_out, _) in enumerate(token_counts(shape, method)):
        rows, rows_out = batch * num_in, batch * num_out

        def product(
            name: str, rows: int, inputs: int, outputs: int, *, residual: bool, index: int = index
        ) -> KernelCost:
            return traffic.linear(name, index, rows, inputs, outputs, item, residual=residual, bias=False)

        scores = batch * shape.heads * num_in**2
        costs += [
            product("qkv", rows, channels, 3 * channels, residual=False),
            KernelCost(
                "attention",
                index,
                multiply_adds=2 * scores * shape.head_width,
                bytes_read=3 * rows * channels * item,
                bytes_written=rows * channels * item + rows * _SCALAR,
                exponentials=scores,
            ),
            product("proj", rows, channels, channels, residual=True),
        ]
        if num_out < num_in:
            read, written = batch * num_read * channels * item, rows_out * channels * item
            costs.append(KernelCost("compress", index, bytes_read=read, bytes_written=written))
        costs += [
            product("fc1", rows_out, channels, hidden, residual=False),
            product("fc2", rows_out, hidden, channels, residual=True),
        ]
    return [*costs, _head(shape, batch, item)]


def _embed(shape: ModelShape, batch: int, item: int) -> KernelCost:
    weights = shape.patch_inputs * shape.channels
    return KernelCost(
        "patch_embed",
        None,
        multiply_adds=batch * shape.num_patches * weights,
        bytes_read=(batch * shape.image_elements + weights) * item,
        bytes_written=batch * shape.num_patches * shape.channels * item,
    )


def _head(shape: ModelShape, batch: int, item: int) -> KernelCost:
    classes = shape.head_multiply_adds // shape.channels
    return traffic.linear("head", None, batch, shape.channels, classes, item, bias=False)


def kernels(
    model: nn.Module | str | ModelShape,
    method: Method | CompressionSchedule | None,
    batch: int,
    dtype: torch.dtype,
    *,
    gpu: str = DEFAULT,
    fused_gelu: bool = False,
) -> list[KernelCost]:
    """What a compressed model launches on a GPU for a batch, kernel by kernel, in order.

    A block: qkv, attention (PyTorch's own where it needs neither sizes nor class row), proj, prune_merge_norm, which
    averages the class rows of the heads, or add_layer_norm, fc1, GELU, fc2, and add_layer_norm with the next block's
    weights; after the last block the model's own norm. Products are the library's.

    Args:
        model, method, batch, dtype: as for :func:`ideal_seconds`; of methods those that run on one operator per block,
            DiffRate by class attention.
        gpu: whose table of tile sizes the Triton kernels read.
        fused_gelu: fc1 and GELU in one Triton kernel, linear_gelu, which is not the default.

    Raises:
        ValueError: a method that reduces tokens otherwise.
    """
    shape, item, method = ModelShape.of(model), dtype.itemsize, as_method(method)
    if method is not None and not (
        isinstance(method, DiffRate) and method.pipeline != "merge_prune" and method.metric == "cls_attn"
    ):
        raise ValueError(f"method must be DiffRate by class attention, pruning before it merges, got {method!r}")
    channels, hidden, tokens = shape.channels, shape.hidden, batch * shape.num_tokens
    patches = batch * shape.num_patches
    costs = [
        traffic.elementwise("patches", None, batch * shape.image_elements, batch * shape.image_elements, item),
        traffic.linear("patch_embed", None, patches, shape.patch_inputs, channels, item),
        traffic.elementwise("position", None, (patches + shape.num_tokens) * channels, tokens * channels, item),
        traffic.elementwise("norm1", None, tokens * channels, tokens * channels, item),
    ]
    for index, (num_in, num_read, num_out, has_size) in enumerate(token_counts(shape, method)):
        rows, rows_out = batch * num_in, batch * num_out
        costs.append(traffic.linear("qkv", index, rows, channels, 3 * channels, item))
        if has_size or num_out < num_in:
            costs += traffic_triton.attention(
                batch, shape.heads, num_in, shape.head_width, item, has_size=has_size, mean=False, block=index, gpu=gpu
            )
        else:
            costs.append(traffic.plain_attention(batch, shape.heads, num_in, shape.head_width, item, index))
        costs.append(traffic.linear("proj", index, rows, channels, channels, item))
        if num_out < num_in:
            costs += traffic_triton.prune_merge(
                batch,
                num_in,
                num_read,
                num_out,
                channels,
                item,
                has_size=has_size,
                fused=True,
                heads=shape.heads,
                num_prefix_tokens=shape.num_prefix_tokens,
                block=index,
                gpu=gpu,
            )
        else:
            costs += traffic_triton.add_layer_norm(rows, channels, item, block=index)
        if fused_gelu:
            costs += traffic_triton.linear_gelu(rows_out, channels, hidden, item, block=index, gpu=gpu)
        else:
            costs.append(traffic.linear("fc1", index, rows_out, channels, hidden, item))
            costs.append(traffic.elementwise("gelu", index, rows_out * hidden, rows_out * hidden, item))
        costs.append(traffic.linear("fc2", index, rows_out, hidden, channels, item))
        if index + 1 < shape.depth:
            costs += traffic_triton.add_layer_norm(rows_out, channels, item, block=index)
    out = rows_out * channels  # after the last block
    costs += [
        traffic.elementwise("residual", None, 2 * out, out, item),
        traffic.elementwise("norm", None, out, out, item),
    ]
    return [*costs, _head(shape, batch, item)]


def least_seconds(cost: KernelCost, rates: Mapping[str, float]) -> float:
    """A kernel's time where only its slowest resource counts: products, bytes, or (where a rate is given) powers."""
    seconds = max(cost.flops / rates["matrix_flops_per_s"], cost.bytes_moved / rates["copy_bytes_per_s"])
    powers = rates.get("exponentials_per_s")
    return seconds if powers is None else max(seconds, cost.exponentials / powers)


def ideal_seconds(
    model: nn.Module | str | ModelShape,
    method: Method | CompressionSchedule | None,
    batch: int,
    dtype: torch.dtype,
    rates: Mapping[str, float],
    *,
    launch_seconds: float = 0.0,
) -> float:
    """The least seconds that a batch of images can take on a device, everything fused and each product at full rate.

    Args:
        model: a timm VisionTransformer, its name, or its :class:`ModelShape`.
        method: how it compresses; a schedule stands for DiffRate, None for no compression.
        batch: images.
        dtype: of weights and activations.
        rates: ``matrix_flops_per_s`` (a multiply-add is two) and ``copy_bytes_per_s`` (read plus written), measured in
            this dtype by ``tokcomp.measure.timing.device_rates``; ``exponentials_per_s`` bounds attention where given.
        launch_seconds: what each kernel adds for its launch.

    Raises:
        KeyError: a rate is missing.
        TypeError: (UnsupportedModelError) a model of another kind.
    """
    costs = ideal_kernels(model, method, batch, dtype)
    return sum(least_seconds(cost, rates) for cost in costs) + launch_seconds * len(costs)
