"""What the operators made of a model's layers refuse, and in which words: as ``_checks``, for the others."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checks import (
    _require_branch_and_norm,
    _require_dim,
    _require_floating,
    _require_floats,
    _require_match,
    _require_tensor,
    _shape,
    refuse,
)


def check_add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, norm_eps: float = 1e-6
) -> None:
    op = "add_layer_norm"
    _require_tensor(op, "x", x)
    if x.dim() < 1:
        refuse(op, "x", "be [..., C]", f"a tensor of shape {_shape(x.shape)}")
    _require_floating(op, "x", x)
    _require_branch_and_norm(op, x, "[..., C]", branch, weight, bias, norm_eps)


def check_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    op = "linear_gelu"
    _require_tensor(op, "x", x)
    if x.dim() < 1:
        refuse(op, "x", "be [..., K]", f"a tensor of shape {_shape(x.shape)}")
    _require_floating(op, "x", x)
    _require_dim(op, "weight", weight, "[F, K]")
    _require_match(op, "weight", weight, "[F, K]", (weight.shape[0], x.shape[-1]), "x", x)
    if bias is not None:
        _require_match(op, "bias", bias, "[F]", weight.shape[:1], "x", x)


def check_embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    prefix: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    op = "_embed_patches"
    _require_floats(op, "images", images, "[B, A, H, W]")
    _require_dim(op, "weight", weight, "[C, A, P, Q]")
    channels, _, rows, columns = weight.shape
    _require_match(op, "weight", weight, "[C, A, P, Q]", (channels, images.shape[1], rows, columns), "images", images)
    height, width = images.shape[2:]
    if rows < 1 or columns < 1 or height % rows or width % columns:
        rule = f"be whole patches of {rows} x {columns}, weight's [P, Q]"
        refuse(op, "images", rule, f"a tensor of shape {_shape(images.shape)}")
    if prefix is not None:
        _require_dim(op, "prefix", prefix, "[T, C]")
        _require_match(op, "prefix", prefix, "[T, C]", (prefix.shape[0], channels), "images", images)
    tokens = (height // rows) * (width // columns) + (0 if prefix is None else prefix.shape[0])
    _require_match(op, "position", position, "[N, C]", (tokens, channels), "images", images)
    for name, vector in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            _require_match(op, name, vector, "[C]", (channels,), "images", images)
    if not norm_eps >= 0:
        refuse(op, "norm_eps", "be at least 0", norm_eps)
