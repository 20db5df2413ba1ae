"""The one table of operators: name, schema, which inputs have a gradient, and a line of documentation.

Everything that needs a list of operators reads this one: the Python registration, the C++ library's generated
``TORCH_LIBRARY`` block (CMake runs this file as a script), the tests that demand a sample of each, docs/operators.md
(``tools/operators_page.py``) and ``tokcomp info``. This module imports nothing but the standard library, so a build can
read it before torch is there.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

NAMESPACE = "tokcomp"
#: Namespaces under which a compiled kernel can be called directly, whoever owns the operator: dispatch key ->
#: namespace.
NATIVE_NAMESPACES = {"CPU": "tokcomp_cpu", "CUDA": "tokcomp_cuda"}
#: Namespace to which compiled code above the kernels hands over what takes Python: gradients and the reference.
PYTHON_NAMESPACE = "tokcomp_python"


@dataclass(frozen=True)
class Operator:
    """One operator. ``signature`` follows the name in the schema; a leading underscore marks a backward
    pass, or another step that models take and users need not.

    ``native`` says whether it has a compiled CPU kernel; without, PyTorch's own operators make it up. All have
    Triton's. ``file`` names its file in every folder, the reference's too, where that is not the operator's own name.
    """

    name: str
    signature: str
    doc: str
    differentiable: tuple[str, ...] = ()
    backward: str | None = None
    native: bool = True
    file: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", self.file or self.stem)

    @property
    def stem(self) -> str:
        """What its functions are called: ``<stem>_reference``, ``<stem>_triton``."""
        return self.name.lstrip("_")

    @property
    def schema(self) -> str:
        return self.name + self.signature

    @property
    def public(self) -> bool:
        return not self.name.startswith("_")


OPERATORS: tuple[Operator, ...] = (
    Operator(
        "class_attention_sort",
        "(Tensor q_cls, Tensor k, Tensor? size=None, float? scale=None, int num_prefix_tokens=1)"
        " -> (Tensor cls_attn, Tensor token_order)",
        "Class-token attention averaged over heads, and the tokens in its descending order.",
    ),
    Operator(
        "prune_merge",
        "(Tensor x, Tensor importance, int num_prune_kept, int num_merge_kept, *, Tensor? size=None,"
        " int num_prefix_tokens=1, bool similarity_weighted_size=True) -> (Tensor x, Tensor size, Tensor source)",
        "Keep the most important tokens, merge the next ones into their most similar kept token, drop the rest.",
        differentiable=("x",),
        backward="_merge_backward",
    ),
    Operator(
        "masked_softmax",
        "(Tensor scores, Tensor token_mask, float eps=1e-06) -> Tensor",
        "Softmax in which masked tokens are invisible to all but themselves, with a gradient to the mask.",
        differentiable=("scores", "token_mask"),
        backward="_masked_softmax_backward",
    ),
    Operator(
        "masked_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor token_mask, *, Tensor? size=None, float? scale=None, float eps=1e-06)"
        " -> (Tensor out, Tensor cls_attn)",
        "Proportional attention with masked_softmax inside, without the [B, H, N, N] map.",
        differentiable=("q", "k", "v", "token_mask"),
        backward="_masked_attention_backward",
    ),
    Operator(
        "attention",
        "(Tensor q, Tensor k, Tensor v, *, Tensor? size=None, float? scale=None) -> (Tensor out, Tensor cls_attn)",
        "Proportional attention that also returns the class token's row.",
        differentiable=("q", "k", "v"),
        backward="_attention_backward",
    ),
    Operator(
        "attention_received",
        "(Tensor q, Tensor k, *, Tensor? size=None, float? scale=None, int num_prefix_tokens=0) -> Tensor",
        "The attention that each token receives: importance for a model without a class token.",
    ),
    Operator(
        "tome_merge",
        "(Tensor x, Tensor metric, int r, *, Tensor? size=None, int num_prefix_tokens=1)"
        " -> (Tensor x, Tensor size, Tensor source)",
        "ToMe's bipartite soft matching: the r most similar pairs become size-weighted means.",
        differentiable=("x",),
        backward="_merge_backward",
    ),
    Operator(
        "bipartite_merge",
        "(Tensor x, Tensor metric, Tensor role, int r, *, Tensor? size=None, str average='size', float? threshold=None)"
        " -> (Tensor x, Tensor size, Tensor source)",
        "Merge sources into their most similar destinations, which the caller names token by token.",
        differentiable=("x",),
        backward="_merge_backward",
    ),
    Operator(
        "select_diverse",
        "(Tensor features, int num_kept, *, Tensor? relevance=None, int num_prefix_tokens=1, str rule='farthest')"
        " -> Tensor",
        "Choose tokens one by one, each unlike those chosen before: farthest points, or a determinantal process.",
    ),
    Operator(
        "unmerge",
        "(Tensor x, Tensor source, *, Tensor? pruned_fill=None) -> Tensor",
        "Give every original position the token its patch went into.",
        differentiable=("x", "pruned_fill"),
        backward="_unmerge_backward",
    ),
    Operator(
        "masked_merge",
        "(Tensor x, Tensor importance, Tensor token_mask, Tensor counts, *, Tensor? size=None, int num_prefix_tokens=1,"
        " bool similarity_weighted_size=True, float? min_weighted_size=None)"
        " -> (Tensor x, Tensor size, Tensor rank, Tensor destination)",
        "prune_merge's merge in place, for a search that drops nothing: a mask and counts that stay on the device.",
        differentiable=("x",),
        backward="_masked_merge_backward",
    ),
    Operator(
        "prune_merge_norm",
        "(Tensor x, Tensor branch, Tensor importance, int num_prune_kept, int num_merge_kept, Tensor? weight=None,"
        " Tensor? bias=None, *, Tensor? size=None, int num_prefix_tokens=1, bool similarity_weighted_size=True,"
        " float norm_eps=1e-06) -> (Tensor x, Tensor normalized, Tensor size, Tensor source)",
        "prune_merge of x + branch, and the LayerNorm of what is left: all that lies between two matrix products.",
        differentiable=("x", "branch", "weight", "bias"),
    ),
    Operator(
        "add_layer_norm",
        "(Tensor x, Tensor branch, Tensor? weight=None, Tensor? bias=None, float norm_eps=1e-06)"
        " -> (Tensor x, Tensor normalized)",
        "x + branch, and its LayerNorm.",
        differentiable=("x", "branch", "weight", "bias"),
    ),
    Operator(
        "linear_gelu",
        "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
        "A linear layer and the exact (erf) GELU after it.",
        differentiable=("x", "weight", "bias"),
        native=False,
    ),
    Operator(
        "_merge_backward",
        "(Tensor grad, Tensor source, Tensor? size=None) -> Tensor",
        "Gradient of prune_merge (no size) and tome_merge (size): grad [B, M, C], source [B, N] -> [B, N, C].",
    ),
    Operator(
        "_unmerge_backward",
        "(Tensor grad, Tensor source, int num_tokens) -> Tensor",
        "Gradient of unmerge in x, the sum over each group: grad [B, N, C] -> [B, num_tokens, C].",
        file="unmerge",
    ),
    Operator(
        "_masked_softmax_backward",
        "(Tensor grad, Tensor scores, Tensor token_mask, float eps=1e-06)"
        " -> (Tensor grad_scores, Tensor grad_token_mask)",
        "Gradient of masked_softmax in scores and token_mask.",
        file="masked_softmax",
    ),
    Operator(
        "_masked_attention_backward",
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor token_mask, *, Tensor? size=None, float? scale=None,"
        " float eps=1e-06) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_token_mask)",
        "Gradient of masked_attention in q, k, v and token_mask; recomputes each row.",
    ),
    Operator(
        "_attention_heads",
        "(Tensor q, Tensor k, Tensor v, *, Tensor? size=None, float? scale=None) -> (Tensor out, Tensor cls_attn)",
        "attention whose class row is left by heads, [B, H, N], for prune_merge_norm to average; inference alone.",
        native=False,
        file="attention",
    ),
    Operator(
        "_embed_patches",
        "(Tensor images, Tensor weight, Tensor? bias, Tensor position, Tensor? prefix, Tensor? norm_weight=None,"
        " Tensor? norm_bias=None, float norm_eps=1e-06) -> (Tensor x, Tensor normalized)",
        "What enters a ViT's first block: prefix tokens, embedded patches, their positions added; and its LayerNorm;"
        " inference alone.",
        native=False,
    ),
    Operator(
        "_attention_backward",
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, *, Tensor? size=None, float? scale=None)"
        " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
        "Gradient of attention in q, k and v; recomputes each row.",
    ),
    Operator(
        "_masked_merge_backward",
        "(Tensor grad, Tensor destination) -> Tensor",
        "Gradient of masked_merge: grad [B, N, C], destination [B, N] -> [B, N, C]; a destination outside 0 .. N - 1"
        " counts as the token itself.",
    ),
)

BY_NAME = {operator.name: operator for operator in OPERATORS}


def cpp_definitions() -> str:
    """C++ source that defines every schema: the LibTorch library compiles it, Python registers the same table."""
    lines = ["// Generated from tokcomp_kernels/_schema.py.", "#include <torch/library.h>", ""]
    for namespace in (NAMESPACE, *NATIVE_NAMESPACES.values()):
        lines.append(f"TORCH_LIBRARY({namespace}, m) {{")
        lines += [f'  m.def("{operator.schema}");' for operator in OPERATORS]
        lines.append("}")
    return "\n".join(lines) + "\n"


def digest() -> str:
    """Of every schema: what compiled kernels were built for, and must not be loaded for anything else."""
    return hashlib.sha256(cpp_definitions().encode()).hexdigest()[:16]


if __name__ == "__main__":
    print(digest() if sys.argv[1:] == ["--digest"] else cpp_definitions(), end="")
