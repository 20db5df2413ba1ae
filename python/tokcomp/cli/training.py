"""What the commands that train share: their options, this process's place in the run, and the run from start to end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokcomp.cli import options
from tokcomp.cli.errors import RunFailed, UserError, blame, check_output_folder
from tokcomp.runs.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

    from tokcomp.runs.batches import LoaderBatches
    from tokcomp.runs.distributed import World
    from tokcomp.runs.loop import Run
    from tokcomp.runs.steps import StopRequest

R = TypeVar("R", bound="Run")

#: field of the recipe -> (its parser, its help); the options' names are timm's.
_RECIPE_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "epochs": (options.positive_float, "passes over the training images"),
    "opt": (str, "optimizer, by timm's name"),
    "lr": (options.positive_float, "highest learning rate"),
    "min_lr": (options.non_negative_float, "learning rate of the last step; a hundredth of --lr if --lr is below it"),
    "sched": (str, "learning rate scheduler, by timm's name"),
    "warmup_epochs": (options.non_negative_float, "epochs in which the learning rate rises"),
    "warmup_lr": (options.non_negative_float, "learning rate at the start of the warm-up"),
    "weight_decay": (options.non_negative_float, "weight decay, which biases and norms do not get"),
    "clip_grad": (options.positive_float, "maximum norm of the gradient; larger gradients are scaled down to it"),
    "aa": (str, "augmentation policy, by timm's name, or none"),
    "hflip": (options.non_negative_float, "probability that an image is mirrored"),
    "color_jitter": (options.non_negative_float, "strength of colour jitter, used if --aa is none"),
    "train_interpolation": (str, "how training images are resized"),
    "reprob": (options.non_negative_float, "probability of random erasing"),
    "repeated_aug": (options.positive_int, "copies of an image in a row, each augmented separately"),
    "smoothing": (options.non_negative_float, "label smoothing"),
    "mixup": (options.non_negative_float, "alpha of mixup; 0 disables it"),
    "cutmix": (options.non_negative_float, "alpha of cutmix; 0 disables it"),
    "drop_path": (options.non_negative_float, "stochastic depth: probability of dropping the last block's branches"),
    "backbone_lr_scale": (
        options.positive_float,
        "factor on the learning rate of all but a trained method's own parts, such as DynamicViT's predictors; their "
        "authors take 0.01, at an --lr of 1e-3 or so",
    ),
    "frozen_epochs": (
        options.non_negative_float,
        "epochs, from the first on, in which only those parts learn; DynamicViT's and SPViT's authors take 5",
    ),
    "model_ema_decay": (options.positive_float, "keep a moving average of the weights with this decay"),
}
_FLAGS = {"repeated_aug": "--aug-repeats"}
#: Fields without effect on the digits, which are drawn anew each time, and the values that the recipe then gets.
_AUGMENTATION = ("aa", "scale", "ratio", "hflip", "color_jitter", "train_interpolation", "reprob")
_NO_AUGMENTATION = {"aa": None, "hflip": 0.0, "color_jitter": 0.0, "reprob": 0.0}


def _flag(field: str) -> str:
    return _FLAGS.get(field, "--" + field.replace("_", "-"))


# ---- options


def add_recipe_options(
    group: Any,
    fields: Iterable[str],
    *recipes: Recipe,
    says: Mapping[str, str] | None = None,
    defaults: Mapping[str, str] | None = None,
) -> None:
    """Options for fields of the recipe, and the seed; the help states each recipe's default.

    Args:
        group: the group to add them to.
        fields: the fields.
        recipes: the recipes whose defaults to state.
        says: field -> its help, if not the usual one.
        defaults: field -> its default, if not the recipes'.
    """
    for field in fields:
        kind, text = _RECIPE_OPTIONS[field]
        values = ["none" if value is None else str(value) for value in (getattr(one, field) for one in recipes)]
        default = (defaults or {}).get(field) or "; ".join(dict.fromkeys(values))
        text = (says or {}).get(field, text)
        group.add_argument(_flag(field), type=kind, dest=field, metavar="X", help=f"{text} (default: {default})")
    group.add_argument(
        "--seed",
        type=options.non_negative_int,
        default=0,
        metavar="N",
        help="seed for everything random: order, augmentation, mixing, drop path (default: %(default)s)",
    )


def add_speed_options(parser: argparse.ArgumentParser, *, amp_on_gpu: bool = False, checkpointing: bool = True) -> Any:
    """Options for precision and memory; returns their group. ``amp_on_gpu``: --amp is the default on a GPU."""
    speed = parser.add_argument_group("precision, speed and memory")
    if amp_on_gpu:
        action: Any = argparse.BooleanOptionalAction
        speed.add_argument("--amp", action=action, help="automatic mixed precision in bfloat16 (default: on a GPU)")
    else:
        speed.add_argument("--amp", action="store_true", help="automatic mixed precision in bfloat16")
    if checkpointing:
        text = "recompute each block in the backward pass to save memory"
        speed.add_argument("--grad-checkpointing", action="store_true", help=text)
    speed.add_argument(
        "--grad-accum-steps",
        type=options.positive_int,
        default=1,
        metavar="N",
        help="compute a process's part of the batch in N pieces to save memory (default: %(default)s)",
    )
    return speed


def add_output_options(parser: argparse.ArgumentParser, folder: str, **intervals: tuple[int, str]) -> Any:
    """Options for the folder, for resuming, and for how often things are written: name -> (steps, between what)."""
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(folder),
        metavar="DIR",
        help="folder for everything that the run writes (default: %(default)s)",
    )
    output.add_argument(
        "--resume", action="store_true", help="continue the run in the output folder, with all other options unchanged"
    )
    for name, (steps, text) in intervals.items():
        output.add_argument(
            f"--{name}-interval",
            type=options.positive_int,
            default=steps,
            metavar="N",
            help=f"steps between {text} (default: %(default)s)",
        )
    return output


def read_recipe(args: argparse.Namespace, base: Recipe, **more: Any) -> Recipe:
    """``base``, overridden by this run's fields ``more``, and both by those that the user gave."""
    given = {field: getattr(args, field, None) for field in ("batch_size", *_RECIPE_OPTIONS)}
    fields = {**more, **{field: value for field, value in given.items() if value is not None}}
    if fields.get("aa") in ("none", "None", ""):
        fields["aa"] = None
    if getattr(args, "dataset", None) == "digits":
        for field in _AUGMENTATION:
            if fields.get(field) is not None:
                raise UserError(
                    f"{_flag(field)} has no effect with --dataset digits, which are drawn anew each time; leave it out"
                )
        fields |= _NO_AUGMENTATION
    if fields.get("lr", base.lr) < base.min_lr:
        fields = {"min_lr": fields["lr"] / 100, **fields}
    with blame("recipe"):
        recipe = replace(base, **fields)
    if recipe.min_lr > recipe.lr:
        raise UserError(f"--min-lr must not be above --lr, got {recipe.min_lr:g} and {recipe.lr:g}")
    return recipe


