"""CAFormer: its third stage compressed, against a plain PyTorch pass that walks image by image; the rest untouched."""

from __future__ import annotations

import copy

import pytest
import tokcomp
import torch
from timm.models.metaformer import Attention, MetaFormer
from tokcomp.visualize import draw_blocks

from tests.library.small_caformer import DIFFRATE, MERGE, PRUNE, SCHEDULE, TOKENS, VARIANTS, caformer, images_of
from tests.oracle import rules

METHODS = {
    "merge": DIFFRATE,
    "merge, weighted size": tokcomp.DiffRate(SCHEDULE, metric="image_attn", pipeline="merge"),
    "prune": tokcomp.DiffRate(SCHEDULE, metric="image_attn", pipeline="prune"),
    "prune_merge": tokcomp.DiffRate(SCHEDULE),
    "merge_prune": tokcomp.DiffRate(SCHEDULE, metric="image_attn", pipeline="merge_prune"),
    "tome": tokcomp.ToMe(3),
    "tome, no sizes": tokcomp.ToMe([5, 0, 4, 2], prop_attn=False),
}


def walk_stage(stage, x, method):
    """The third stage for one image, x [C, H, W] after the downsampling: every step spelled out on lists of tokens."""
    channels, height, width = x.shape
    x = x.reshape(channels, -1).T  # [N, C]
    size = torch.ones(len(x), dtype=x.dtype)
    groups = [[position] for position in range(len(x))]
    left_behind = {}
    for index, block in enumerate(stage.blocks):
        mixer = block.token_mixer
        qkv = mixer.qkv(block.norm1(x)).reshape(len(x), 3, mixer.num_heads, -1)
        q, k, v = qkv.permute(1, 2, 0, 3)  # [H, N, D]
        sizes_count = method.proportional_attention
        attn = q @ k.transpose(1, 2) * mixer.head_dim**-0.5 + (size.log() if sizes_count else 0)
        attn = attn.softmax(-1)
        x = block.res_scale1(x) + block.layer_scale1(mixer.proj((attn @ v).transpose(0, 1).reshape(len(x), -1)))
        before, metric, scores = x, k.mean(0), attn.mean((0, 1)).tolist()
        if isinstance(method, tokcomp.ToMe):
            rate = min(method.r[index] if isinstance(method.r, tuple) else method.r, len(x) // 2)
            slots = rules.into_odds(rules.cosines(metric, metric), 0, rules.highest(rate))
            x, size = rules.means(x, size, slots), torch.stack([size[slot].sum() for slot in slots])
        else:
            options = dict(pipeline=method.pipeline, num_prefix=0, weighted=method.similarity_weighted_size)
            x, size, slots = rules.diffrate_step(x, size, scores, PRUNE[index], MERGE[index], **options)
        gone = set(range(len(before))).difference(*slots)
        left_behind.update({position: before[token] for token in gone for position in groups[token]})
        groups = [[position for token in slot for position in groups[token]] for slot in slots]
        x = block.res_scale2(x) + block.layer_scale2(block.mlp(block.norm2(x)))
    out = torch.empty(height * width, channels, dtype=x.dtype)
    for token, group in zip(x, groups, strict=True):
        out[group] = token
    for position, token in left_behind.items():
        out[position] = token
    return out.T.reshape(channels, height, width)


@torch.no_grad()
def naive_logits(model, images, method):
    x = model.stages[1](model.stages[0](model.stem(images)))
    stage = model.stages[2]
    x = torch.stack([walk_stage(stage, image, method) for image in stage.downsample(x)])
    for following in model.stages[3:]:
        x = following(x)
    return model.forward_head(x)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_naive_pass(method):
    model, method = caformer().double(), METHODS[method]
    images = images_of(model).double()
    expected = naive_logits(model, images, method)
    # Two float64 passes of a few hundred operations each, on outputs of order 1.
    torch.testing.assert_close(tokcomp.compress(model, method)(images), expected, atol=1e-11, rtol=0)
    torch.testing.assert_close(model.float()(images.float()).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["merge", "prune_merge"])
def test_every_variant_is_the_naive_pass(variant, method):
    model, method = caformer(seed=1, **VARIANTS[variant]).double(), METHODS[method]
    images = images_of(model, seed=1).double()
    expected = naive_logits(model, images, method)
    torch.testing.assert_close(tokcomp.compress(model, method)(images), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_compressing_nothing_is_timm(variant):
    model = caformer(**VARIANTS[variant])
    images = images_of(model)
    keep = tokcomp.DiffRate(tokcomp.CompressionSchedule([TOKENS] * 4, [TOKENS] * 4), metric="image_attn")
    with torch.no_grad():
        expected = model(images)
        for method in (keep, tokcomp.ToMe(0)):
            # The same sums in another order: a few float32 roundings of outputs of order 1.
            torch.testing.assert_close(tokcomp.compress(model, method)(images), expected, atol=2e-5, rtol=0)


def test_only_the_third_stage_changes():
    model = caformer()
    classes = {name: type(module) for name, module in model.named_modules()}
    tokcomp.compress(model, DIFFRATE)
    changed = {name for name, module in model.named_modules() if type(module) is not classes[name]}
    blocks = {f"stages.2.blocks.{index}" for index in range(4)}
    assert changed == {"stages.2"} | blocks | {f"{name}.token_mixer" for name in blocks}
    assert isinstance(model, MetaFormer) and isinstance(model.stages[2].blocks[0].token_mixer, Attention)


def test_feature_maps_keep_their_grid():
    model = caformer()
    images = images_of()
    with torch.no_grad():
        plain = model.forward_features(images)
        tokcomp.compress(model, DIFFRATE)
        features = model.forward_features(images)
        assert features.shape == plain.shape
        assert torch.equal(model.forward_head(features), model(images))
        if hasattr(model, "forward_intermediates"):
            last, maps = model.forward_intermediates(images)
            assert torch.equal(last, features)
            assert [tuple(each.shape[1:]) for each in maps] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (48, 2, 3)]
            # Ten tokens are left, so that many values per channel at most.
            assert len(torch.unique(maps[2][0].flatten(1), dim=1).T) == 10


def test_pruned_positions_keep_what_they_had_when_they_were_pruned():
    model = caformer().double()
    images = images_of().double()
    schedule = tokcomp.CompressionSchedule([24, 10, 10, 10], [24] * 4)
    tokcomp.compress(model, tokcomp.DiffRate(schedule, metric="image_attn", pipeline="prune"))
    seen = []
    model.stages[2].blocks[1].register_forward_hook(
        lambda block, args, kwargs, out: seen.append(kwargs["state"].before), with_kwargs=True
    )
    grids = []
    model.stages[2].register_forward_hook(lambda stage, args, out: grids.append(out.flatten(2).transpose(1, 2)))
    with torch.no_grad():
        model(images)
    source = tokcomp.trace(model, images)[-1]
    assert (source < 0).sum(1).tolist() == [14, 14, 14]
    assert torch.equal(grids[0][source < 0], seen[0][source < 0])


def test_evit_gives_fused_positions_the_fused_token():
    model, images = caformer().double(), images_of().double()
    tokcomp.compress(model, tokcomp.EViT(num_pruned=3))
    grids = []
    model.stages[2].register_forward_hook(lambda stage, args, out: grids.append(out.flatten(2).transpose(1, 2)))
    with torch.no_grad():
        model(images)
    source = tokcomp.trace(model, images)[-1]
    assert source.min() == 0 and int(source.max()) == TOKENS - 4 * (3 - 1) - 1  # every block fuses three into one
    for grid, slots in zip(grids[0], source, strict=True):
        fused = slots == slots.max()
        assert fused.sum() >= 3 and len(torch.unique(grid[fused], dim=0)) == 1


def test_trace_and_pictures():
    model = caformer()
    images = images_of()
    plain = tokcomp.trace(model, images)
    assert len(plain) == 4 and all(torch.equal(each, torch.arange(TOKENS).expand(3, -1)) for each in plain)
    maps = tokcomp.trace(tokcomp.compress(model, METHODS["merge_prune"]), images)
    assert [int(each.max()) + 1 for each in maps] == [20, 16, 12, 9]
    assert all(each.shape == (3, TOKENS) for each in maps)
    assert (maps[-1] < 0).any()
    drawing = draw_blocks(model, images[0], images[0].sigmoid(), blocks=[0, 3], cell=10)
    assert drawing.size == (3 * 60 + 20, 26 + 40)
    odd = images_of(height=75, width=110)  # a 5 x 7 grid that no whole number of pixels fits
    assert tokcomp.trace(model, odd)[0].shape == (3, 35)
    assert draw_blocks(model, odd[0], odd[0].sigmoid(), blocks=[0], cell=10).size == (2 * 70 + 10, 26 + 50)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(64, 64), (75, 110), (32, 32), (128, 96)])
