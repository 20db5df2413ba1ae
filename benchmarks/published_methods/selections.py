"""DivPrune's, CDPruner's and VisionZip's one step between a vision tower and a language model, on random features.

Their code stands inside LLaVA. The functions that choose tokens are run alone, on what a CLIP ViT-L/14 at 336 x 336
delivers: 576 patch tokens, 1024 wide or, after LLaVA-1.5's projector, 4096.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokcomp
import torch
from tokcomp.methods.partition import with_rank
from torch import Tensor

from benchmarks.published_methods.clones import functions
from benchmarks.published_methods.pair import Pair, farthest

PATCHES, WIDTH, PROJECTED, EMBEDDED, HEADS = 576, 1024, 4096, 768, 16
KEPT = (64, 128)
#: Of VisionZip's 64 and 128 tokens, the class token counted: dominant patches, and contextual tokens.
ZIPPED = {64: (53, 10), 128: (107, 20)}


def divprune(folder: Path) -> list[Pair]:
    """One image at a time, as the published code takes them: 1 - cosine, farthest point first."""
    names = ("pairwise_cosine_similarity", "DivPrune")
    theirs: Any = _object(functions(folder / "LLaVA/llava/model/llava_arch.py", "LlavaMetaForCausalLM", names))

    def published(features: Tensor, kept: int) -> Tensor:
        return theirs.DivPrune(features[0], PATCHES, threshold_ratio=kept / PATCHES)[0].sort().values[None]

    def ours(features: Tensor, kept: int) -> Tensor:
        return torch.ops.tokcomp.select_diverse(features, kept, num_prefix_tokens=0).sort(1).values

    def inputs(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_features(batch, PATCHES, PROJECTED, generator),)

    return _by_count(published, ours, inputs, PROJECTED, batches=(1,))


def cdpruner(folder: Path) -> list[Pair]:
    """Relevance by CLIP's embeddings of patches and question, scaled over the batch as in the published code."""
    path = folder / "llava/model/llava_arch.py"
    encode = functions(path, "LlavaMetaForCausalLM", ("encode_images",))["encode_images"]

    def published(features: Tensor, patches: Tensor, question: Tensor, kept: int) -> Tensor:
        parts = SimpleNamespace(
            get_vision_tower=lambda: lambda images, texts: (features, patches, question), mm_projector=lambda x: x
        )
        mask = encode(SimpleNamespace(get_model=lambda: parts, visual_token_num=kept), None)[1]
        return mask.nonzero()[:, 1].view(len(mask), kept)

    def ours(features: Tensor, patches: Tensor, question: Tensor, kept: int) -> Tensor:
        unit = torch.nn.functional.normalize
        likeness = -(unit(patches, dim=-1) @ unit(question, dim=-1).t()).mean(-1)
        low, high = likeness.min(), likeness.max()
        relevance = (likeness - low + 1e-6) / (high - low)
        chosen = torch.ops.tokcomp.select_diverse(features, kept, relevance=relevance, num_prefix_tokens=0, rule="dpp")
        return chosen.sort(1).values

    def inputs(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        features = _features(batch, PATCHES, PROJECTED, generator)
        return features, *(torch.randn(*shape, generator=generator) for shape in ((batch, PATCHES, EMBEDDED), (1, 768)))

    return _by_count(published, ours, inputs, PROJECTED)


def visionzip(folder: Path) -> list[Pair]:
    """By a block's attention and keys; a contextual token is the sampled one plus the mean of those that join it."""
    path = folder / "visionzip/clip_encoder.py"
    forward = functions(path, "CLIPVisionTower_VisionZip", ("forward",))["forward"]

    def published(attention: Tensor, tokens: Tensor, keys: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        class Tower(SimpleNamespace):
            def __call__(self, images: Tensor, **options: Any) -> SimpleNamespace:
                return SimpleNamespace(attentions=[attention, None], hidden_states=[tokens, None])

        dominant, contextual = ZIPPED[kept]
        layers = [SimpleNamespace(metric=keys), None]
        tower = Tower(
            vision_model=SimpleNamespace(encoder=SimpleNamespace(layers=layers)),
            _info={"dominant": dominant, "contextual": contextual},
        )
        return forward(SimpleNamespace(vision_tower=tower, device=tokens.device, dtype=tokens.dtype), tokens)

    def ours(attention: Tensor, tokens: Tensor, keys: Tensor, kept: int) -> Any:
        method, score = _zip(kept), with_rank(keys, attention[:, :, 0].mean(1))
        assignment = method.assign(0, PATCHES + 1, 1)
        assert assignment is not None
        reduced = method.reduce(tokens, score, assignment, size=None, num_prefix_tokens=1)
        return reduced.x, reduced.source, score, tokens

    def differs(theirs: tuple[Tensor, Tensor], ours: Any) -> float:
        return _zips_apart(theirs, *ours)

    def inputs(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        attention = torch.randn(batch, HEADS, PATCHES + 1, PATCHES + 1, generator=generator).softmax(-1)
        return attention, _features(batch, PATCHES + 1, WIDTH, generator), _features(batch, PATCHES + 1, 64, generator)

    return _by_count(published, ours, inputs, WIDTH, differs=differs)


def _zip(kept: int) -> tokcomp.VisionZip:
    dominant, contextual = ZIPPED[kept]
    patches = dominant + contextual
    return tokcomp.VisionZip(num_kept=patches, blocks=[0], contextual=contextual / patches)


def _zips_apart(theirs: tuple[Tensor, Tensor], x: Tensor, source: Tensor, score: Tensor, tokens: Tensor) -> float:
    """How far the published tokens are from those that our groups make by its rule; 1 if other tokens are dominant."""
    found, dominant = theirs
    count = x.shape[1]
    place = _zip(count).kept_places(score, source, count, 1)
    first = torch.zeros_like(score[..., 0]).scatter(1, dominant, 1).gather(1, place).bool()  # [B, M] dominant slots
    if not bool((first.sum(1) == dominant.shape[1]).all()):
        return 1.0
    own = tokens.gather(1, place[:, :, None].expand_as(x))
    index = source[:, :, None].expand_as(tokens)
    joined = torch.zeros_like(x).scatter_add(1, index, tokens) - own
    others = torch.zeros_like(x[..., 0]).scatter_add(1, source, torch.ones_like(score[..., 0])) - 1
    made = own + joined / others.clamp(min=1)[:, :, None]
    order = (~first).to(torch.int8).sort(dim=1, stable=True).indices
    return farthest(found, made.gather(1, order[:, :, None].expand_as(made)))


def _features(batch: int, tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """[batch, tokens, width] around one direction, as tokens of a tower are."""
    common = torch.randn(batch, 1, width, generator=generator)
    return common + torch.randn(batch, tokens, width, generator=generator)


def _object(members: dict[str, Callable[..., Any]]) -> Any:
    return type("Clone", (), dict(members))()


def _by_count(published: Any, ours: Any, inputs: Any, width: int, **more: Any) -> list[Pair]:
    more = {"differs": _share_of_others, **more}
    return [
        Pair(
            f"{PATCHES} tokens x {width}, {kept} kept",
            lambda *args, kept=kept: published(*args, kept),
            lambda *args, kept=kept: ours(*args, kept),
            inputs=inputs,
            **more,
        )
        for kept in KEPT
    ]


def _share_of_others(theirs: Tensor, ours: Tensor) -> float:
    """Of kept tokens [B, K], in rising order."""
    return float((theirs != ours).double().mean())
