"""compress and restore as a user's program meets them: in place, reversible, and unnoticed by everything around."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.threads import in_threads


def class_names(model):
    return [type(module) for module in model.modules()]


def test_compress_returns_the_model_and_leaves_it_a_vision_transformer(make_vit, method, images_for):
    model = make_vit()
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    assert tokcomp.compress(model, method) is model
    assert isinstance(model, VisionTransformer)
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert model(images_for(model)).shape == (3, 5)


def test_restore_gives_back_the_very_model(make_vit, method, images_for):
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


def test_second_compress_replaces_the_first(make_vit, methods, images_for):
    model = make_vit()
    images = images_for(model)
    expected = tokcomp.compress(make_vit(), methods["tome"])(images)
    for name in ("diffrate", "evit", "tome"):
        tokcomp.compress(model, methods[name])
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
def test_compressing_nothing_changes_nothing(make_vit, nothing, no_grad, images_for):
    model = make_vit()
    images = images_for(model)
    with torch.set_grad_enabled(not no_grad):
        expected = model(images)
        ours = tokcomp.compress(model, nothing)(images)
    # The same sums in another order: a few float32 roundings of logits of order 1.
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    arange = torch.arange(17).expand(3, -1)
    assert all(torch.equal(source, arange) for source in tokcomp.trace(model, images))


def test_deepcopy_and_pickle(make_vit, method, images_for):
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


def test_pickle_does_not_grow(make_vit, methods, images_for):
    model = make_vit()
    plain = len(pickle.dumps(model))
    tokcomp.compress(model, methods["diffrate"])
    with torch.no_grad():
        model(images_for(model))
    assert len(pickle.dumps(model)) - plain < 3000


def test_state_dict_moves_between_plain_and_compressed(make_vit, method, images_for):
    model = tokcomp.compress(make_vit(0), method)
    other = make_vit(1)
    images = images_for(model)
    with torch.no_grad():
        model(images)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(images), tokcomp.compress(other, method)(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_changes(make_vit, method, dtype, images_for):
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


def test_replication(make_vit, method, images_for):
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

    def work(index):
        with torch.no_grad():
            return replicas[index](images[2 * index : 2 * index + 2])

    torch.testing.assert_close(torch.cat(in_threads(work, range(2))), expected, atol=2e-5, rtol=0)


def test_threads_share_a_model(make_vit, method, images_for):
    model = tokcomp.compress(make_vit(), method)
    batches = [images_for(model, batch=1 + index % 3, seed=index) for index in range(12)]
    with torch.no_grad():
        expected = [model(batch) for batch in batches]

    def work(offset):
        with torch.inference_mode():
            assert all(torch.equal(model(batches[index]), expected[index]) for index in range(offset, 12, 4))

    in_threads(work, range(4))


def test_image_does_not_depend_on_its_batch(make_vit, method, images_for):
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


def test_hooks_stay_and_fire(make_vit, method, images_for):
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


def test_hook_that_changes_an_output_takes_effect(make_vit, methods, images_for):
    model = tokcomp.compress(make_vit(), methods["diffrate"])
    images = images_for(model)
    with torch.no_grad():
        before = model(images)
        handle = model.blocks[1].mlp.fc2.register_forward_hook(lambda _, __, out: out * 0)
        assert not torch.equal(model(images), before)
        handle.remove()
        assert torch.equal(model(images), before)


def test_training_flags_and_requires_grad_stay(make_vit, method, images_for):
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


def test_weights_shared_between_blocks(make_vit, methods, images_for):
    """ALBERT-style: one Block object at two depths still follows two schedules."""
    shared, separate = make_vit(), make_vit()
    shared.blocks[2] = shared.blocks[1]
    separate.blocks[2].load_state_dict(separate.blocks[1].state_dict())
    images = images_for(shared)
    with torch.no_grad():
        ours = tokcomp.compress(shared, methods["diffrate"])(images)
        assert torch.equal(ours, tokcomp.compress(separate, methods["diffrate"])(images))
    assert type(tokcomp.restore(shared).blocks[1]).__name__ == "Block"


SEVENTEEN = tokcomp.CompressionSchedule([17, 14, 11, 11], [17, 12, 11, 6], num_tokens=17)


def test_a_schedule_for_other_tokens_is_refused_with_the_cure(make_vit, images_for):
    model = make_vit(img_size=64)
    with pytest.raises(ValueError, match=r"for the 65 tokens .*got one for 17; schedule\.rescaled\(65\) keeps"):
        tokcomp.compress(model, tokcomp.DiffRate(SEVENTEEN))
    assert type(model) is type(make_vit())
    tokcomp.compress(model, tokcomp.DiffRate(SEVENTEEN.rescaled(65)))
    counts = [int(source.max()) + 1 for source in tokcomp.trace(model, images_for(model))]
    assert counts == [65, 45, 41, 21]
    with pytest.raises(ValueError, match="one entry per block, got 4 entries for 3 blocks; search one for this depth"):
        tokcomp.compress(make_vit(depth=3), tokcomp.DiffRate(SEVENTEEN))


def test_prefix_tokens_stay_apart(make_vit, images_for):
    from timm.models.deit import VisionTransformerDistilled

    model = make_vit(cls=VisionTransformerDistilled)
    with pytest.raises(ValueError, match=r"got one for 17; schedule\.rescaled\(18, 2\)"):
        tokcomp.compress(model, tokcomp.DiffRate(SEVENTEEN))
    tokcomp.compress(model, tokcomp.DiffRate(SEVENTEEN.rescaled(18, 2)))
    assert [int(source.max()) + 1 for source in tokcomp.trace(model, images_for(model))] == [18, 13, 12, 7]


@pytest.mark.parametrize("call", ["forward", "trace", "train", "grad_checkpointing"])
def test_images_of_another_size_are_noticed(make_vit, call):
    """A model for any image size cannot be asked beforehand."""
    model = tokcomp.compress(make_vit(dynamic_img_size=True), tokcomp.DiffRate(SEVENTEEN))
    fits, larger = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)
    if call == "grad_checkpointing":
        model.set_grad_checkpointing(True)
    if call in ("train", "grad_checkpointing"):
        model.train()
    run = (lambda images: tokcomp.trace(model, images)) if call == "trace" else model
    run(fits)
    with pytest.raises(ValueError, match=r"got one for 17; schedule\.rescaled\(65\)"):
        run(larger)
    tokcomp.compress(model, tokcomp.DiffRate(SEVENTEEN.rescaled(65)))
    run(larger)


def test_patch_dropout_is_not_another_size(make_vit, images_for):
    """In training fewer tokens reach block 0, of images of the right size."""
    model = tokcomp.compress(make_vit(patch_drop_rate=0.25), tokcomp.DiffRate(SEVENTEEN)).train()
    assert model(images_for(model)).shape == (3, 5)
