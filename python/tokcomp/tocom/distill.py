"""Training a plugin by self-distillation: one optimizer step (ToCom, Eq. 8-9, Alg. 1; by labels: Table 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.twins import twin_model
from tokcomp.api import compress
from tokcomp.methods import Method
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.recipe import LearningRate, Recipe, Targets, make_optimizer, soft_cross_entropy
from tokcomp.runs.steps import DEGREES, MODEL, derived_seed, seed_all
from tokcomp.tocom.layers import modules_of, projections_of
from tokcomp.tocom.plugin import ToCom
from tokcomp.tocom.variants import LOSSES
from tokcomp_kernels.product_types import autocast


def draw_degrees(seed: int, step: int, degrees: Sequence[int]) -> tuple[int, int]:
    """The teacher's and the student's degree of a step: two different ones, every pair as likely as any other."""
    draw = np.random.default_rng(derived_seed(seed, DEGREES, step))
    teacher = int(draw.integers(len(degrees)))
    student = int(draw.integers(len(degrees) - 1))
    return degrees[teacher], degrees[student + (student >= teacher)]


def distillation_loss(student: Tensor, teacher: Tensor, *, headless: bool) -> Tensor:
    """Mean over the batch of KL(teacher || student) for logits [b, classes]; L1 for features [b, C] without a head."""
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    if headless:
        return F.l1_loss(student, teacher)
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


class Distiller:
    """A plugin in training on a frozen model, the optimizer, and the number of steps done.

    In each step the teacher is the model at a random degree m, the student the model at another degree n with the
    plugin applied from m to n. What a step draws depends only on (seed, step), so :meth:`state` is all that a run needs
    to continue as if it had not been stopped.

    Args:
        model: a timm model; moved to ``device`` and frozen, otherwise left as it is.
        plugin: the plugin to train; moved to ``device``. If its ``method`` is None, it is set to that of the degrees.
        method_at: gives the method of a degree.
        recipe: optimizer, learning rate, mixup; drop path belongs to the model and acts on the student. Its smoothing
            is of labels.
        total_steps: steps of the whole run, over which the learning rate is scheduled.
        steps_per_epoch: for the recipe's warm-up, which is in epochs.
        device: the device to train on.
        scale: the plugin's scale, s in Eq. 5.
        seed: seeds the degrees, mixing and drop path.
        world: the processes that share each batch; gradients are their mean.
        pieces: number of parts in which a process's share of a batch is computed; their gradients are added up.
        amp_dtype: run under autocast with this type, float32 or bfloat16.
        call: what is asked of a twin of the model for images, such as its feature maps; by default its forward.
        read: turns the model's output into the logits [..., classes] to compare, such as a dense model's head; by
            default as the model's family does. With it the loss is KL whether or not the model has a classifier.
        loss: "distillation", or "labels": the student's cross entropy with labels, without a teacher; for a model with
            a classifier, and without ``read``.

    Raises:
        TypeError, ValueError: the plugin, a degree's method, the recipe or the loss does not fit, or ``amp_dtype`` is
            float16.
    """

    def __init__(
        self,
        model: nn.Module,
        plugin: ToCom,
        method_at: Callable[[int], Method],
        recipe: Recipe,
        *,
        total_steps: int,
        steps_per_epoch: int,
        device: torch.device,
        scale: float = 0.1,
        seed: int = 0,
        world: World = ALONE,
        pieces: int = 1,
        amp_dtype: torch.dtype | None = None,
        call: Callable[[nn.Module, Tensor], Any] | None = None,
        read: Callable[[Any], Tensor] | None = None,
        loss: str = "distillation",
    ) -> None:
        if amp_dtype == torch.float16:
            raise ValueError("mixed precision must be in bfloat16 here, got float16")
        adapter, projections = projections_of(model)
        modules, num_classes = modules_of(projections), adapter.num_classes(model)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if loss == "labels" and (num_classes < 1 or read is not None):
            raise ValueError("loss must be 'distillation' for answers that are not a classifier's, got 'labels'")
        self.degrees = list(range(plugin.max_degree + 1))
        self.plugin = plugin.to(device)
        model.to(device).eval().requires_grad_(False)
        self._methods = {degree: method_at(degree) for degree in self.degrees}
        names = {method.name for method in self._methods.values()}
        if plugin.method is None and len(names) == 1:
            plugin.method = names.pop()
        # Twins share the model's parameters and their packed copies, so changing degrees costs nothing.
        self.models = {
            degree: compress(twin_model(model, modules)[0], method).eval() for degree, method in self._methods.items()
        }
        for twin in self.models.values():
            with plugin.applied(twin, 0, plugin.max_degree, scale):
                pass
        self.recipe, self.device, self.world, self.scale, self.seed = recipe, device, world, scale, seed
        self.step_number = 0
        self.learning_rate = 0.0  # of the last step
        self.drawn = (0, 0)  # degrees of the last step: teacher's, student's
        self.headless = num_classes < 1 and read is None
        self._call: Callable[[nn.Module, Tensor], Any] = call or (lambda twin, images: twin(images))
        self._read, self._by_labels = read or adapter.logits, loss == "labels"
        self.parameters = list(plugin.parameters())
        self.optimizer = make_optimizer(recipe, self.parameters)
        self._rate = LearningRate(recipe, self.optimizer, total_steps, steps_per_epoch)
        self._targets = Targets(recipe, max(num_classes, 1), seed)
        self._pieces, self._amp_dtype = pieces, amp_dtype

    def method(self, degree: int) -> Method:
        """The method that ``degree`` stands for."""
        return self._methods[degree]

    def step(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """One optimizer step.

        Args:
            images: [b, 3, H, W], normalized: this process's share of the batch, piece after piece; mixed in place.
            labels: [b] their classes, which only the loss by labels reads.

        Returns:
            The loss of this process's share before the step: 0-dim, on the device, without synchronizing.

        Raises:
            ValueError: the loss is by labels, and there are none.
        """
        if self._by_labels and labels is None:
            raise ValueError("labels must be given, one per image, for the loss by labels; got None")
        self.learning_rate = self._rate.set(self.step_number)
        self.drawn = source, target = draw_degrees(self.seed, self.step_number, self.degrees)
        parts, targets = self._mixed(images, labels)
        answers = targets if self._by_labels else self._teach(parts, source)
        self.optimizer.zero_grad(set_to_none=True)
        student = self.models[target].train()
        losses = []
        with self.plugin.applied(student, source, target, self.scale):
            for number, (part, answer) in enumerate(zip(parts, answers, strict=True)):
                seed_all(self.seed, MODEL, self.step_number, self.world.rank * self._pieces + number)
                with self._autocast():
                    found = self._read(self._call(student, part))
                if self._by_labels:
                    loss = soft_cross_entropy(found, answer)
                else:
                    loss = distillation_loss(found, answer, headless=self.headless)
                (loss / len(parts)).backward()
                losses.append(loss.detach())
        student.eval()
        self._share_gradients()
        if self.recipe.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_grad)
        self.optimizer.step()
        self.step_number += 1
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _teach(self, parts: Sequence[Tensor], degree: int) -> list[Tensor]:
        with self._autocast():
            return [self._read(self._call(self.models[degree], part)) for part in parts]

    def _mixed(self, images: Tensor, labels: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """The pieces' images, mixed, and their soft targets [b, classes]."""
        if labels is None or not self._by_labels:  # what is distilled has none, or others: a segmenter's are masks
            labels = torch.zeros(len(images), dtype=torch.int64)
        parts, targets = [], []
        for part, classes in zip(images.chunk(self._pieces), labels.chunk(self._pieces), strict=True):
            part, classes = (one.to(self.device, non_blocking=True) for one in (part, classes))
            part, target = self._targets(part, classes, self.step_number)
            parts.append(part)
            targets.append(target)
        return parts, targets

    def _share_gradients(self) -> None:
        """The mean over the processes, in one exchange."""
        if self.world.size == 1:
            return
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = self.world.mean_(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def is_finite(self) -> bool:
        """Whether every number in the plugin is finite; waits for the device."""
        return bool(torch.stack([parameter.detach().isfinite().all() for parameter in self.parameters]).all())

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the settings."""
        return {
            "step": self.step_number,
            "plugin": self.plugin.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            ValueError: it is the state of another plugin or optimizer.
        """
        try:
            self.plugin.load_state_dict(state["plugin"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the state must be of the same plugin and optimizer, got another's: {error}") from error
        self.step_number = state["step"]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device.type, self._amp_dtype)