def test_any_image_size_and_batch(method, size):
    model, method = caformer(), METHODS[method]
    images = images_of(height=size[0], width=size[1], batch=2)
    tokens = model.stages[:2](model.stem(images))
    tokens = model.stages[2].downsample(tokens).flatten(2).shape[2]
    with torch.no_grad():
        both = tokcomp.compress(model, method)(images)
        assert both.isfinite().all()
        torch.testing.assert_close(model(images[:1]), both[:1], atol=1e-5, rtol=0)
    assert tokcomp.trace(model, images)[0].shape == (2, tokens)


def test_an_empty_batch_passes_the_stage():
    model = tokcomp.compress(caformer(), METHODS["prune_merge"])
    with torch.no_grad():
        assert model.stages[2](torch.empty(0, 16, 8, 12)).shape == (0, 32, 4, 6)


# ToMe's keys lie so close to each other here that eight bits change most images' pairs.
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("merge", torch.bfloat16),
        ("merge", torch.float16),
        ("prune_merge", torch.bfloat16),
        ("prune_merge", torch.float16),
        ("tome", torch.float16),
    ],
)
def test_half_precision(method, dtype):
    model = tokcomp.compress(caformer(), METHODS[method])
    images = images_of(batch=9)
    with torch.no_grad():
        full = model(images)
        logits = copy.deepcopy(model).to(dtype)(images.to(dtype))
        with torch.autocast("cpu", dtype):
            cast = model(images)
    assert logits.dtype == cast.dtype == dtype and logits.isfinite().all() and cast.isfinite().all()
    # A rounding may change which tokens merge, so the middle image is compared: some tens of roundings of 8 or 11 bits.
    for half in (logits, cast):
        assert ((half - full).norm(dim=1) / full.norm(dim=1)).median() < 25 * torch.finfo(dtype).eps


@pytest.mark.slow
def test_compile():
    """One graph with its gradient serves every batch."""
    torch._dynamo.reset()
    model = tokcomp.compress(caformer(depths=(1, 1, 2, 1)), METHODS["tome"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (4, 2):  # not 3 first: PyTorch would take batch and channels for one size
        images = images_of(batch=batch, seed=batch)
        torch._dynamo.mark_dynamic(images, 0)
        with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
            logits = compiled(images)
        torch.testing.assert_close(logits, model(images), atol=2e-5, rtol=0)
        grads = []
        for out in (logits, model(images)):
            model.zero_grad()
            out.sum().backward()
            grads.append(model.stem.conv.weight.grad.clone())
        torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-3)
