"""Which CAFormers compress, by which schedules, at what cost, and what is refused."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from timm.models.metaformer import Attention, MetaFormer
from torch import nn

from tests.library.small_caformer import DIFFRATE, MERGE, SCHEDULE, TOKENS, caformer, images_of


# GFLOPs (multiply-adds): the paper's Table 12 has 8.0 and names the schedules 6.0, 5.6 and 5.2.
@pytest.mark.parametrize("budget", [6.0, 5.6, 5.2])
def test_published_schedules(meta_model, budget):
    model = meta_model("caformer_s36", num_classes=1000)
    assert round(tokcomp.flops(model) / 1e9, 1) == 8.0
    method = tokcomp.DiffRate.published("caformer_s36", budget)
    assert len(method.schedule) == 21  # the third stage's 18 blocks and the fourth stage's 3, which keep their tokens
    tokcomp.compress(model, method)
    assert round(tokcomp.flops(model) / 1e9, 1) == budget
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def flops_by_hand(arriving, leaving):
    """Multiply-adds of the test model at 224 x 224: 14 x 14 tokens in the third stage."""
    convolutions = 56**2 * (3 * 8 * 49 + (2 * 2 * 8**2 + 49 * 16) + 8 * 8**2)
    convolutions += 28**2 * (8 * 16 * 9 + (2 * 2 * 16**2 + 49 * 32) + 8 * 16**2)
    third = 14**2 * 16 * 32 * 9
    for tokens_in, tokens_out in zip(arriving, leaving, strict=True):
        third += 4 * tokens_in * 32**2 + 2 * tokens_in**2 * 32 + 8 * tokens_out * 32**2
    fourth = 7**2 * 32 * 48 * 9 + 2 * (12 * 49 * 48**2 + 2 * 49**2 * 48)
    return convolutions + third + fourth + 4 * 48 * 48 + 4 * 48 * 5


def test_flops():
    model = caformer(num_classes=5, dims=(8, 16, 32, 48))
    assert tokcomp.flops(model) == flops_by_hand([196] * 4, [196] * 4)
    schedule = tokcomp.CompressionSchedule(None, [196, 150, 160, 40])
    tokcomp.compress(model, tokcomp.DiffRate(schedule, metric="image_attn", pipeline="merge"))
    assert tokcomp.flops(model) == flops_by_hand([196, 196, 150, 150], [196, 150, 150, 40])
    tokcomp.compress(model, tokcomp.ToMe(30))
    assert tokcomp.flops(model) == flops_by_hand([196, 166, 136, 106], [166, 136, 106, 76])
    assert type(tokcomp.flops(model)) is int


def test_schedules_may_go_on_for_the_last_stage():
    images = images_of()
    long = tokcomp.CompressionSchedule(None, [*MERGE, 6, 6])
    long = tokcomp.DiffRate(long, metric="image_attn", pipeline="merge", similarity_weighted_size=False)
    with torch.no_grad():
        logits = tokcomp.compress(caformer(), long)(images)
        assert torch.equal(logits, tokcomp.compress(caformer(), DIFFRATE)(images))
    for length in (3, 5, 7):
        wrong = tokcomp.CompressionSchedule(None, [10] * length)
        with pytest.raises(ValueError, match=f"one entry per block, got {length} entries for 4 blocks"):
            tokcomp.compress(caformer(), tokcomp.DiffRate(wrong, metric="image_attn", pipeline="merge"))


def test_metrics_of_a_class_token_are_refused():
    model = caformer()
    classes = [type(module) for module in model.modules()]
    for method, message in (
        (tokcomp.DiffRate(SCHEDULE, "cls_attn"), "metric 'cls_attn' needs a class token, which this model does not"),
        (tokcomp.DiffRate(SCHEDULE, "cls_attn_v"), "metric 'cls_attn_v' needs a class token"),
    ):
        with pytest.raises(ValueError, match=message):
            tokcomp.compress(model, method)
    assert [type(module) for module in model.modules()] == classes


def test_models_without_attention_in_the_third_stage_are_refused(meta_model):
    for name, mixer in (("convformer_s18", "SepConv"), ("poolformer_s12", "Pooling"), ("poolformerv2_s12", "Pooling")):
        model = meta_model(name)
        for call in (lambda model=model: tokcomp.compress(model, DIFFRATE), lambda model=model: tokcomp.flops(model)):
            with pytest.raises(
                tokcomp.UnsupportedModelError,
                match=rf"stages\.2\.blocks\.0\.token_mixer: {mixer} is not understood.*only attention",
            ):
                call()
        assert tokcomp.restore(model) is model
    short = MetaFormer(depths=(1, 1), dims=(8, 16))
    with pytest.raises(tokcomp.UnsupportedModelError, match="it has 2 stages, and only the third one is compressed"):
        tokcomp.compress(short, DIFFRATE)


def test_modules_that_are_not_understood_are_refused_by_name():
    class OwnModel(MetaFormer):
        def forward_features(self, x):
            return super().forward_features(x)

    class OwnAttention(Attention):
        def forward(self, x):
            return super().forward(x)

    def refused(model, message):
        classes = [type(module) for module in model.modules()]
        with pytest.raises(tokcomp.UnsupportedModelError, match=message):
            tokcomp.compress(model, DIFFRATE)
        assert [type(module) for module in model.modules()] == classes

    model = caformer()
    model.__class__ = OwnModel
    refused(model, "OwnModel is not understood: it has a forward_features of its own")
    model = caformer()
    model.stages[2].blocks[2].token_mixer.__class__ = OwnAttention
    refused(model, r"stages\.2\.blocks\.2\.token_mixer: OwnAttention is not understood, only timm's Attention")
    model = caformer()
    model.stages[2].blocks[1].forward = lambda x: x
    refused(model, r"stages\.2\.blocks\.1: MetaFormerBlock is not understood")
    model = caformer()
    model.stages[2].forward = lambda x: x
    refused(model, r"stages\.2: MetaFormerStage is not understood")
    model = caformer()
    model.stages[2].blocks[3].norm2 = nn.GroupNorm(1, 32)
    refused(model, r"stages\.2\.blocks\.3\.norm2: a GroupNorm mixes tokens")
    model = caformer()
    model.stages[2].blocks[0].mlp.fc2 = nn.Conv1d(128, 32, 3)
    refused(model, r"stages\.2\.blocks\.0\.mlp\.fc2: a Conv1d mixes tokens")


def test_a_block_cannot_run_on_its_own():
    model = tokcomp.compress(caformer(), DIFFRATE)
    for module in (model.stages[2].blocks[0], model.stages[2].blocks[0].token_mixer):
        with pytest.raises(RuntimeError, match=r"call the model, or tokcomp\.restore"):
            module(torch.randn(1, TOKENS, 32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caformer_s18", "caformer_m36", "caformer_b36"])
def test_timm_models(meta_model, name):
    model = meta_model(name)
    images = torch.empty(2, 3, 224, 224, device="meta")
    dense = tokcomp.flops(model)
    assert tokcomp.compress(model, tokcomp.ToMe(8))(images).shape == model(images).shape
    assert tokcomp.flops(model) < 0.9 * dense
    assert tokcomp.flops(tokcomp.restore(model)) == dense
