"""Hugging Face transformers: ViT, DeiT, DINOv2 (registers too), DINOv3, and the vision towers of CLIP and SigLIP.

The towers alone, in their image classifiers and in CLIPModel and SiglipModel. transformers itself is imported only by
whoever has such a model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.blocks import CompressedBlock
from tokcomp.adapters.flex import flex_attention_by_key
from tokcomp.adapters.hidden_states import HiddenStatesTower, asked, run_with_hidden_states
from tokcomp.adapters.images import check_images
from tokcomp.adapters.isotropic import IsotropicAdapter
from tokcomp.adapters.layout import Layout, linear_cost
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.swap import Swapped, original_class
from tokcomp.blocks.places import Places
from tokcomp.methods.base import Method

_ABSENT: dict[str, Any] = dict.fromkeys(("norms", "out_norm", "out_dropout"))
_SEPARATE: dict[str, Any] = {"qkv": ("q_proj", "k_proj", "v_proj"), **_ABSENT}
_VIT: dict[str, Any] = {
    **_SEPARATE,
    "attention": "attention",
    "num_heads": "num_attention_heads",
    "scale": "scaling",
    "dropout": "attention_dropout",
    "out": "o_proj",
}
_DINO: dict[str, Any] = {"scale1": "layer_scale1", "drop1": "drop_path", "scale2": "layer_scale2", "drop2": "drop_path"}
#: Where the models around a tower keep it.
_OUTER = {
    **dict.fromkeys(("ViTForImageClassification", "ViTMSNForImageClassification"), "vit"),
    **dict.fromkeys(("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"), "deit"),
    "Dinov2ForImageClassification": "dinov2",
    "Dinov2WithRegistersForImageClassification": "dinov2_with_registers",
    **{f"{kind}Model": "vision_model" for kind in ("CLIP", "MetaClip2", "AltCLIP", "Siglip")},
    **{f"{kind}VisionModelWithProjection": "vision_model" for kind in ("CLIP", "MetaClip2")},
    **{f"{kind}ForImageClassification": "vision_model" for kind in ("CLIP", "MetaClip2", "Siglip")},
}
#: Those of them that need texts as well.
_WITH_TEXTS = ("CLIPModel", "MetaClip2Model", "AltCLIPModel", "SiglipModel")
#: Those of them that average the tower's patch tokens.
_AVERAGING = {name for name in _OUTER if name.startswith(("Dinov2", "CLIPFor", "MetaClip2For", "SiglipFor"))}
#: The linear layers around a tower that one image goes through.
_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")


class TransformersLayout(Layout):
    """A layer whose own attention is the function that ``attn_implementation`` names."""

    def stock_attention(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
    ) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        eager = sys.modules[original_class(attn).__module__].eager_attention_forward
        name = attn.config._attn_implementation
        if name == "flex_attention" and mask is not None:
            return flex_attention_by_key(q, k, v, mask, self.score_scale(attn), dropout_p)
        function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        return function(attn, q, k, v, mask, scaling=self.score_scale(attn), dropout=dropout_p)[0].transpose(1, 2)


class CompressedLayer(CompressedBlock):
    """A transformers layer, which the tower runs again in the backward pass where it is asked to, not the layer."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Nothing: transformers' own would wrap forward to run the layer again, with a state that it has changed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self, *args, **kwargs)


class AveragingClassifier(Swapped):
    """A classifier on the average of the patch tokens, each of which counts by its size."""

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        tower = getattr(self, _OUTER[_known_class(self).__name__])
        adapter = tower._tokcomp_adapter
        x, weights, hidden = run_with_hidden_states(tower, pixel_values, **kwargs)
        logits = self.classifier(adapter.average(tower, adapter.normalized(tower, x), weights))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)
        return output if asked(self, "return_dict", kwargs, True) else output.to_tuple()