# ---- the run


@dataclass(frozen=True)
class Job:
    """A command's options, and this process's place in its run."""

    args: argparse.Namespace
    device: torch.device
    world: World

    @property
    def pieces(self) -> int:
        pieces: int = self.args.grad_accum_steps
        return pieces

    @property
    def amp(self) -> str | None:
        """The name of the mixed-precision type."""
        wanted = self.device.type == "cuda" if self.args.amp is None else self.args.amp
        return getattr(self.args, "amp_dtype", "bfloat16") if wanted else None

    @property
    def amp_dtype(self) -> torch.dtype | None:
        import torch

        return None if self.amp is None else getattr(torch, self.amp)

    def begin(self, *, mixes: bool) -> None:
        """Refuse a batch that does not divide evenly, and seed the generator of random weights."""
        from tokcomp.runs.batches import check_batch_size
        from tokcomp.runs.steps import seed_all

        with blame("--batch-size"):
            check_batch_size(self.args.batch_size, self.world.size, self.pieces, mixes=mixes)
        seed_all(self.args.seed)

    def batches(self, dataset: Dataset[Any], **more: Any) -> LoaderBatches:
        """The batches to train on; ``more`` is :class:`LoaderBatches`' own."""
        from tokcomp.runs.batches import LoaderBatches

        shared: dict[str, Any] = {"world": self.world, "pieces": self.pieces, **self._loading}
        return LoaderBatches(dataset, self.args.batch_size, self.args.seed, **shared, **more)

    def held_out(self, dataset: Dataset[Any]) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
        """Starts a pass over this process's share of the images to validate on."""
        from tokcomp.runs.batches import held_out_batches

        share = max(1, self.args.batch_size // (self.world.size * self.pieces))
        return held_out_batches(dataset, min(share, 256), world=self.world, **self._loading)

    def settings(self, recipe: Recipe, *, data: str, train_images: int) -> dict[str, Any]:
        """The settings that a resumed run must share with its beginning."""
        return {
            "recipe": recipe.describe(),
            "seed": self.args.seed,
            "data": data,
            "train_images": train_images,
            "processes": self.world.size,
            "grad_accum_steps": self.pieces,
            "device": self.device.type,
            "amp": self.amp,
        }

    @property
    def place(self) -> dict[str, Any]:
        """Where and how a step is computed, as :class:`FineTuner` and :class:`Distiller` take it."""
        return {
            "device": self.device,
            "seed": self.args.seed,
            "world": self.world,
            "pieces": self.pieces,
            "amp_dtype": self.amp_dtype,
        }

    @property
    def intervals(self) -> dict[str, int]:
        """How often the run writes, as :class:`TrainingRun` takes it."""
        return {"checkpoint_steps": self.args.checkpoint_interval, "log_steps": self.args.log_interval}

    @property
    def _loading(self) -> dict[str, Any]:
        return {"workers": self.args.workers, "pin_memory": self.device.type == "cuda"}


def versions() -> dict[str, Any]:
    """What summaries say about the software."""
    from tokcomp.measure.info import package_versions

    found = package_versions()
    return {name: found[name] for name in ("tokcomp", "torch", "timm")}


def train(
    args: argparse.Namespace,
    prepare: Callable[[Job], R],
    report: Callable[[R], None],
    *,
    traces: Iterable[str] = (),
    then: Callable[[Job, R, StopRequest], bool] | None = None,
) -> int:
    """Prepare a run, run it until it ends or is stopped, report it, and return the exit status.

    Args:
        args: the options.
        prepare: makes the run; whatever can be refused is refused there, with nothing written.
        report: prints, in the main process, the outcome of a run that has reached its end.
        traces: further patterns of files that mark the output folder as holding a run.
        then: what follows the last step, in every process; returns whether it reached its own end.
    """
    from tokcomp.runs.loop import Run, check_free

    check_output_folder("--output", args.output)
    if not args.resume:
        with blame("--output"):
            check_free(args.output, (*Run.traces, *traces))
    with options.joined(args) as (device, world):
        return _to_its_end(Job(args, device, world), prepare, report, then)


def _to_its_end(
    job: Job,
    prepare: Callable[[Job], R],
    report: Callable[[R], None],
    then: Callable[[Job, R, StopRequest], bool] | None,
) -> int:
    from tokcomp.runs.checkpoint import CheckpointError
    from tokcomp.runs.steps import DivergedError, StopRequest

    args, run = job.args, prepare(job)
    with StopRequest() as stop:
        try:
            reached = run.train(stop, resumed=args.resume)
            finished = reached and (then is None or then(job, run, stop))
        except DivergedError as error:
            raise RunFailed(str(error)) from error
        except CheckpointError as error:
            raise UserError(f"{'--resume' if args.resume else '--output'}: {error}") from error
        except OSError as error:
            raise UserError(
                f"--output must be writable, got '{args.output}' ({error}); choose another folder"
            ) from error
    if run.world.is_main and finished:
        report(run)
    elif run.world.is_main and not reached:
        print(
            f"stopped after step {run.step_number} of {run.total_steps}; the same command with --resume continues from "
            "there",
            file=sys.stderr,
        )
    return 0 if finished else stop.exit_status or 1
