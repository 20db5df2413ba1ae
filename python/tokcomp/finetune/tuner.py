"""Training a compressed model with its tokens really dropped: one optimizer step, and all that a step depends on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.api import compress
from tokcomp.fastpath.training import FastLinear
from tokcomp.finetune.objective import Objective
from tokcomp.learned import LEARNED
from tokcomp.methods import Method, PassageMethod
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.recipe import LearningRate, Recipe, Targets, make_optimizer, soft_cross_entropy
from tokcomp.runs.steps import MODEL, seed_all
from tokcomp_kernels.product_types import autocast


class FineTuner:
    """A model in training: its weights, their moving average, the optimizer, and the number of steps done.

    The model may be compressed (gradients go through pruning, merging and proportional attention) or plain. What a step
    draws depends only on (seed, step), so :meth:`state` is all that a run needs to continue as if it had not been
    stopped.

    Args:
        model: a timm model, compressed or not; it is moved to ``device`` and trained in place.
        recipe: optimizer, learning rate, mixup, label smoothing, gradient clipping, moving average.
        num_classes: classes of the targets.
        total_steps: steps of the whole run, over which the learning rate is scheduled.
        steps_per_epoch: for the recipe's warm-up, which is in epochs.
        device: the device to train on.
        seed: seeds mixing and drop path.
        world: the processes that share each batch; gradients are their mean.
        pieces: number of parts in which a process's share of a batch is computed; their gradients are added up. A run
            of W processes and P pieces draws the same as any other with the same W x P.
        amp_dtype: run under autocast with this type; gradients are scaled if it is float16.
        compiled: run the model through torch.compile.
        teacher: of a learned method (:class:`tokcomp.DynamicViT`, say), the plain model before its training, to which
            the method's losses compare; None: those losses are left out.
        fast_linear: on CPU in float32, compute linear layers through oneDNN rather than PyTorch's choice, unless blocks
            are recomputed.

    Raises:
        ValueError: the recipe names an optimizer or scheduler that timm does not know, or scales the rate of all but
            learned parts where there are none, or keeps all but them fixed; or float16 is used on a device other than
            CUDA; or there is a teacher, ``compiled`` or a second classifier where method or model takes none.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        num_classes: int,
        total_steps: int,
        steps_per_epoch: int,
        device: torch.device,
        seed: int = 0,
        world: World = ALONE,
        pieces: int = 1,
        amp_dtype: torch.dtype | None = None,
        compiled: bool = False,
        teacher: nn.Module | None = None,
        fast_linear: bool = True,
    ) -> None:
        if amp_dtype == torch.float16 and device.type != "cuda":
            raise ValueError(f"mixed precision in float16 must run on cuda, got {device.type}; use bfloat16")
        method = method_of(model)
        if teacher is not None and not isinstance(method, PassageMethod):
            raise ValueError(
                f"teacher must be None for a method whose losses compare with none, got {type(teacher).__name__}"
            )
        if compiled and isinstance(method, PassageMethod):
            raise ValueError(f"compiled must be False for {type(method).__name__}, whose losses watch the forward pass")
        self.model = model.to(device).train()
        #: What a learned method adds to the loss; None for another method.
        self.objective = None
        #: From which step on a training runs by which method; the last one started is the current.
        self._phases: list[tuple[int, Method]] = []
        self._current = method
        if isinstance(method, PassageMethod):
            self.objective = Objective(method, self.model, None if teacher is None else teacher.to(device))
            self._phases = [(round(share * total_steps), one) for share, one in method.phases()]
        self.recipe, self.device, self.world, self.amp_dtype = recipe, device, world, amp_dtype
        self.step_number = 0
        self.learning_rate = 0.0  # of the last step
        self.ema: Any = None
        if recipe.model_ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=recipe.model_ema_decay)
        parts = {name for name, _ in self.model.named_parameters() if LEARNED.keys() & set(name.split("."))}
        if recipe.backbone_lr_scale < 1 and not parts:
            raise ValueError(
                f"backbone_lr_scale must be 1 for a model without parts of a method, whose rate would be the full one, "
                f"got {recipe.backbone_lr_scale}; set lr alone"
            )
        if recipe.frozen_epochs and not parts:
            raise ValueError(
                f"frozen_epochs must be 0 for a model without parts of a method, which alone would learn in them, got "
                f"{recipe.frozen_epochs}"
            )
        self.optimizer = make_optimizer(recipe, self.model, parts)
        self._rate = LearningRate(recipe, self.optimizer, total_steps, steps_per_epoch)
        self._targets = Targets(recipe, num_classes, seed)
        self._scaler = torch.amp.GradScaler("cuda") if amp_dtype == torch.float16 else None
        self._seed, self._pieces = seed, pieces
        self._parallel: DistributedDataParallel | None = None
        if world.size > 1:
            self._parallel = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        runner: Any = self._parallel or self.model
        self._runner = torch.compile(runner) if compiled else runner
        recomputes = any(getattr(module, "grad_checkpointing", False) for module in self.model.modules())
        self._fast_linear = fast_linear and device.type == "cpu" and not (compiled or recomputes)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step.

        Args:
            images: [b, 3, H, W], normalized: this process's share of the batch, piece after piece; mixed in place.
            labels: [b] int64.

        Returns:
            The loss of this process's share before the step: 0-dim, on the device, without synchronizing.
        """
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._enter_phase()
        self.learning_rate = self._rate.set(self.step_number)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        parts = list(zip(images.chunk(self._pieces), labels.chunk(self._pieces), strict=True))
        for number, (part, answers) in enumerate(parts):
            part = part.to(self.device, non_blocking=True)
            answers = answers.to(self.device, non_blocking=True)
            mixed, targets = self.mix(part, answers)
            seed_all(self._seed, MODEL, self.step_number, self.world.rank * self._pieces + number)
            linear = FastLinear() if self._fast_linear else nullcontext()
            with self._held_back(number + 1 < len(parts)):
                with self._autocast(), linear:
                    logits, second, penalty = self._answer(mixed)
                loss = self.loss(logits, targets)
                if self.objective is not None and second is not None:
                    loss = torch.lerp(loss, self.loss(second, targets), self.objective.second_weight)
                loss = loss + penalty
                scaled = loss / len(parts)
                (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
            losses.append(loss.detach())
        if self.recipe.clip_grad is not None:
            if self._scaler is not None:
                self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip_grad)
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)
        self.step_number += 1
        return torch.stack(losses).mean()

    def _answer(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Logits of images [b, 3, H, W], a second classifier's, and what a method adds to their loss."""
        if self.objective is None:
            return self._runner(images), None, 0.0
        with self.objective.watching() as seen:
            logits = self._runner(images)
        return logits, self.objective.second(seen), self.objective(images, logits, seen)

    def _enter_phase(self) -> None:
        """Compress by the method of this step, where a training runs by more than one."""
        started = [method for start, method in self._phases if start <= self.step_number]
        if started and started[-1] is not self._current:
            adapter = find_adapter(self.model)
            compress(self.model, started[-1], "stock" if adapter.keeps_attention(self.model) else "tokcomp")
            self._current = started[-1]

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (overwritten) and labels [b] -> what the model gets, and its targets."""
        return self._targets(images, labels, self.step_number)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The quantity to minimise: 0-dim."""
        return soft_cross_entropy(logits, targets)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number; waits for the device."""
        return bool(torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all())

    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the settings."""
        return {
            "step": self.step_number,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            ValueError: it is the state of another model or recipe.
        """
        if (state["ema"] is None) != (self.ema is None) or (state["scaler"] is None) != (self._scaler is None):
            raise ValueError("the state must be of a run with the same recipe and precision, got another's")
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"the state must be of the same model and optimizer, got another's: {error}") from error
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        self.step_number = state["step"]

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device.type, self.amp_dtype)

    def _held_back(self, hold: bool) -> AbstractContextManager[Any]:
        """Exchange gradients only with the last piece."""
        return self._parallel.no_sync() if hold and self._parallel is not None else nullcontext()


def method_of(model: nn.Module) -> Method | None:
    """The method that a model is compressed by; None for a plain one, also of a family that is not understood."""
    try:
        return find_adapter(model).method(model)
    except UnsupportedModelError:
        return None
