"""Wrong input: one table, the same words on every backend, on meta, and through the dispatcher."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops.backends import NAMES, Target, targets
from tokcomp_kernels._schema import BY_NAME
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.reference import REFERENCES
from tokcomp_kernels.testing import samples


def _randn(*shape: int) -> Callable[[str], torch.Tensor]:
    return lambda device: torch.randn(shape, device=device)


def _typed(dtype: torch.dtype, *shape: int) -> Callable[[str], torch.Tensor]:
    return lambda device: torch.ones(shape, device=device).to(dtype)


X, IMPORTANCE, QKV, SCORES = _randn(2, 9, 4), _randn(2, 9), _randn(2, 3, 9, 4), _randn(2, 3, 9, 9)
IMAGES, POSITION = _randn(2, 3, 6, 4), _randn(5, 4)
INT = torch.int64
SOURCE, COUNTS, ROLE = _typed(INT, 2, 12), _typed(INT, 2), _typed(INT, 2, 9)
NEED = "where tokens merge, which need a destination"
HALF = torch.float16
#: operator, positional arguments, keyword arguments, error, message
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("prune_merge", (_randn(9, 4), IMPORTANCE, 5, 3), {}, ValueError,
     "prune_merge: x must be [B, N, C], got a tensor of shape [9, 4]"),
    ("prune_merge", (None, IMPORTANCE, 5, 3), {}, TypeError, "prune_merge: x must be a tensor, got None"),
    ("prune_merge", (X, None, 5, 3), {}, TypeError, "prune_merge: importance must be a tensor, got None"),
    ("_attention_heads", (QKV, _randn(2, 3, 8, 4), QKV), {}, ValueError,
     "_attention_heads: k must be [B, H, N, D] = [2, 3, 9, 4], got a tensor of shape [2, 3, 8, 4]"),
    ("attention", (QKV, QKV, None), {}, TypeError, "attention: v must be a tensor, got None"),
    ("attention", (_randn(2, 3, 9, 0),) * 3, {"scale": 1.0}, ValueError,
     "attention: q must have heads of at least one number (D >= 1), got a tensor of shape [2, 3, 9, 0]"),
    ("class_attention_sort", (_randn(2, 3, 0), _randn(2, 3, 9, 0)), {}, ValueError,
     "class_attention_sort: k must have heads of at least one number (D >= 1), got a tensor of shape [2, 3, 9, 0]"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, None), {}, TypeError,
     "masked_merge: counts must be a tensor, got None"),
    ("add_layer_norm", (None, X), {}, TypeError, "add_layer_norm: x must be a tensor, got None"),
    ("linear_gelu", (None, _randn(6, 4)), {}, TypeError, "linear_gelu: x must be a tensor, got None"),
    ("prune_merge", (_typed(INT, 2, 9, 4), IMPORTANCE, 5, 3), {}, TypeError,
     "prune_merge: x must be float16, bfloat16, float32 or float64, got int64"),
    ("prune_merge", (X, _randn(2, 8), 5, 3), {}, ValueError,
     "prune_merge: importance must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("prune_merge", (X, _randn(2, 3, 8), 5, 3), {}, ValueError,
     "prune_merge: importance must be [B, H, N] = [2, 3, 9], got a tensor of shape [2, 3, 8]"),
    ("prune_merge", (X, _randn(2, 0, 9), 5, 3), {}, ValueError,
     "prune_merge: importance must have at least one head, got a tensor of shape [2, 0, 9]"),
    ("prune_merge", (X, _typed(INT, 2, 9), 5, 3), {}, TypeError,
     "prune_merge: importance must be float16, bfloat16, float32 or float64, got int64"),
    ("prune_merge", (X, IMPORTANCE, 5, 3), {"size": _randn(1, 9)}, ValueError,
     "prune_merge: size must be [B, N] = [2, 9], got a tensor of shape [1, 9]"),
    ("prune_merge", (X, IMPORTANCE, 0, 3), {}, ValueError,
     "prune_merge: num_prune_kept must be at least num_prefix_tokens (1), got 0"),
    ("prune_merge", (X, IMPORTANCE, 9, 1), {}, ValueError,
     f"prune_merge: num_merge_kept must be more than num_prefix_tokens (1) {NEED}, got 1"),
    ("prune_merge", (X, IMPORTANCE, 9, -3), {"num_prefix_tokens": 0}, ValueError,
     f"prune_merge: num_merge_kept must be more than num_prefix_tokens (0) {NEED}, got -3"),
    ("prune_merge", (X, IMPORTANCE, 9, 5), {"num_prefix_tokens": 10}, ValueError,
     "prune_merge: num_prefix_tokens must be between 0 and the number of tokens (9), got 10"),
    ("class_attention_sort", (_randn(2, 3, 4), _randn(2, 9, 4)), {}, ValueError,
     "class_attention_sort: k must be [B, H, N, D], got a tensor of shape [2, 9, 4]"),
    ("class_attention_sort", (_randn(2, 3, 5), QKV), {}, ValueError,
     "class_attention_sort: q_cls must be [B, H, D] = [2, 3, 4], got a tensor of shape [2, 3, 5]"),
    ("class_attention_sort", (_typed(HALF, 2, 3, 4), QKV), {}, TypeError,
     "class_attention_sort: q_cls must have the dtype of k (float32), got float16"),
    ("class_attention_sort", (_randn(2, 3, 4), QKV), {"num_prefix_tokens": -1}, ValueError,
     "class_attention_sort: num_prefix_tokens must be between 0 and the number of tokens (9), got -1"),
    ("attention", (_randn(2, 9, 4), QKV, QKV), {}, ValueError,
     "attention: q must be [B, H, N, D], got a tensor of shape [2, 9, 4]"),
    ("attention", (QKV, _randn(2, 3, 8, 4), QKV), {}, ValueError,
     "attention: k must be [B, H, N, D] = [2, 3, 9, 4], got a tensor of shape [2, 3, 8, 4]"),
    ("attention", (QKV, QKV, _typed(HALF, 2, 3, 9, 4)), {}, TypeError,
     "attention: v must have the dtype of q (float32), got float16"),
    ("attention", (_randn(2, 3, 0, 4),) * 3, {}, ValueError,
     "attention: q must hold at least one token, got a tensor of shape [2, 3, 0, 4]"),
    ("attention", (QKV, QKV, QKV), {"size": _typed(INT, 2, 9)}, TypeError,
     "attention: size must be float16, bfloat16, float32 or float64, got int64"),
    ("attention_received", (QKV, None), {}, TypeError, "attention_received: k must be a tensor, got None"),
    ("attention_received", (QKV, _randn(2, 3, 8, 4)), {}, ValueError,
     "attention_received: k must be [B, H, N, D] = [2, 3, 9, 4], got a tensor of shape [2, 3, 8, 4]"),
    ("attention_received", (_randn(2, 3, 0, 4),) * 2, {}, ValueError,
     "attention_received: q must hold at least one token, got a tensor of shape [2, 3, 0, 4]"),
    ("attention_received", (QKV, _typed(HALF, 2, 3, 9, 4)), {}, TypeError,
     "attention_received: k must have the dtype of q (float32), got float16"),
    ("attention_received", (QKV, QKV), {"size": _randn(2, 8)}, ValueError,
     "attention_received: size must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("attention_received", (QKV, QKV), {"num_prefix_tokens": 10}, ValueError,
     "attention_received: num_prefix_tokens must be between 0 and the number of tokens (9), got 10"),
    ("masked_attention", (QKV, QKV, QKV, _randn(2, 8)), {}, ValueError,
     "masked_attention: token_mask must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("masked_attention", (QKV, QKV, QKV, _typed(torch.bool, 2, 9)), {}, TypeError,
     "masked_attention: token_mask must be float16, bfloat16, float32 or float64, got bool"),
    ("masked_attention", (QKV, QKV, QKV, IMPORTANCE), {"eps": 0.0}, ValueError,
     "masked_attention: eps must be positive, got 0"),
    ("masked_softmax", (_randn(2, 3, 8, 9), IMPORTANCE), {}, ValueError,
     "masked_softmax: scores must be [B, H, N, N] = [2, 3, 9, 9], got a tensor of shape [2, 3, 8, 9]"),
    ("masked_softmax", (SCORES, _randn(2, 9, 1)), {}, ValueError,
     "masked_softmax: token_mask must be [B, N] = [2, 9], got a tensor of shape [2, 9, 1]"),
    ("tome_merge", (X, _randn(2, 8, 4), 3), {}, ValueError,
     "tome_merge: metric must be [B, N, K] = [2, 9, 4], got a tensor of shape [2, 8, 4]"),
    ("tome_merge", (X, X, -1), {}, ValueError, "tome_merge: r must be at least 0, got -1"),
    ("tome_merge", (X, _typed(INT, 2, 9, 4), 1), {}, TypeError,
     "tome_merge: metric must be float16, bfloat16, float32 or float64, got int64"),
    ("bipartite_merge", (X, _randn(2, 8, 4), ROLE, 3), {}, ValueError,
     "bipartite_merge: metric must be [B, N, K] = [2, 9, 4], got a tensor of shape [2, 8, 4]"),
    ("bipartite_merge", (X, X, None, 3), {}, TypeError, "bipartite_merge: role must be a tensor, got None"),
    ("bipartite_merge", (X, X, _typed(INT, 2, 8), 3), {}, ValueError,
     "bipartite_merge: role must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("bipartite_merge", (X, X, _typed(torch.int32, 2, 9), 3), {}, TypeError,
     "bipartite_merge: role must be int64, got int32"),
    ("bipartite_merge", (X, X, ROLE, -1), {}, ValueError,
     "bipartite_merge: r must be between 0 and 8, so that a destination is left, got -1"),
    ("bipartite_merge", (X, X, ROLE, 9), {}, ValueError,
     "bipartite_merge: r must be between 0 and 8, so that a destination is left, got 9"),
    ("bipartite_merge", (X, X, ROLE, 3), {"size": _randn(2, 8)}, ValueError,
     "bipartite_merge: size must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("bipartite_merge", (X, X, ROLE, 3), {"average": "median"}, ValueError,
     "bipartite_merge: average must be one of size, mean, sum, got 'median'"),
    ("bipartite_merge", (X, X, ROLE, 3), {"threshold": 1.5}, ValueError,
     "bipartite_merge: threshold must be between -1 and 1, as cosines are, got 1.5"),
    ("bipartite_merge", (X, X, ROLE, 3), {"threshold": float("nan")}, ValueError,
     "bipartite_merge: threshold must be between -1 and 1, as cosines are, got nan"),
    ("select_diverse", (_randn(9, 4), 3), {}, ValueError,
     "select_diverse: features must be [B, N, K], got a tensor of shape [9, 4]"),
    ("select_diverse", (_typed(INT, 2, 9, 4), 3), {}, TypeError,
     "select_diverse: features must be float16, bfloat16, float32 or float64, got int64"),
    ("select_diverse", (X, 10), {}, ValueError,
     "select_diverse: num_kept must be between num_prefix_tokens (1) and 9 tokens, got 10"),
    ("select_diverse", (X, 1), {"num_prefix_tokens": 2}, ValueError,
     "select_diverse: num_kept must be between num_prefix_tokens (2) and 9 tokens, got 1"),
    ("select_diverse", (X, 9), {"num_prefix_tokens": 10}, ValueError,
     "select_diverse: num_prefix_tokens must be between 0 and the number of tokens (9), got 10"),
    ("select_diverse", (X, 3), {"rule": "random"}, ValueError,
     "select_diverse: rule must be one of farthest, dpp, got 'random'"),
    ("select_diverse", (X, 3), {"relevance": IMPORTANCE}, ValueError,
     "select_diverse: relevance must be None for the rule 'farthest', which asks for distances alone, got a tensor"),
    ("select_diverse", (X, 3), {"relevance": _randn(2, 8), "rule": "dpp"}, ValueError,
     "select_diverse: relevance must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("unmerge", (X, _typed(torch.int32, 2, 12)), {}, TypeError, "unmerge: source must be int64, got int32"),
    ("unmerge", (X, _typed(INT, 3, 12)), {}, ValueError, "unmerge: source must have the batch size of x (2), got 3"),
    ("unmerge", (X, SOURCE), {"pruned_fill": _randn(2, 9, 4)}, ValueError,
     "unmerge: pruned_fill must be [B, N, C] = [2, 12, 4], got a tensor of shape [2, 9, 4]"),
    ("unmerge", (X, SOURCE), {"pruned_fill": _typed(HALF, 2, 12, 4)}, TypeError,
     "unmerge: pruned_fill must have the dtype of x (float32), got float16"),
    ("masked_merge", (_randn(9, 4), IMPORTANCE, IMPORTANCE, COUNTS), {}, ValueError,
     "masked_merge: x must be [B, N, C], got a tensor of shape [9, 4]"),
    ("masked_merge", (_typed(INT, 2, 9, 4), IMPORTANCE, IMPORTANCE, COUNTS), {}, TypeError,
     "masked_merge: x must be float16, bfloat16, float32 or float64, got int64"),
    ("masked_merge", (X, _randn(2, 8), IMPORTANCE, COUNTS), {}, ValueError,
     "masked_merge: importance must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("masked_merge", (X, IMPORTANCE, _randn(1, 9), COUNTS), {}, ValueError,
     "masked_merge: token_mask must be [B, N] = [2, 9], got a tensor of shape [1, 9]"),
    ("masked_merge", (X, IMPORTANCE, _typed(torch.bool, 2, 9), COUNTS), {}, TypeError,
     "masked_merge: token_mask must be float16, bfloat16, float32 or float64, got bool"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, _typed(INT, 3)), {}, ValueError,
     "masked_merge: counts must be [num_before_merge, num_merge_kept], got a tensor of shape [3]"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, _typed(torch.int32, 2)), {}, TypeError,
     "masked_merge: counts must be int64, got int32"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, COUNTS), {"size": _randn(2, 8)}, ValueError,
     "masked_merge: size must be [B, N] = [2, 9], got a tensor of shape [2, 8]"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, COUNTS), {"num_prefix_tokens": 10}, ValueError,
     "masked_merge: num_prefix_tokens must be between 0 and the number of tokens (9), got 10"),
    ("masked_merge", (X, IMPORTANCE, IMPORTANCE, COUNTS), {"min_weighted_size": float("nan")}, ValueError,
     "masked_merge: min_weighted_size must be a number, got nan"),
    ("prune_merge_norm", (_randn(9, 4), X, IMPORTANCE, 5, 3), {}, ValueError,
     "prune_merge_norm: x must be [B, N, C], got a tensor of shape [9, 4]"),
    ("prune_merge_norm", (X, _randn(2, 9, 3), IMPORTANCE, 5, 3), {}, ValueError,
     "prune_merge_norm: branch must be [B, N, C] = [2, 9, 4], got a tensor of shape [2, 9, 3]"),
    ("prune_merge_norm", (X, _typed(HALF, 2, 9, 4), IMPORTANCE, 5, 3), {}, TypeError,
     "prune_merge_norm: branch must have the dtype of x (float32), got float16"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 5, 1), {}, ValueError,
     f"prune_merge_norm: num_merge_kept must be more than num_prefix_tokens (1) {NEED}, got 1"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 0, 3), {}, ValueError,
     "prune_merge_norm: num_prune_kept must be at least num_prefix_tokens (1), got 0"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 5, 3, _randn(5)), {}, ValueError,
     "prune_merge_norm: weight must be [C] = [4], got a tensor of shape [5]"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 5, 3, _randn(4), _typed(HALF, 4)), {}, TypeError,
     "prune_merge_norm: bias must have the dtype of x (float32), got float16"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 5, 3), {"size": _randn(1, 9)}, ValueError,
     "prune_merge_norm: size must be [B, N] = [2, 9], got a tensor of shape [1, 9]"),
    ("prune_merge_norm", (X, X, IMPORTANCE, 5, 3), {"norm_eps": -1.0}, ValueError,
     "prune_merge_norm: norm_eps must be at least 0, got -1"),
    ("linear_gelu", (_randn(), _randn(5, 4)), {}, ValueError,
     "linear_gelu: x must be [..., K], got a tensor of shape []"),
    ("linear_gelu", (_typed(INT, 9, 4), _typed(INT, 5, 4)), {}, TypeError,
     "linear_gelu: x must be float16, bfloat16, float32 or float64, got int64"),
    ("linear_gelu", (X, _randn(5, 3)), {}, ValueError,
     "linear_gelu: weight must be [F, K] = [5, 4], got a tensor of shape [5, 3]"),
    ("linear_gelu", (X, _randn(4)), {}, ValueError,
     "linear_gelu: weight must be [F, K], got a tensor of shape [4]"),
    ("linear_gelu", (X, _typed(HALF, 5, 4)), {}, TypeError,
     "linear_gelu: weight must have the dtype of x (float32), got float16"),
    ("linear_gelu", (X, _randn(5, 4), _randn(4)), {}, ValueError,
     "linear_gelu: bias must be [F] = [5], got a tensor of shape [4]"),
    ("linear_gelu", (X, _randn(5, 4), _typed(HALF, 5)), {}, TypeError,
     "linear_gelu: bias must have the dtype of x (float32), got float16"),
    ("add_layer_norm", (_randn(), _randn()), {}, ValueError,
     "add_layer_norm: x must be [..., C], got a tensor of shape []"),
    ("add_layer_norm", (_typed(INT, 9, 4), _typed(INT, 9, 4)), {}, TypeError,
     "add_layer_norm: x must be float16, bfloat16, float32 or float64, got int64"),
    ("add_layer_norm", (X, _randn(9, 4)), {}, ValueError,
     "add_layer_norm: branch must be [..., C] = [2, 9, 4], got a tensor of shape [9, 4]"),
    ("add_layer_norm", (X, X, _randn(4, 1)), {}, ValueError,
     "add_layer_norm: weight must be [C] = [4], got a tensor of shape [4, 1]"),
    ("add_layer_norm", (X, X, None, None, float("nan")), {}, ValueError,
     "add_layer_norm: norm_eps must be at least 0, got nan"),
    ("_embed_patches", (IMAGES, _randn(4, 3, 4, 2), None, POSITION, _randn(1, 4)), {}, ValueError,
     "_embed_patches: images must be whole patches of 4 x 2, weight's [P, Q], got a tensor of shape [2, 3, 6, 4]"),
    ("_embed_patches", (IMAGES, _randn(4, 2, 3, 2), None, POSITION, _randn(1, 4)), {}, ValueError,
     "_embed_patches: weight must be [C, A, P, Q] = [4, 3, 3, 2], got a tensor of shape [4, 2, 3, 2]"),
    ("_embed_patches", (IMAGES, _randn(4, 3, 3, 2), None, POSITION, None), {}, ValueError,
     "_embed_patches: position must be [N, C] = [4, 4], got a tensor of shape [5, 4]"),
    ("_embed_patches", (IMAGES, _randn(4, 3, 3, 2), None, POSITION, _randn(1, 5)), {}, ValueError,
     "_embed_patches: prefix must be [T, C] = [1, 4], got a tensor of shape [1, 5]"),
    ("_embed_patches", (IMAGES, _randn(4, 3, 3, 2), _typed(HALF, 4), POSITION, _randn(1, 4)), {}, TypeError,
     "_embed_patches: bias must have the dtype of images (float32), got float16"),
    ("_embed_patches", (IMAGES, _randn(4, 3, 3, 2), None, POSITION, _randn(1, 4), None, None, -1.0), {}, ValueError,
     "_embed_patches: norm_eps must be at least 0, got -1"),
    ("_masked_merge_backward", (X, SOURCE), {}, ValueError,
     "_masked_merge_backward: destination must be [B, N] = [2, 9], got a tensor of shape [2, 12]"),
    ("_masked_merge_backward", (X, IMPORTANCE), {}, TypeError,
     "_masked_merge_backward: destination must be int64, got float32"),
    ("_merge_backward", (X, SOURCE), {"size": _randn(2, 9)}, ValueError,
     "_merge_backward: size must be [B, N] = [2, 12], got a tensor of shape [2, 9]"),
    ("_unmerge_backward", (X, SOURCE, 3), {}, ValueError,
     "_unmerge_backward: source must have the tokens of grad (9), got 12"),
    ("_masked_softmax_backward", (_randn(2, 3, 9, 8), SCORES, IMPORTANCE), {}, ValueError,
     "_masked_softmax_backward: grad must be [B, H, N, N] = [2, 3, 9, 9], got a tensor of shape [2, 3, 9, 8]"),
    ("_attention_backward", (_randn(2, 3, 8, 4), QKV, QKV, QKV), {}, ValueError,
     "_attention_backward: grad_out must be [B, H, N, D] = [2, 3, 9, 4], got a tensor of shape [2, 3, 8, 4]"),
    ("_masked_attention_backward", (_randn(2, 3, 8, 4), QKV, QKV, QKV, IMPORTANCE), {}, ValueError,
     "_masked_attention_backward: grad_out must be [B, H, N, D] = [2, 3, 9, 4], got a tensor of shape [2, 3, 8, 4]"),
]  # fmt: skip


def _on(device: str, value: Any) -> Any:
    return value(device) if callable(value) else value


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "error", "message"), WRONG, ids=[f"{w[0]}-{i}" for i, w in enumerate(WRONG)]
)
def test_wrong_input_is_named(
    op: str, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    calls: list[tuple[Callable[..., Any], str]] = [(target.call, target.device) for target in targets(op)]
    dispatched = getattr(torch.ops.tokcomp, op)
    calls += [(dispatched, device) for device in ("cpu", "meta", *(["cuda"] if torch.cuda.is_available() else []))]
    for call, device in calls:
        with pytest.raises(error) as refusal:
            call(*(_on(device, value) for value in args), **{name: _on(device, v) for name, v in kwargs.items()})
        assert message in str(refusal.value)


def test_devices_must_agree() -> None:
    x, importance = torch.randn(2, 9, 4), torch.randn(2, 9, device="meta")
    for call in (torch.ops.tokcomp.prune_merge, REFERENCES["prune_merge"]):
        with pytest.raises(ValueError, match=r"importance must be on the device of x \(cpu\), got meta"):
            call(x, importance, 5, 3)
    counts = torch.ones(2, dtype=torch.int64, device="meta")
    for call in (torch.ops.tokcomp.masked_merge, REFERENCES["masked_merge"]):
        with pytest.raises(ValueError, match=r"counts must be on the device of x \(cpu\), got meta"):
            call(x, torch.randn(2, 9), torch.ones(2, 9), counts)


NOT_DENSE = {
    "sparse": (torch.Tensor.to_sparse, "be a dense tensor, got one of layout sparse_coo; call .to_dense()"),
    "sparse rows": (lambda x: x.reshape(-1, 9).to_sparse_csr(), "be a dense tensor, got one of layout sparse_csr"),
    "mkldnn": (torch.Tensor.to_mkldnn, "be a dense tensor, got one of layout mkldnn; call .to_dense()"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "be one dense tensor, got a nested tensor"),
    "jagged": (
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        "be one dense tensor, got a nested tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("op", NAMES)
def test_what_is_not_dense_is_named(op: str, kind: str) -> None:
    """The first tensor of every operator, and prune_merge's others; with and without a gradient."""
    convert, message = NOT_DENSE[kind]
    sample = next(samples(op, torch.float32))
    schema = getattr(torch.ops.tokcomp, op).default._schema.arguments
    tensors = [
        i for i, value in enumerate(sample.args) if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]
    for i in tensors if op == "prune_merge" else tensors[:1]:
        for grad in (False, True):
            args = list(sample.args)
            args[i] = convert(torch.rand(2, 9, 9))
            if grad and schema[i].name in BY_NAME[op].differentiable and kind == "sparse":
                args[i].requires_grad_()
            with pytest.raises(TypeError, match=re.escape(f"{op}: {schema[i].name} must {message}")):
                getattr(torch.ops.tokcomp, op)(*args, **sample.kwargs)


