"""Evo-ViT's second classifier: of the class token, in the training of a model that averages its patches.

The model's own answer gives the class token no gradient but through the patches, and it is the class token's attention
that tokens are selected by. The second classifier is a part of the model while it is trained, so that the optimizer and
checkpoints of the run have it, and of no weights that come out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

NAME = "second_classifier"


class SecondClassifier(nn.Module):
    """Logits [B, classes] from the class token of the tokens x [B, N, C] that the last block has left.

    Args:
        width: C.
        num_classes: classes.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def attach(model: Any) -> SecondClassifier:
    """Give a timm model a new one, in place, drawn from torch's generator.

    Raises:
        ValueError: the model does not average its patches.
    """
    if model.global_pool != "avg":
        raise ValueError(
            f"second_weight must be 0 for a model that does not average its patches, got one with global_pool="
            f"{model.global_pool!r}; build it with global_pool='avg' (--gp avg), or leave the second classifier out"
        )
    weight = model.head.weight
    second = SecondClassifier(weight.shape[1], weight.shape[0]).to(weight.device, weight.dtype)
    model.add_module(NAME, second)
    return second


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without its tensors."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(f"{NAME}.")}
