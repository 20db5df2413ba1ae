"""compress and restore as a user's program meets them: in place, reversible, and unnoticed by everything around."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SCHEDULE = tokcomp.CompressionSchedule([17, 14, 11, 11], [17, 12, 11, 6])
METHODS = {
    "diffrate": tokcomp.DiffRate(SCHEDULE),
    "diffrate-image_attn": tokcomp.DiffRate(SCHEDULE, metric="image_attn"),
    "diffrate-cls_attn_v": tokcomp.DiffRate(SCHEDULE, metric="cls_attn_v", pipeline="merge"),
    "diffrate-random": tokcomp.DiffRate(SCHEDULE, metric="random", pipeline="prune"),
    "tome": tokcomp.ToMe(3),
    "evit": tokcomp.EViT(0.6, blocks=(1, 2)),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def images_for(model, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


def class_names(model):
    return [type(module) for module in model.modules()]


def test_compress_returns_the_model_and_leaves_it_a_vision_transformer(make_vit, method):
    model = make_vit()
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    assert tokcomp.compress(model, method) is model
    assert isinstance(model, VisionTransformer)
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert model(images_for(model)).shape == (3, 5)


def test_restore_gives_back_the_very_model(make_vit, method):
    model = make_vit()
    images = images_for(model)
    before, classes = model(images), class_names(model)
    dicts = [dict(vars(module)) for module in model.modules()]
    tokcomp.compress(model, method)
    assert not torch.equal(model(images), before)
    assert tokcomp.restore(model) is model
    assert class_names(model) == classes
    assert [vars(module).keys() for module in model.modules()] == [saved.keys() for saved in dicts]
    assert torch.equal(model(images), before)


def test_restore_of_a_plain_model_does_nothing(make_vit):
    model = make_vit()
    classes = class_names(model)
    assert tokcomp.restore(model) is model and class_names(model) == classes
    other = nn.Linear(2, 2)
    assert tokcomp.restore(other) is other


def test_second_compress_replaces_the_first(make_vit):
    model = make_vit()
    images = images_for(model)
    expected = tokcomp.compress(make_vit(), METHODS["tome"])(images)
    for name in ("diffrate", "evit", "tome"):
        tokcomp.compress(model, METHODS[name])
    assert torch.equal(model(images), expected)
    assert type(tokcomp.restore(model)) is VisionTransformer


@pytest.mark.parametrize("no_grad", [True, False], ids=["no_grad", "grad"])
@pytest.mark.parametrize(
    "nothing",
    [
        tokcomp.DiffRate(tokcomp.CompressionSchedule([17] * 4, [99] * 4)),
        tokcomp.ToMe(0),
        tokcomp.EViT(1.0, blocks=(0, 1)),
        tokcomp.EViT(num_pruned=0),
    ],
    ids=repr,
)
def test_compressing_nothing_changes_nothing(make_vit, nothing, no_grad):
    model = make_vit()
    images = images_for(model)
    with torch.set_grad_enabled(not no_grad):
        expected = model(images)
        ours = tokcomp.compress(model, nothing)(images)
    # The same sums in another order: a few float32 roundings of logits of order 1.
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    arange = torch.arange(17).expand(3, -1)
    assert all(torch.equal(source, arange) for source in tokcomp.trace(model, images))


def test_deepcopy_and_pickle(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)  # also fills whatever is cached
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(saved, weights_only=False),
            copy.deepcopy(copy.deepcopy(model)),
        ]
        for twin in copies:
            assert type(twin) is type(model)
            assert torch.equal(twin(images), expected)
        with torch.no_grad():
            copies[0].head.weight.zero_()
        assert torch.equal(model(images), expected)
        for twin in copies[1:]:
            assert type(tokcomp.restore(twin)) is VisionTransformer
            assert torch.equal(tokcomp.compress(twin, method)(images), expected)


def test_pickle_does_not_grow(make_vit):
    model = make_vit()
    plain = len(pickle.dumps(model))
    tokcomp.compress(model, METHODS["diffrate"])
    with torch.no_grad():
        model(images_for(model))
    assert len(pickle.dumps(model)) - plain < 3000


def test_state_dict_moves_between_plain_and_compressed(make_vit, method):
    model = tokcomp.compress(make_vit(0), method)
    other = make_vit(1)
    images = images_for(model)
    with torch.no_grad():
        model(images)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(images), tokcomp.compress(other, method)(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_changes(make_vit, method, dtype):
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model)
    with torch.no_grad():
        expected = model(images)
        model.to(dtype)
        changed = model(images.to(dtype))
        assert changed.dtype == dtype and changed.isfinite().all()
        if dtype == torch.float64:
            torch.testing.assert_close(changed.float(), expected, atol=2e-5, rtol=0)
            assert torch.equal(model.float()(images), expected)


def test_meta_device(make_vit, method):
    model = tokcomp.compress(make_vit(), method).to("meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


def test_replication(make_vit, method):
    """What DataParallel does to a module: shallow copies whose parameters are plain attributes."""
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model, batch=4)

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            if child is not None:
                replica._modules[name] = replicate(child)
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
        return replica

    with torch.no_grad():
        expected = model(images)
        replicas = [replicate(model), replicate(model)]
        results = [None, None]

        def work(index):
            with torch.no_grad():
                results[index] = replicas[index](images[2 * index : 2 * index + 2])

        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    torch.testing.assert_close(torch.cat(results), expected, atol=2e-5, rtol=0)


def test_threads_share_a_model(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    batches = [images_for(model, batch=1 + index % 3, seed=index) for index in range(12)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    results = [None] * len(batches)

    def work(offset):
        with torch.inference_mode():
            for index in range(offset, len(batches), 4):
                results[index] = model(batches[index])

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))


def test_image_does_not_depend_on_its_batch(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model, batch=5)
    with torch.no_grad():
        together = tokcomp.trace(model, images)
        for index in range(5):
            alone = tokcomp.trace(model, images[index : index + 1])
            assert all(torch.equal(one[0], many[index]) for one, many in zip(alone, together, strict=True))


def test_empty_batch(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    with torch.no_grad():
        assert model(torch.empty(0, 3, 32, 32)).shape == (0, 5)


def test_hooks_stay_and_fire(make_vit, method):
    model = make_vit()
    names = ["", "patch_embed", "blocks.0", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.2.mlp.fc1", "blocks.3.norm2"]
    seen = []
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, args, out, name=name: seen.append((name, out.shape)))
        module.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, None)))
    images = images_for(model)
    with torch.no_grad():
        model(images)
        plain, seen[:] = sorted(name for name, _ in seen), []
        tokcomp.compress(model, method)(images)
        assert sorted(name for name, _ in seen) == plain
        shapes = {name: shape for name, shape in seen if shape is not None}
        assert shapes["blocks.1.attn"] == shapes["blocks.0"] and shapes["blocks.0"][0] == 3
        seen.clear()
        tokcomp.restore(model)(images)
    assert sorted(name for name, _ in seen) == plain


def test_hook_that_changes_an_output_takes_effect(make_vit):
    model = tokcomp.compress(make_vit(), METHODS["diffrate"])
    images = images_for(model)
    with torch.no_grad():
        before = model(images)
        handle = model.blocks[1].mlp.fc2.register_forward_hook(lambda _, __, out: out * 0)
        assert not torch.equal(model(images), before)
        handle.remove()
        assert torch.equal(model(images), before)


def test_training_flags_and_requires_grad_stay(make_vit, method):
    model = make_vit()
    model.blocks[0].train()
    model.cls_token.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    tokcomp.compress(model, method)
    model(images_for(model))
    tokcomp.trace(model, images_for(model))
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted


def test_gradients_reach_every_parameter(make_vit, method):
    model = tokcomp.compress(make_vit().double(), method)
    model(images_for(model).double()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_is_the_slope(make_vit):
    """The change of the loss along a small step, tokens' groups unchanged, against the gradient."""
    model = tokcomp.compress(make_vit().double(), METHODS["diffrate"])
    images = images_for(model).double()
    weight = model.blocks[1].mlp.fc1.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad(model(images).square().sum(), weight)
    step = 1e-6
    with torch.no_grad():
        weight.add_(direction, alpha=step)
        above = model(images).square().sum()
        weight.sub_(direction, alpha=2 * step)
        below = model(images).square().sum()
    # Central difference: error step^2 times the third derivative, and float64 rounding divided by the step.
    torch.testing.assert_close((above - below) / (2 * step), (slope * direction).sum(), rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(make_vit, method):
    model = tokcomp.compress(make_vit().double(), method)
    images = images_for(model).double()
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-12, rtol=1e-9)


