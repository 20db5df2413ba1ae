"""A timm ViT block in inference as six kernels: four products, attention, and all that lies between the others.

On CPU the products are oneDNN's with packed weights, GELU fused in; on CUDA they are the library's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, LayerScale
from torch import Tensor, nn

from tokcomp.blocks.attention import attend, attend_each
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import (
    Int8Weights,
    Layer,
    PackedWeights,
    Products,
    forget,
    fused_embedding,
    has_hooks,
    is_int8,
    packable,
    packed_weights,
    plain_weights,
)
from tokcomp.fastpath.rows import Rows
from tokcomp.lvvit import ResidualScale
from tokcomp.methods.base import Norm
from tokcomp_kernels import int8

#: Elements of the widest activation of a group of images.
_ACTIVATION_ELEMENTS = 5 * 2**19
#: Where the mean over heads is a kernel of its own, which what follows attention then saves.
_AVERAGES_LATE = frozenset({"cuda"})
_NORMS = (nn.LayerNorm, LayerNorm, nn.Identity)
_SCALES = (LayerScale, ResidualScale, nn.Identity)
_DROPOUTS = (nn.Dropout, DropPath, nn.Identity)


def products_of(model: Any, images: Tensor) -> Products | None:
    """The products of those parts of the model that this module can run; None where none can.

    Raises:
        RuntimeError: they are to be in int8, and cannot all be.
    """
    if not is_int8(model):
        return _products_of(model, images, PackedWeights)
    products = _products_of(model, images, Int8Weights)
    if not isinstance(products, Int8Weights) or not all(has_products(block, products) for block in model.blocks):
        why = int8_refusal(model)
        why = why or "gradients, autocast, torch.compile, export and tracing are not; use torch.inference_mode()"
        raise RuntimeError(f"the model was quantised to int8, for plain inference on CPU in float32 alone: {why}")
    return products


def int8_refusal(model: Any) -> str | None:
    """Why the products of a model's blocks cannot be in int8, or None."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"its weights must be float32 on the CPU, got {dtype} on {weight.device.type}"
    if model.training:
        return "it is in training mode; call model.eval() first"
    odd = next((index for index, block in enumerate(model.blocks) if not is_plain(block)), None)
    if odd is not None:
        return f"blocks.{odd} has parts (or hooks on them) that this path does not know"
    for index, block in enumerate(model.blocks):
        for layer in layers_of(block):
            if not packable(layer, torch.float32):
                return f"blocks.{index} must have plain, contiguous weights, got a {type(layer.weight).__name__}"
    return int8.unavailable()


def _products_of(model: Any, images: Tensor, kind: type[PackedWeights]) -> Products | None:
    if torch.compiler.is_compiling():
        return None
    layers: list[Layer] = [layer for block in model.blocks if is_plain(block) for layer in layers_of(block)]
    if not layers:
        return None
    if images.device.type == "cuda":
        forget(model)  # what was packed while the model was on CPU
        if fused_embedding(images.device) and is_plain_embedding(model.patch_embed):
            layers.append(model.patch_embed.proj)
        return plain_weights(model, layers, images)
    if is_plain_embedding(model.patch_embed):
        layers.append(model.patch_embed.proj)
    return packed_weights(model, layers, images, kind=kind)


def embed_patches(patch_embed: Any, images: Tensor, products: Products) -> Tensor:
    """What a plain PatchEmbed computes, [B, P, C] in the images' dtype: a convolution without overlap is a product."""
    rows, columns = patch_embed.patch_size
    batch, channels, height, width = images.shape
    if (height, width) != tuple(patch_embed.img_size):
        return patch_embed(images)
    grid = (height // rows, width // columns)
    patches = images.to(products.dtype).view(batch, channels, grid[0], rows, grid[1], columns)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, grid[0] * grid[1], channels * rows * columns)
    return norm(patch_embed.norm, products.linear(patch_embed.proj, patches)).to(images.dtype)


