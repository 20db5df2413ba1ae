"""timm's CAFormer: every MetaFormer whose third stage is attention.

As in DiffRate (App. F) tokens are compressed in the third stage alone and spread over the full grid again at its end.
The stages before it are convolutions; the last one holds a few per cent of the multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models.metaformer import Attention, MetaFormer, MetaFormerBlock, MetaFormerStage, Pooling, SepConv
from torch import Tensor, nn

from tokcomp.adapters.base import Adapter, BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.blocks import CompressedAttention, CompressedBlock
from tokcomp.adapters.images import check_images
from tokcomp.adapters.layout import require
from tokcomp.adapters.projections import Projection, packed
from tokcomp.adapters.swap import original_class, restore_class, swap_class
from tokcomp.adapters.timm_caformer.modules import LAYOUT, CompressedStage, split_grid
from tokcomp.adapters.timm_caformer.search import check_search, run_search
from tokcomp.blocks.search import BlockSearch
from tokcomp.methods.base import Geometry, Method

#: The stage that is compressed, counted from 0.
STAGE = 2

#: Image side of timm's CAFormers, for a model that was built without a configuration.
_IMAGE_SIZE = (224, 224)

_MODEL_PARTS = ("stem", "stages", "head")
_STAGE_PARTS = ("downsample", "blocks", "grad_checkpointing")


class TimmCAFormer(Adapter):
    """Hierarchical models of timm's MetaFormer class with attention in the third stage."""

    family = "timm MetaFormer with attention in its third stage (CAFormer)"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, MetaFormer)

    def check(self, model: Any) -> None:
        name = type(model).__name__
        for method in ("forward", "forward_features"):
            if getattr(type(model), method) is not getattr(MetaFormer, method) or method in vars(model):
                raise UnsupportedModelError(f"{name} is not understood: it has a {method} of its own")
        _require_parts(model, _MODEL_PARTS, name)
        if len(model.stages) <= STAGE:
            raise UnsupportedModelError(
                f"{name} is not understood: it has {len(model.stages)} stages, and only the third one is compressed"
            )
        stage = model.stages[STAGE]
        require(stage, MetaFormerStage, _STAGE_PARTS, f"stages.{STAGE}")
        for index, block in enumerate(stage.blocks):
            name = f"stages.{STAGE}.blocks.{index}"
            require(block, MetaFormerBlock, ("token_mixer", "res_scale1", "res_scale2"), name)
            mixer = block.token_mixer
            if not isinstance(mixer, Attention):
                raise UnsupportedModelError(
                    f"{name}.token_mixer: {type(mixer).__name__} is not understood: it needs every token at its "
                    "place in the grid, and only attention runs on fewer (timm's caformer_* models)"
                )
            LAYOUT.check(block, MetaFormerBlock, Attention, name)

    def validate(self, model: nn.Module, method: Method) -> None:
        """Nothing: what follows the stage gets its full grid."""

    def geometry(self, model: Any) -> Geometry:
        blocks = model.stages[STAGE].blocks
        following = sum(len(stage.blocks) for stage in model.stages[STAGE + 1 :])
        return Geometry(
            len(blocks), 0, has_class_token=False, num_tokens=None, following_blocks=following, spreads_tokens=True
        )

    def num_tokens(self, model: Any) -> int:
        rows, columns = self.grid(model, *_image_size(model))
        return rows * columns

    def grid(self, model: Any, height: int, width: int) -> tuple[int, int]:
        return _grids(model, height, width)[STAGE]

    def cost(self, model: Any, img_size: tuple[int, int] | None = None) -> Cost:
        fixed = _linear_cost(model.head)
        grids = _grids(model, *(img_size or _image_size(model)))
        fixed += _linear_cost(model.stem) * grids[0][0] * grids[0][1]
        blocks: tuple[BlockCost, ...] = ()
        for index, (stage, (rows, columns)) in enumerate(zip(model.stages, grids, strict=True)):
            costs = tuple(_block_cost(block) for block in stage.blocks)
            positions = rows * columns
            fixed += _linear_cost(stage.downsample) * positions
            if index == STAGE:
                blocks = costs
            else:
                fixed += sum(
                    (cost.projections + cost.mlp) * positions + 2 * cost.width * positions**2 for cost in costs
                )
        return Cost(embed=0, blocks=blocks, head_per_token=0, head=fixed)

    def patch(self, model: Any, method: Method) -> None:
        stage = model.stages[STAGE]
        for block in stage.blocks:
            swap_class(block, CompressedBlock)
            swap_class(block.token_mixer, CompressedAttention)
        swap_class(stage, CompressedStage)
        stage._tokcomp_method = method

    def unpatch(self, model: Any) -> None:
        stage = _compressed_stage(model)
        if stage is None:
            return
        for block in stage.blocks:
            restore_class(block)
            restore_class(block.token_mixer)
        restore_class(stage)
        del stage._tokcomp_method

    def method(self, model: nn.Module) -> Method | None:
        stage = _compressed_stage(model)
        return None if stage is None else stage._tokcomp_method

    def sources(self, model: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        check_images(model.stem, images)
        x = model.stem(images)
        for stage in model.stages[:STAGE]:
            x = stage(x)
        stage = model.stages[STAGE]
        x, _, _ = split_grid(stage.downsample(x))
        if _compressed_stage(model) is None:
            return stage.blocks(x), [None] * len(stage.blocks)
        sources: list[Tensor | None] = []
        x, _, _ = stage.tokens(x, sources)
        return x, sources

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        first = next(part for part in model.stem.modules() if isinstance(part, nn.Conv2d))
        return (first.in_channels, *_image_size(model))

    def projections(self, model: Any) -> list[Projection]:
        """Those of the stage that is compressed."""
        blocks = model.stages[STAGE].blocks
        return [packed(block.token_mixer.qkv, f"block {index}") for index, block in enumerate(blocks)]

    def check_search(self, model: nn.Module) -> None:
        check_search(model)

    def reads_patches(self, model: nn.Module) -> bool:
        """Always: what follows the stage reads every position."""
        return True

    def search(self, model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
        return run_search(model, STAGE, images, blocks)


def _compressed_stage(model: Any) -> Any:
    stage = model.stages[STAGE] if len(model.stages) > STAGE else None
    return stage if isinstance(stage, CompressedStage) else None


def _require_parts(module: nn.Module, parts: tuple[str, ...], name: str) -> None:
    missing = [part for part in parts if not hasattr(module, part)]
    if missing:
        cls = original_class(module).__name__
        raise UnsupportedModelError(f"{name}: {cls} has no {missing[0]}, so it is not understood")


def _image_size(model: Any) -> tuple[int, int]:
    """The model's own image size: what it was trained at."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    return _IMAGE_SIZE if size is None else (int(size[-2]), int(size[-1]))


def _grids(model: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of every stage for an image of this size."""
    rows, columns = _convolved(model.stem, height, width)
    grids = []
    for stage in model.stages:
        rows, columns = _convolved(stage.downsample, rows, columns)
        grids.append((rows, columns))
    return grids


def _convolved(module: nn.Module, rows: int, columns: int) -> tuple[int, int]:
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            if isinstance(conv.padding, str):
                raise UnsupportedModelError(f"a convolution with padding={conv.padding!r} cannot be followed")
            rows, columns = (
                (extent + 2 * conv.padding[axis] - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1)
                // conv.stride[axis]
                + 1
                for axis, extent in enumerate((rows, columns))
            )
    return rows, columns


def _block_cost(block: Any) -> BlockCost:
    mixer = block.token_mixer
    if not isinstance(mixer, (Attention, SepConv, Pooling, nn.Identity)):
        raise UnsupportedModelError(f"the multiply-adds of a {type(mixer).__name__} are not known")
    width = mixer.num_heads * mixer.head_dim if isinstance(mixer, Attention) else 0
    return BlockCost(_linear_cost(mixer), width, _linear_cost(block.mlp))


def _linear_cost(module: nn.Module) -> int:
    """Multiply-adds per position of a module's linear layers and convolutions."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