def test_training_mode_with_all_dropouts(make_vit, method):
    model = make_vit(
        drop_rate=0.1,
        pos_drop_rate=0.1,
        proj_drop_rate=0.1,
        attn_drop_rate=0.1,
        drop_path_rate=0.2,
        patch_drop_rate=0.2,
    )
    tokcomp.compress(model, method).train()
    images = images_for(model)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    first.sum().backward()
    assert not torch.equal(first, second) and first.isfinite().all()
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_autocast(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        logits.sum().backward()
        with torch.no_grad():
            assert model(images).isfinite().all()
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_compile(make_vit, name):
    torch._dynamo.reset()
    model = tokcomp.compress(make_vit(), METHODS[name])
    dynamic = name in ("diffrate", "tome", "evit")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for batch in (3, 2, 5):
            images = images_for(model, batch, seed=batch)
            torch.testing.assert_close(compiled(images), model(images), atol=2e-5, rtol=0)
    images = images_for(model)
    compiled(images).sum().backward()
    compiled_grad = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(compiled_grad, model.patch_embed.proj.weight.grad, atol=1e-3, rtol=1e-3)


def test_compile_with_inductor(make_vit):
    torch._dynamo.reset()
    model = tokcomp.compress(make_vit(), METHODS["diffrate"])
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        images = images_for(model)
        torch.testing.assert_close(compiled(images), model(images), atol=2e-5, rtol=0)


def test_export(make_vit, method):
    model = tokcomp.compress(make_vit(), method)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model),), dynamic_shapes=({0: batch},))
        images = images_for(model, batch=5, seed=1)
        torch.testing.assert_close(program.module()(images), model(images), atol=2e-5, rtol=0)