def split(x: Tensor, products: Products) -> tuple[Tensor, ...]:
    """The tokens x [B, N, C] in groups of images whose activations stay in cache and with the process.

    What a group leaves free the next one takes; more than that goes back to the system, page by page. Measured on
    DeiT-S at batch 16: two groups of 8 are 4 % faster than one in float32, 8 % in bfloat16.
    """
    if not isinstance(products, PackedWeights):
        return (x,)
    images = max(_ACTIVATION_ELEMENTS // max(x.shape[1] * products.widest, 1), torch.get_num_threads())
    return x.tensor_split(-(-x.shape[0] // images)) if x.shape[0] > images else (x,)


def run_block(block: nn.Module, x: Tensor, state: BlockState, products: Products) -> Tensor:
    """What CompressedBlock.forward computes, for x [B, N, C] in ``products.dtype``, where products_of found the block.

    Six kernels: two products with attention between them; the residual, the reduction and the second norm; two more
    products; and the residual with the next block's first norm, which is left in ``state.normalized``.
    """
    with torch._C._AutoDispatchBelowAutograd():  # no gradient is wanted here: spare each call the way through autograd
        parts: dict[str, Any] = block._modules
        layer, out = attend_heads(block, x, state, products)
        branch = _scaled(parts["ls1"], _linear(products, layer, out, state.rows))
        layer_norm = as_norm(parts["norm2"], x)
        if layer_norm is not None:
            x, hidden = state.reduce_norm(x, branch, layer_norm)
        else:
            x = hidden = state.reduce(x + branch)
        rows = state.rows
        layer, hidden = _mlp_hidden(block, hidden if rows is None else rows.packed(hidden), products)
        if state.following is None and rows is None:
            return _residual(parts["ls2"], products, layer, hidden, x)
        branch = _scaled(parts["ls2"], products.linear(layer, hidden))
        branch = branch if rows is None else rows.padded(branch)
        if state.following is None:
            return x + branch
        x, state.normalized = torch.ops.tokcomp.add_layer_norm(x, branch, *state.following)
        return x


def attention_half(block: nn.Module, x: Tensor, state: BlockState, products: Products) -> Tensor:
    """x + attention: the block up to where the tokens are reduced. Leaves the evidence in ``state``."""
    layer, out = attend_heads(block, x, state, products)
    return _residual(block._modules["ls1"], products, layer, out, x)


def attend_heads(block: nn.Module, x: Tensor, state: BlockState, products: Products) -> tuple[nn.Linear, Tensor]:
    """The heads' outputs side by side, [B, N, C], and the layer that they go into. Leaves the evidence in ``state``."""
    parts: dict[str, Any] = block._modules
    attention, attn = parts["attn"], parts["attn"]._modules
    batch, num_tokens, _ = x.shape
    heads, width = attention.num_heads, attention.head_dim
    normalized, state.normalized = state.normalized, None
    normalized = norm(parts["norm1"], x) if normalized is None else normalized
    rows = state.rows
    qkv = _linear(products, attn["qkv"], normalized, rows)
    q, k, v = qkv.view(batch, num_tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = norm(attn["q_norm"], q), norm(attn["k_norm"], k)
    settings: dict[str, Any] = {"scale": attention.scale, "size": state.attention_size, "needs": state.needs}
    if rows is not None:
        settings |= {"mask": state.mask_of_rows, "eps": state.mask_eps}
        out, state.evidence = attend_each(q, k, v, rows.counts, **settings)
    else:
        settings |= {"mask": state.mask, "eps": state.mask_eps}
        settings |= {"stock": partial(state.layout.stock_attention, attention) if state.stock else None}
        settings |= {"by_heads": q.device.type in _AVERAGES_LATE and state.takes_heads}
        out, state.evidence = attend(q, k, v, **settings)
    return attn["proj"], out.transpose(1, 2).reshape(batch, num_tokens, heads * width)


def mlp_half(block: nn.Module, x: Tensor, products: Products) -> Tensor:
    """x + MLP: the block once the tokens are reduced."""
    parts: dict[str, Any] = block._modules
    layer, hidden = _mlp_hidden(block, norm(parts["norm2"], x), products)
    return _residual(parts["ls2"], products, layer, hidden, x)


def mlp_branch(block: nn.Module, x: Tensor, products: Products) -> Tensor:
    """The MLP's output for x [B, M, C], scaled, its residual not added."""
    parts: dict[str, Any] = block._modules
    layer, hidden = _mlp_hidden(block, norm(parts["norm2"], x), products)
    return _scaled(parts["ls2"], products.linear(layer, hidden))


def _mlp_hidden(block: nn.Module, hidden: Tensor, products: Products) -> tuple[nn.Linear, Tensor]:
    """The MLP of normalised tokens up to its last layer, and that layer."""
    mlp: dict[str, Any] = block._modules["mlp"]._modules  # type: ignore[union-attr]
    if type(mlp["act"]) is nn.GELU:
        return mlp["fc2"], products.linear_gelu(mlp["fc1"], hidden, mlp["act"].approximate)
    return mlp["fc2"], mlp["act"](products.linear(mlp["fc1"], hidden))


def has_products(block: nn.Module, products: Products) -> bool:
    """Whether :func:`products_of` found that run_block may run this block."""
    parts: dict[str, Any] = block._modules
    return parts["attn"]._modules["qkv"] in products


def is_plain(block: nn.Module) -> bool:
    """Whether run_block computes just what this block's modules would, with nobody watching them."""
    return has_known_parts(block) and not any(module.training for module in _modules(block))


def has_known_parts(block: nn.Module) -> bool:
    """Whether the block is made of what this module knows, with nobody watching its parts, whatever it drops out."""
    if not isinstance(block, Block):
        return False
    parts: dict[str, Any] = block._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    if type(parts["mlp"]) is not Mlp or not _is_absent(mlp.get("norm")):
        return False
    if not _is_absent(attn.get("norm")) or not _is_absent(attn.get("gate")):
        return False
    if any(type(norm) not in _NORMS for norm in (parts["norm1"], parts["norm2"], attn["q_norm"], attn["k_norm"])):
        return False
    if any(type(scale) not in _SCALES for scale in (parts["ls1"], parts["ls2"])):
        return False
    dropouts = [parts["drop_path1"], parts["drop_path2"], attn["attn_drop"], attn["proj_drop"]]
    if any(type(dropout) not in _DROPOUTS for dropout in (*dropouts, mlp.get("drop1"), mlp.get("drop2"))):
        return False
    if any(type(layer) is not nn.Linear for layer in layers_of(block)):
        return False
    return not has_hooks(_modules(block))


def is_plain_embedding(patch_embed: nn.Module) -> bool:
    """Whether embed_patches computes just what ``patch_embed`` would, with nobody watching it."""
    modules = list(patch_embed.modules())
    if type(patch_embed) is not PatchEmbed or patch_embed.img_size is None or not patch_embed.flatten:
        return False
    conv, norm, sizes = (
        patch_embed.proj,
        patch_embed.norm,
        zip(patch_embed.img_size, patch_embed.patch_size, strict=True),
    )
    if type(conv) is not nn.Conv2d or type(norm) not in _NORMS or any(length % patch for length, patch in sizes):
        return False
    if conv.kernel_size != patch_embed.patch_size or conv.stride != conv.kernel_size or conv.groups != 1:
        return False
    return conv.padding == (0, 0) and conv.dilation == (1, 1) and len(modules) == 3 and not has_hooks(modules)


def layers_of(block: nn.Module) -> tuple[Any, ...]:
    """The block's four linear layers."""
    parts: dict[str, Any] = block._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    return attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]


def _modules(block: nn.Module) -> list[nn.Module]:
    parts: dict[str, Any] = block._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    return [module for part in (parts, attn, mlp) for module in part.values() if module is not None]


def _is_absent(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def norm(module: Any, x: Tensor) -> Tensor:
    """What a LayerNorm, or an nn.Identity in place of one, makes of x."""
    layer_norm = as_norm(module, x)
    return x if layer_norm is None else layer_norm(x)


def as_norm(module: Any, x: Tensor) -> Norm | None:
    """A LayerNorm for x in its own type; None for an nn.Identity in place of one."""
    if type(module) is nn.Identity:
        return None
    weight, bias = module.weight, module.bias
    if weight is not None and weight.dtype != x.dtype:  # a float16 model computed in float32
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return Norm(weight, bias, module.eps)


def factor_of(scale: Any, dtype: torch.dtype) -> Tensor | float | None:
    """What a residual branch is multiplied by: a channel's own factor [C], one for all, or None for 1."""
    if type(scale) is nn.Identity:
        return None
    return scale.factor if type(scale) is ResidualScale else scale.gamma.to(dtype)


def add_scaled(x: Tensor, branch: Tensor, factor: Tensor | float) -> Tensor:
    """x + branch * factor."""
    if isinstance(factor, Tensor):
        return torch.addcmul(x, branch, factor)
    return torch.add(x, branch, alpha=factor)


def _linear(products: Products, layer: nn.Linear, x: Tensor, rows: Rows | None) -> Tensor:
    """``layer(x)`` for x [B, N, C]; zeros for what is not among the rows."""
    return products.linear(layer, x) if rows is None else rows.padded(products.linear(layer, rows.packed(x)))


def _scaled(scale: Any, branch: Tensor) -> Tensor:
    factor = factor_of(scale, branch.dtype)
    return branch if factor is None else branch * factor


def _residual(scale: Any, products: Products, layer: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
    """residual + scale(layer(x))."""
    factor = factor_of(scale, residual.dtype)
    if factor is None:
        return products.linear_add(layer, x, residual)
    return add_scaled(residual, products.linear(layer, x), factor)