def test_what_was_right_once_is_not_checked_again_and_wrong_input_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels import _checked, _checks

    asked = []

    def check(*args: object, **kwargs: object) -> None:
        asked.append(args)
        _checks.check_attention(*args, **kwargs)

    monkeypatch.setattr(_checked, "check_of", lambda name: check)
    monkeypatch.setattr(_checked, "_REMEMBERED", 2)

    @_checked.checked
    def attention_reference(q: object, k: object, v: object, **options: object) -> str:
        return "ran"

    one, q = torch.ones(2, 9), torch.ones(2, 3, 9, 4)
    attention_reference(q, q, q, size=one)
    attention_reference(q * 2, q, q, size=one * 3)
    assert len(asked) == 1
    for wrong in ({"size": one[:1]}, {"size": one.long()}, {"size": one.to("meta")}):
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match="attention: size must"):
                attention_reference(q, q, q, **wrong)
    for dtype in (torch.float64, torch.bfloat16, torch.float64):  # more kinds than are remembered
        attention_reference(*[q.to(dtype)] * 3)
    assert len(asked) == 1 + 6 + 3


@pytest.mark.parametrize("op", NAMES)
def test_float64_is_refused_by_the_triton_kernel(op: str) -> None:
    """Which the dispatcher therefore does not ask."""
    pytest.importorskip("triton")
    sample = next(samples(op, torch.float64))
    name = "attention" if op == "_attention_heads" else op  # whose kernel it is
    words = rf"^{name}: \w+ must be float16, bfloat16 or float32 for the Triton kernel, got float64"
    with pytest.raises(TypeError, match=words):
        IMPLEMENTATIONS[op]._launch_triton(*sample.args, **sample.kwargs)