def test_block_cannot_run_on_its_own(make_vit):
    model = tokcomp.compress(make_vit(), METHODS["tome"])
    with pytest.raises(RuntimeError, match=r"call the model, or tokcomp\.restore"):
        model.blocks[0](torch.randn(1, 17, 24))
    with pytest.raises(RuntimeError, match="no intermediate feature maps"):
        model.forward_intermediates(images_for(model))
    with pytest.raises(RuntimeError, match="no intermediate feature maps"):
        model.get_intermediate_layers(images_for(model))
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        model(images_for(model), attn_mask=torch.ones(17, 17))


UNSUPPORTED = {
    "swin_tiny_patch4_window7_224": "SwinTransformer",
    "convnext_atto": "ConvNeXt",
    "resnet10t": "ResNet",
    "eva02_tiny_patch14_224": "Eva",
    "beit_base_patch16_224": "Beit",
    "vit_relpos_small_patch16_224": "VisionTransformerRelPos",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_small_patch16_36x1_224": None,
    "cait_xxs24_224": "Cait",
    "caformer_s18": "MetaFormer",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_that_are_not_understood_are_refused_by_name(meta_model, name):
    model = meta_model(name)
    classes = class_names(model)
    if UNSUPPORTED[name] is None:
        assert tokcomp.compress(model, tokcomp.ToMe(4)) is model
        return
    for call in (lambda: tokcomp.compress(model, tokcomp.ToMe(4)), lambda: tokcomp.flops(model)):
        with pytest.raises(tokcomp.UnsupportedModelError, match=UNSUPPORTED[name]):
            call()
    assert class_names(model) == classes


def test_modules_that_are_not_understood_are_refused_by_name(make_vit):
    class OwnAttention(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, **kwargs):
            return self.inner(x, **kwargs)

    class OwnModel(VisionTransformer):
        def forward_features(self, x, **kwargs):
            return super().forward_features(x, **kwargs) * 2

    model = make_vit()
    model.blocks[2].attn = OwnAttention(model.blocks[2].attn)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.2\.attn: OwnAttention cannot be compressed"):
        tokcomp.compress(model, METHODS["tome"])
    assert type(model) is VisionTransformer and type(model.blocks[0]).__name__ == "Block"

    with pytest.raises(tokcomp.UnsupportedModelError, match="OwnModel cannot be compressed: it has a forward_features"):
        tokcomp.compress(make_vit(cls=OwnModel), METHODS["tome"])

    model = make_vit()
    model.blocks[1].forward = lambda x: x
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.1: Block cannot be compressed"):
        tokcomp.compress(model, METHODS["tome"])

    model = make_vit()
    model.blocks[3].mlp.fc1 = nn.Conv1d(24, 96, 3)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"blocks\.3\.mlp\.fc1: a Conv1d mixes tokens"):
        tokcomp.compress(model, METHODS["tome"])


def test_subclass_that_overrides_nothing_is_understood(make_vit):
    class Named(VisionTransformer):
        pass

    model = tokcomp.compress(make_vit(cls=Named), METHODS["tome"])
    assert isinstance(model, Named)
    assert type(tokcomp.restore(model)) is Named


def test_wrappers_are_refused_with_advice(make_vit):
    model = make_vit()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(tokcomp.UnsupportedModelError, match="wraps a VisionTransformer: compress that first"):
            tokcomp.compress(wrapped, METHODS["tome"])


def test_arguments_of_the_wrong_kind(make_vit):
    with pytest.raises(TypeError, match="method must be a DiffRate, ToMe, EViT or other Method object, got int"):
        tokcomp.compress(make_vit(), 8)
    with pytest.raises(TypeError, match="got the class ToMe"):
        tokcomp.compress(make_vit(), tokcomp.ToMe)
    for call in (tokcomp.restore, tokcomp.flops):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            call("deit_small_patch16_224")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        tokcomp.compress("deit_small_patch16_224", METHODS["tome"])


def test_weights_shared_between_blocks(make_vit):
    """ALBERT-style: one Block object at two depths still follows two schedules."""
    shared, separate = make_vit(), make_vit()
    shared.blocks[2] = shared.blocks[1]
    separate.blocks[2].load_state_dict(separate.blocks[1].state_dict())
    images = images_for(shared)
    with torch.no_grad():
        ours = tokcomp.compress(shared, METHODS["diffrate"])(images)
        assert torch.equal(ours, tokcomp.compress(separate, METHODS["diffrate"])(images))
    assert type(tokcomp.restore(shared).blocks[1]).__name__ == "Block"
