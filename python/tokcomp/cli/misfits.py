"""--checkpoint: loading weights into a model, and finding the options for a model that was built differently."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import isqrt
from typing import Any

from tokcomp.cli.errors import UserError

#: A checkpoint's parameter that the model lacks -> what that means, and the option that adds it.
_EXTRAS = {
    "fc_norm.weight": ("its norm comes after pooling (fc_norm), as in average-pooled models", "--gp avg"),
    "norm_pre.weight": ("it has a norm before the blocks", "--model-kwargs pre_norm=True"),
    "blocks.0.ls1.gamma": ("it has LayerScale", "--model-kwargs init_values=1e-5"),
    "blocks.0.attn.q_norm.weight": ("it has norms of q and k", "--model-kwargs qk_norm=True"),
}


def load_checkpoint(args: argparse.Namespace, model: Any) -> None:
    """Load ``--checkpoint`` into the model that the options built; if it was built differently, name its options."""
    from tokcomp.adaptformer import is_saved
    from tokcomp.cli.weights import load_weights, read_weights

    if is_saved(args.checkpoint):
        raise UserError(
            f"--checkpoint must have a model's weights, got AdaptFormer branches in '{args.checkpoint}'; pass that "
            "file as --adapter, and the weights that they were trained on"
        )
    try:
        load_weights(model, args.checkpoint)
    except RuntimeError as error:  # tensors, but not this model's
        cures = misfits(model, read_weights(args.checkpoint))
        if not cures:
            raise _refusal(args, error) from error
        why = ", ".join(reason for reason, _ in cures)
        flags = " ".join(_joined([flag for _, flag in cures]))
        raise UserError(
            f"--checkpoint '{args.checkpoint}' does not fit {args.model} as it was built: {why}; add {flags}"
        ) from error
    except Exception as error:
        raise _refusal(args, error) from error


def _refusal(args: argparse.Namespace, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"--checkpoint '{args.checkpoint}' does not fit {args.model}: {reason}")


def misfits(model: Any, weights: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ``weights`` reveal about their model where it differs from ``model``, each with the option for it.

    Nothing if they have another width, and so belong to another model altogether.
    """
    own = model.state_dict()
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in weights.items()}
    projection = "patch_embed.proj.weight"
    if projection not in own or shapes.get(projection) != tuple(own[projection].shape):
        return []
    found = [cure for name, cure in _EXTRAS.items() if name in shapes and name not in own]
    if "norm.weight" in shapes and "fc_norm.weight" in own and "fc_norm.weight" not in shapes:
        found.append(("its norm comes before pooling (norm)", "--gp token"))
    head = shapes.get("head.weight")
    if head and (head[0] != model.num_classes):
        found.append((f"it has {head[0]} classes", f"--num-classes {head[0]}"))
    if "cls_token" in own and "cls_token" not in shapes:
        found.append(("it has no class token", "--model-kwargs class_token=False"))
    if "reg_token" in shapes and "reg_token" not in own:
        count = shapes["reg_token"][1]
        found.append((f"it has {count} registers", f"--model-kwargs reg_tokens={count}"))
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    if hasattr(model, "blocks") and depth not in (0, len(model.blocks)):
        found.append((f"it has {depth} blocks", f"--model-kwargs depth={depth}"))
    side = _image_side(model, shapes.get("pos_embed"))
    if side is not None and (side, side) != tuple(model.patch_embed.img_size):
        found.append((f"it is for images of {side} x {side}", f"--img-size {side}"))
    return found


def _image_side(model: Any, shape: tuple[int, ...] | None) -> int | None:
    """The side of the square images that position embeddings [1, N, C] are for; None if that is unknown."""
    embed = getattr(model, "pos_embed", None)
    grid = getattr(model.patch_embed, "grid_size", None)
    if shape is None or len(shape) != 3 or embed is None or grid is None:
        return None
    patches = shape[1] - (embed.shape[1] - grid[0] * grid[1])
    if patches < 1 or isqrt(patches) ** 2 != patches:
        return None
    return isqrt(patches) * int(model.patch_embed.patch_size[0])


def _joined(flags: list[str]) -> list[str]:
    """The options, with --model-kwargs only once."""
    marker = "--model-kwargs "
    settings = [flag.removeprefix(marker) for flag in flags if flag.startswith(marker)]
    others = [flag for flag in flags if not flag.startswith(marker)]
    return others + ([marker + " ".join(settings)] if settings else [])