def test_every_public_operator_is_in_the_table() -> None:
    from tokcomp_kernels._schema import OPERATORS

    assert {operator.name for operator in OPERATORS} == {wrong[0] for wrong in WRONG}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30, -1.0, 0.0])
@pytest.mark.parametrize(
    "target", [t for op in ("prune_merge", "tome_merge", "class_attention_sort", "masked_merge") for t in targets(op)]
)
def test_any_value_is_survived(target: Target, value: float) -> None:
    """Sizes stay above zero and finite indices come out, whatever goes in."""
    x, poison = torch.randn(2, 33, 16, device=target.device), torch.full((2, 33), value, device=target.device)
    x[:, 7] = value
    if target.op == "class_attention_sort":
        heads = x.reshape(2, 33, 4, 4).transpose(1, 2)
        order = target.call(heads[:, :, 0], heads, poison)[1]
        assert torch.equal(order.sort(1).values, torch.arange(33, device=target.device).expand(2, -1))
        return
    if target.op == "masked_merge":
        counts = torch.tensor([30, 20], device=target.device)
        least = None if value != value else value
        for mask in (poison, torch.ones_like(poison)):
            _, size, rank, destination = target.call(x, poison, mask, counts, size=poison, min_weighted_size=least)
            assert bool((size > 0).all())
            assert torch.equal(rank.sort(1).values, torch.arange(33, device=target.device).expand(2, -1))
            assert bool(((destination >= 0) & (destination < 33)).all())
        return
    if target.op == "prune_merge":
        _, size, source = target.call(x, poison, 30, 20, size=poison)
    else:
        _, size, source = target.call(x, x, 9, size=poison)
    assert bool((size > 0).all())
    assert bool(((source >= -1) & (source < size.shape[1])).all())