class TransformersAdapter(IsotropicAdapter):
    """Base of the families here: ``towers`` names their classes, ``layer`` and ``attention`` what is inside."""

    compressed_block = CompressedLayer
    compressed_tower = HiddenStatesTower
    towers: tuple[str, ...]
    layer: str  # the layer's class is named so after the tower's, "{}Layer" of ViTModel: ViTLayer
    attention: str
    block_list: str
    projection: str

    def claims(self, model: nn.Module) -> bool:
        known = _known_class(model)
        if known.__module__.startswith("transformers.") and known.__name__ in _OUTER:
            inner = getattr(model, _OUTER[known.__name__], None)
            return isinstance(inner, nn.Module) and self._is_tower(inner)
        return self._is_tower(model)

    def _is_tower(self, module: nn.Module) -> bool:
        known = _known_class(module)
        return known.__module__.startswith("transformers.") and known.__name__ in self.towers

    def tower(self, model: Any) -> Any:
        return model if self._is_tower(model) else getattr(model, _OUTER[_known_class(model).__name__])

    def check(self, model: Any) -> None:
        tower = self.tower(model)
        for module in {id(one): one for one in (model, tower)}.values():
            cls, known = original_class(module), _known_class(module)
            if cls.forward is not known.forward or "forward" in vars(module):  # type: ignore[attr-defined]
                raise UnsupportedModelError(f"{cls.__name__} is not understood: it has a forward of its own")
        source = sys.modules[_known_class(tower).__module__]
        kind = _known_class(tower).__name__.removesuffix("Model").removesuffix("Vision")
        layer, attention = (getattr(source, name.format(kind), None) for name in (self.layer, self.attention))
        path = "" if tower is model else f"{_OUTER[_known_class(model).__name__]}."
        missing = [part for part in (self.block_list, self.projection) if _get(tower, part) is None]
        if missing or layer is None or attention is None:
            what = f"has no {missing[0]}" if missing else f"comes without {self.layer.format(kind)}"
            raise UnsupportedModelError(
                f"{type(tower).__name__} of this transformers {what}, so it is not understood; transformers 5 has it"
            )
        for index, block in enumerate(self.blocks(tower)):
            self.layout.check(block, layer, attention, f"{path}{self.block_list}.{index}")

    def blocks(self, tower: Any) -> Sequence[Any]:
        return _get(tower, self.block_list)

    def patch_projection(self, tower: Any) -> nn.Conv2d:
        return _get(tower, self.projection)

    def image_size(self, tower: Any) -> tuple[int, int]:
        size = tower.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def embed(self, tower: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Places | None]:
        pixel_values = args[0] if args else kwargs["pixel_values"]
        check_images(self.patch_projection(tower), pixel_values)
        if asked(tower, "output_attentions", kwargs):
            raise ValueError(
                "output_attentions must be False, got True: a compressed model's tokens differ from block to block; "
                "use tokcomp.trace, or tokcomp.restore the model first"
            )
        if kwargs.get("attention_mask") is not None:
            raise ValueError("attention_mask must be None: a compressed model's tokens are re-ordered")
        options = {name: kwargs.get(name) for name in ("bool_masked_pos", "interpolate_pos_encoding")}
        options = {name: value for name, value in options.items() if value is not None and value is not False}
        pixel_values = pixel_values.to(self.patch_projection(tower).weight.dtype)
        return self.embedded(tower, pixel_values, options)

    def embedded(self, tower: Any, pixel_values: Tensor, options: dict[str, Any]) -> tuple[Tensor, Places | None]:
        """Tokens for block 0, and their places."""
        return tower.embeddings(pixel_values, **options), None

    def finish(self, tower: Any, x: Tensor, weights: Weights | None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        x = self.normalized(tower, x)
        output = BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=self.pooled(tower, x, weights))
        return output if asked(tower, "return_dict", kwargs, True) else output.to_tuple()

    def normalized(self, tower: Any, x: Tensor) -> Tensor:
        """``last_hidden_state`` for tokens x [B, M, C] after the last block."""
        return tower.layernorm(x)

    def pooled(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor | None:
        """``pooler_output`` for ``last_hidden_state`` x."""
        return x[:, 0]

    def average(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor:
        """What the family's image classifier makes of ``last_hidden_state`` x: the mean of the patch tokens."""
        prefix = self.num_prefix_tokens(tower)
        x = x[:, prefix:]
        return x.mean(1) if weights is None else weights.without(prefix).mean(x)

    def outer(self, model: Any) -> dict[nn.Module, type[Swapped]]:
        return {model: AveragingClassifier} if _known_class(model).__name__ in _AVERAGING else {}

    def reads_patches(self, model: Any) -> bool:
        return super().reads_patches(model) or _known_class(model).__name__ in _AVERAGING

    def check_search(self, model: Any) -> None:
        if _known_class(model).__name__ in _WITH_TEXTS:
            raise UnsupportedModelError(
                f"a {type(model).__name__} needs texts as well, so a search has no logits to go by; pass "
                "model.vision_model"
            )

    def head_cost(self, model: Any) -> int:
        heads = [getattr(model, name) for name in _HEADS if isinstance(getattr(model, name, None), nn.Module)]
        return sum(map(linear_cost, heads)) + self.pooler_cost(self.tower(model))

    def pooler_cost(self, tower: Any) -> int:
        """Multiply-adds of the tower's own pooling of one image."""
        pooler = getattr(tower, "pooler", None)
        return 0 if pooler is None else linear_cost(pooler)

    def num_classes(self, model: Any) -> int:
        return int(model.config.num_labels) if "ForImageClassification" in _known_class(model).__name__ else 0

    def logits(self, output: Any) -> Tensor:
        for name in ("logits", "image_embeds", "pooler_output"):
            if getattr(output, name, None) is not None:
                return getattr(output, name)
        return output.last_hidden_state[:, 0]

    def check_attention(self, model: Any, method: Method) -> None:
        name = self.tower(model).config._attn_implementation or "eager"
        if "flash" in name and method.proportional_attention:
            raise UnsupportedModelError(
                f"attn_implementation={name!r} takes no mask, so sizes cannot reach it; use 'sdpa', or a method "
                "without proportional attention, such as ToMe(r, prop_attn=False)"
            )

    def checkpoints(self, tower: Any) -> bool:
        asked = any(getattr(block, "gradient_checkpointing", False) for block in self.blocks(tower))
        return asked and tower.training and torch.is_grad_enabled()


class TransformersViT(TransformersAdapter):
    """ViTModel, ViTMSNModel, and DeiTModel, whose second token distils."""

    family = "transformers ViT, DeiT, MSN"
    towers = ("ViTModel", "DeiTModel", "ViTMSNModel")
    layer, attention = "{}Layer", "{}Attention"
    block_list, projection = "layers", "embeddings.patch_embeddings.projection"
    layout = TransformersLayout(
        norm1="layernorm_before",
        scale1=None,
        drop1="dropout",
        norm2="layernorm_after",
        scale2=None,
        drop2="dropout",
        **_VIT,
    )

    def num_prefix_tokens(self, tower: Any) -> int:
        return 2 if hasattr(tower.embeddings, "distillation_token") else 1

    def pooled(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor | None:
        pooler = getattr(tower, "pooler", None)
        return None if pooler is None else pooler(x)


class TransformersDinov2(TransformersAdapter):
    """Dinov2Model, with registers or without."""

    family = "transformers DINOv2"
    towers = ("Dinov2Model", "Dinov2WithRegistersModel")
    layer, attention = "{}Layer", "{}Attention"
    block_list, projection = "encoder.layer", "embeddings.patch_embeddings.projection"
    layout = TransformersLayout(**_DINO, **_VIT)

    def num_prefix_tokens(self, tower: Any) -> int:
        return 1 + getattr(tower.config, "num_register_tokens", 0)

    def average(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor:
        return torch.cat((x[:, 0], super().average(tower, x, weights)), dim=1)


class Dinov3Layout(TransformersLayout):
    """Attention whose queries and keys turn by their tokens' places, prefix tokens aside."""

    def rotate(self, attn: Any, x: Tensor, places: Places, block: int) -> Tensor:
        cos, sin = places.table  # [P, D] each
        prefix = x.shape[2] - cos.shape[0]
        if places.origin is not None:
            prefix = attn.config.num_register_tokens + 1
            index = places.origin[:, prefix:] - prefix  # [B, P']
            cos, sin = cos[index].unsqueeze(1), sin[index].unsqueeze(1)  # [B, 1, P', D]
        patches = x[:, :, prefix:]
        first, second = patches.chunk(2, dim=-1)
        turned = patches * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((x[:, :, :prefix], turned), dim=2)


class TransformersDinov3(TransformersAdapter):
    """DINOv3ViTModel."""

    family = "transformers DINOv3"
    towers = ("DINOv3ViTModel",)
    layer, attention = "{}Layer", "{}Attention"
    block_list, projection = "model.layer", "embeddings.patch_embeddings"
    layout = Dinov3Layout(**_DINO, **{**_VIT, "num_heads": "num_heads", "dropout": "dropout"})

    def num_prefix_tokens(self, tower: Any) -> int:
        return 1 + tower.config.num_register_tokens

    def embedded(self, tower: Any, pixel_values: Tensor, options: dict[str, Any]) -> tuple[Tensor, Places | None]:
        return tower.embeddings(pixel_values, **options), Places(tower.rope_embeddings(pixel_values))

    def normalized(self, tower: Any, x: Tensor) -> Tensor:
        return tower.norm(x)


_CLIP = TransformersLayout(
    norm1="layer_norm1",
    attention="self_attn",
    scale1=None,
    drop1=None,
    norm2="layer_norm2",
    scale2=None,
    drop2=None,
    dropout="dropout",
    out="out_proj",
    **_SEPARATE,
)


class TransformersCLIP(TransformersAdapter):
    """CLIPVisionModel, and MetaCLIP 2's and AltCLIP's, which are built alike."""

    family = "transformers CLIP's vision tower"
    towers = ("CLIPVisionModel", "MetaClip2VisionModel", "AltCLIPVisionModel")
    layer, attention = "{}EncoderLayer", "{}Attention"
    block_list, projection = "encoder.layers", "embeddings.patch_embedding"
    layout = _CLIP

    def embedded(self, tower: Any, pixel_values: Tensor, options: dict[str, Any]) -> tuple[Tensor, Places | None]:
        return tower.pre_layrnorm(tower.embeddings(pixel_values, **options)), None

    def normalized(self, tower: Any, x: Tensor) -> Tensor:
        return x

    def pooled(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor | None:
        return tower.post_layernorm(x[:, 0])


class TransformersSiglip(TransformersAdapter):
    """SiglipVisionModel: no class token, pooled by a probe's attention."""

    family = "transformers SigLIP's vision tower"
    towers = ("SiglipVisionModel",)
    layer, attention = "{}EncoderLayer", "{}Attention"
    block_list, projection = "encoder.layers", "embeddings.patch_embedding"
    layout = _CLIP

    def num_prefix_tokens(self, tower: Any) -> int:
        return 0

    def has_class_token(self, tower: Any) -> bool:
        return False

    def check(self, model: Any) -> None:
        super().check(model)
        tower = self.tower(model)
        if tower.use_head and type(tower.head).__name__ != "SiglipMultiheadAttentionPoolingHead":
            raise UnsupportedModelError(f"head: {type(tower.head).__name__} is not understood")

    def normalized(self, tower: Any, x: Tensor) -> Tensor:
        return tower.post_layernorm(x)

    def pooled(self, tower: Any, x: Tensor, weights: Weights | None) -> Tensor | None:
        if not tower.use_head:
            return None
        head = tower.head
        bias = None
        if weights is not None:
            bias = weights.log(x.dtype).expand(-1, head.attention.num_heads, -1, -1).flatten(0, 1)  # [B * H, 1, M]
        probe = head.probe.expand(x.shape[0], -1, -1)
        pooled = head.attention(probe, x, x, attn_mask=bias, need_weights=False)[0]
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]

    def head_cost_per_token(self, model: Any) -> int:
        tower = self.tower(model)
        width = tower.config.hidden_size
        return 2 * width * width + 2 * width if tower.use_head else 0  # keys, values; scores, and values by them

    def pooler_cost(self, tower: Any) -> int:
        width = tower.config.hidden_size
        return 2 * width * width + linear_cost(tower.head.mlp) if tower.use_head else 0  # query, result


def _known_class(module: nn.Module) -> type:
    """transformers' own class that a module is of, or its class if it is of none."""
    cls = original_class(module)
    return next((base for base in cls.__mro__ if base.__module__.startswith("transformers.models.")), cls)


def _get(module: Any, path: str) -> Any:
    """The part of a module at a dotted path, None where it has none."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
