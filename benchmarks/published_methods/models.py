"""Whole models by DynamicViT, SPViT, Evo-ViT and PiToMe, under which every image keeps as many tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import tokcomp
from tokcomp import learned
from tokcomp.runs.steps import seed_all
from torch import Tensor, nn

from benchmarks.published_methods.clones import imported, silent
from benchmarks.published_methods.pair import Pair

MODEL = "deit_small_patch16_224"
#: timm's DeiT-S as the published classes are told it.
SHAPE = {"embed_dim": 384, "depth": 12, "num_heads": 6, "qkv_bias": True}
SPVIT_RATES = (0.7, 0.39, 0.21)
PITOME_RATIO = 0.925


def plain_model(**options: Any) -> Any:
    """DeiT-S with random weights, the same ones each time."""
    seed_all(0)
    return timm.create_model(MODEL, **options).eval()


def model_pair(published: Any, ours: Any, **more: Any) -> Pair:
    """Of two models that take images to logits; ``ours`` is compressed."""
    more = {"gflops": tokcomp.flops(ours) / 1e9, **more}
    return Pair("DeiT-S", published, ours, **more)


def dynamicvit(folder: Path) -> list[Pair]:
    method = tokcomp.DynamicViT(0.7)
    ours = learned.attach(plain_model(), method).eval()
    module = imported(folder, "models.dyvit")
    rates = [0.7, 0.7**2, 0.7**3]
    theirs = silent(lambda: module.VisionTransformerDiffPruning(**SHAPE, pruning_loc=[3, 6, 9], token_ratio=rates))
    names = {"norm": "in_conv.0", "embed": "in_conv.1", "hidden1": "out_conv.0", "hidden2": "out_conv.2"}
    theirs.load_state_dict(_renamed(ours.state_dict(), "dynamicvit", {**names, "out": "out_conv.4"}))
    return [model_pair(theirs.eval(), tokcomp.compress(ours, method))]


def spvit(folder: Path) -> list[Pair]:
    """The published code draws its decisions at random, in inference too, and takes one image."""
    method = tokcomp.SPViT(SPVIT_RATES)
    ours = learned.attach(plain_model(), method).eval()
    module = imported(folder, "vit_l2_3keep_senet_inference")
    theirs = silent(
        lambda: module.VisionTransformerDiffPruning(**SHAPE, pruning_loc=[3, 6, 9], token_ratio=list(SPVIT_RATES))
    ).eval()
    compressed = tokcomp.compress(ours, method)
    return [model_pair(lambda images: silent(lambda: theirs(images)), compressed, differs=None, batches=(1,))]


def evovit(folder: Path) -> list[Pair]:
    """The published model averages its patches, and has no representative tokens."""
    method = tokcomp.EvoViT(representative=False)
    ours = plain_model(global_pool="avg")
    theirs = silent(imported(folder, "deit.evo_deit").evo_deit_small_patch16_224)
    theirs.remove_cls()
    state = {}
    for name, value in ours.state_dict().items():
        _, _, rest = name.partition(".")
        block, _, inner = rest.partition(".")
        kind = inner.rpartition(".")[2]
        if not name.startswith("blocks."):
            state[name.replace("fc_norm.", "norm.")] = value
        elif inner.startswith("attn.qkv"):
            state[f"qks.{block}.qk.{kind}"], state[f"vs.{block}.v.{kind}"] = value[:768], value[768:]
        elif inner.startswith("attn.proj"):
            state[f"projs.{block}.{kind}"] = value
        elif inner.startswith("norm1"):
            state[f"norms.{block}.{kind}"] = value
        else:
            state[name] = value
    theirs.load_state_dict(state)
    return [model_pair(theirs.eval(), tokcomp.compress(ours, method))]


def pitome(folder: Path) -> list[Pair]:
    """As the published code patches DeiT: the first half of the blocks pairs all tokens."""
    plain = plain_model()
    theirs: Any = copy.deepcopy(plain)
    # Its package imports every model that it knows, language models too.
    module = imported(folder, "algo.pitome.patch.deit", ("algo", "algo.pitome", "algo.pitome.patch"))
    silent(lambda: module.apply_patch(theirs, prop_attn=True))
    theirs.ratio, theirs.dist_token, theirs.pre_logits = PITOME_RATIO, None, nn.Identity()
    # Its forward_features takes images alone and pools already; in timm 0.4 only the classifier came after it.
    features, theirs.forward_head = theirs.forward_features, lambda pooled: theirs.head(pooled)
    theirs.forward_features = lambda images, **masks: features(images)
    tokens, r = (plain.patch_embed.num_patches), []
    for _ in plain.blocks:
        r.append(math.floor(tokens - tokens * PITOME_RATIO))
        tokens -= r[-1]
    ours = tokcomp.compress(plain, tokcomp.PiToMe(r, margin=0.75, prop_attn=False, unprotected=0.5))
    return [model_pair(lambda images: theirs(images, return_flop=False), ours)]


def _renamed(state: Mapping[str, Tensor], parts: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first == parts:
            stage, layer, kind = rest
            name = f"score_predictor.{stage}.{names[layer]}.{kind}"
        found[name] = value
    return found
