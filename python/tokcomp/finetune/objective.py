"""What a method that acts between the blocks adds to the loss of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcomp.blocks.passages import watched_passages
from tokcomp.finetune import second_classifier
from tokcomp.methods import Answers, EvoViT, Passage, PassageMethod


class Seen(NamedTuple):
    """Of a forward pass in training."""

    passages: list[Passage]  # one
    tokens: list[Tensor]  # one, [b, N, C], that the model's last norm gave


class Objective:
    """The penalties of one method, the uncompressed model that some of them compare with, and a second classifier.

    Args:
        method: that the model is compressed by.
        model: in training, a timm model.
        teacher: the plain model before its training, left as it is; None: penalties that need one are left out.

    Raises:
        ValueError: there is a teacher that the method has no use for, or a second classifier that the model has none
            for.
    """

    def __init__(self, method: PassageMethod, model: nn.Module, teacher: nn.Module | None) -> None:
        if teacher is not None and not method.has_teacher:
            raise ValueError(f"teacher must be None for {type(method).__name__}, whose losses compare with none")
        self.method = method
        self._model: Any = model
        self._teacher: Any = None if teacher is None else teacher.eval().requires_grad_(False)
        #: Of the second classifier's loss; the rest is the answer's.
        self.second_weight = method.second_weight if isinstance(method, EvoViT) else 0.0
        self._second = second_classifier.attach(model) if self.second_weight else None

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """What the one forward pass in the ``with`` block leaves for the penalties."""
        tokens: list[Tensor] = []
        hook = self._model.norm.register_forward_hook(lambda module, given, out: tokens.append(out))
        try:
            with watched_passages() as passages:
                yield Seen(passages, tokens)
        finally:
            hook.remove()

    def second(self, seen: Seen) -> Tensor | None:
        """Logits [b, classes] of the second classifier; None if there is none."""
        return None if self._second is None else self._second(*seen.tokens)

    def __call__(self, images: Tensor, logits: Tensor, seen: Seen) -> Tensor:
        """The sum of the penalties: 0-dim, float32 or better.

        Args:
            images: [b, 3, H, W], as the model got them.
            logits: [b, classes], its answers.
            seen: of that forward pass.
        """
        ((passage,), (tokens,)) = seen
        taught = None
        if self._teacher is not None:
            with torch.no_grad():
                features = self._teacher.forward_features(images)
                taught = Answers(self._teacher.forward_head(features), features)
        found = self.method.penalties(passage, Answers(logits, tokens), taught)
        return torch.stack(list(found.values())).sum() if found else logits.new_zeros(())
