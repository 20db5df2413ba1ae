"""Switching between degrees while a model serves."""

from __future__ import annotations

import copy
import gc
import random
import threading

import pytest
import tokcomp
import torch
from tokcomp.fastpath import packing
from tokcomp.tocom.degrees import diffrate_degrees, flops_by

from tests.tocom.conftest import IMAGES, qkv_weights, same_bits

DEGREES = [0, 1, 3, 4]
needs_packing = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


def folded_by_hand(model, plugin, source, degree, method, images=IMAGES):
    """A model of its own for one degree."""
    twin = copy.deepcopy(model)
    plugin.fold(twin, source, degree)
    with torch.no_grad():
        return tokcomp.compress(twin, method)(images)


METHODS = {
    "tome": (tokcomp.ToMe, tokcomp.ToMe),
    "pitome": (tokcomp.PiToMe, tokcomp.PiToMe),
    "evit": (tokcomp.EViT, lambda degree: tokcomp.EViT(num_pruned=degree)),
    "function": (lambda degree: tokcomp.ToMe(degree, prop_attn=False), lambda d: tokcomp.ToMe(d, prop_attn=False)),
    "mapping": ({degree: tokcomp.ToMe([degree, 0, 0, 1]) for degree in DEGREES}, lambda d: tokcomp.ToMe([d, 0, 0, 1])),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("source", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_each_degree_is_the_model_folded_for_it(make_vit, make_plugin, case, source, dtype):
    method, by_hand = METHODS[case]
    model, images = make_vit().to(dtype), IMAGES.to(dtype)
    plugin, before = make_plugin(model), qkv_weights(model)
    switchable = tokcomp.Switchable(model, plugin, source, DEGREES, method)
    seen = []
    for degree in random.Random(0).sample(DEGREES * 2, 8):
        switchable.set_degree(degree)
        assert switchable.degree == degree
        logits = switchable(images)
        assert torch.equal(logits, folded_by_hand(model, plugin, source, degree, by_hand(degree), images))
        assert torch.equal(logits, switchable(images, degree)) and not logits.requires_grad
        seen.append(logits)
    assert len({str(logits) for logits in seen}) == len(DEGREES)
    assert same_bits(qkv_weights(model), before) and type(model) is type(make_vit())


def test_it_is_made_from_compressed_models_too(make_vit, make_plugin):
    model = tokcomp.compress(make_vit(), tokcomp.EViT(0.5, blocks=(1,)))
    plugin = make_plugin(model)
    with torch.no_grad():
        before = model(IMAGES)
        switchable = tokcomp.Switchable(model, plugin, degrees=(4, 0))
        assert switchable.degree == 4 and switchable.degrees == [4, 0]
        assert switchable.method(4).r == 4
        switchable(IMAGES)
        assert torch.equal(model(IMAGES), before)
        tokcomp.restore(model)
        assert torch.equal(switchable(IMAGES), folded_by_hand(model, plugin, 0, 4, tokcomp.ToMe(4)))


def test_one_copy_of_what_is_shared(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    switchable = tokcomp.Switchable(model, plugin, 1, DEGREES)
    own = {name: parameter for name, parameter in model.named_parameters()}
    for degree, served in switchable._models.items():
        for name, parameter in served.named_parameters():
            assert (parameter is own[name]) == (degree == 1 or not name.endswith("qkv.weight")), (degree, name)
    with torch.no_grad():
        before = switchable(IMAGES, 3)
        model.head.bias.add_(1)
        torch.testing.assert_close(switchable(IMAGES, 3), before + 1)
        model.blocks[0].mlp.fc1.weight.mul_(2)
        expected = folded_by_hand(model, plugin, 1, 3, tokcomp.ToMe(3))
        assert torch.equal(switchable(IMAGES, 3), expected)


@pytest.mark.slow
@needs_packing
def test_packed_weights_are_there_in_advance_and_shared(make_vit, make_plugin, monkeypatch):
    model = make_vit()
    plugin, packs = make_plugin(model), []
    original = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *args: packs.append(1) or original(*args))
    switchable = tokcomp.Switchable(model, plugin, 0, DEGREES)
    assert len(packs) == 17 + 3 * 4  # the model once, and the qkv of each other degree
    for degree in DEGREES:
        switchable.set_degree(degree)
        switchable(IMAGES)
    with torch.no_grad():
        tokcomp.compress(model, tokcomp.ToMe(2))(IMAGES)
    assert len(packs) == 29
    memory = switchable.memory()
    weight = 4 * 72 * 24 * 4
    assert memory[0] == 0
    for degree in DEGREES[1:]:
        assert 2 * weight <= memory[degree] <= 4 * weight  # as it is, and packed: oneDNN may pad
    with torch.no_grad():  # a write behind autograd's back to a shared weight reaches every degree
        model.blocks[2].mlp.fc2.weight.data.mul_(1.5)
        for degree in DEGREES:
            assert torch.equal(
                switchable(IMAGES, degree), folded_by_hand(model, plugin, 0, degree, tokcomp.ToMe(degree))
            )
    gc.collect()
    alive = len(packing._cache)
    del switchable
    gc.collect()
    assert len(packing._cache) == alive - len(DEGREES)


def test_memory_without_packed_weights(make_vit, make_plugin):
    model = make_vit().double()
    switchable = tokcomp.Switchable(model, make_plugin(model), 0, DEGREES)
    switchable.prepare(IMAGES.double())
    assert switchable.memory() == {0: 0, **{degree: 4 * 72 * 24 * 8 for degree in DEGREES[1:]}}


def test_threads(make_vit, make_plugin):
    """Every answer is that of one degree from end to end, whatever other threads run and switch meanwhile."""
    model = make_vit()
    plugin = make_plugin(model, std=1.0)
    switchable = tokcomp.Switchable(model, plugin, 0, DEGREES)
    expected = {degree: switchable(IMAGES, degree) for degree in DEGREES}
    distances = [(expected[a] - expected[b]).abs().max() for a in DEGREES for b in DEGREES if a < b]
    assert min(distances) > 1e-2
    stop, answers, failures = threading.Event(), [], []

    def serve():
        try:
            while not stop.is_set():
                answers.append(switchable(IMAGES))
        except BaseException as error:
            failures.append(error)

    def serve_own(degree):
        try:
            for _ in range(20):
                assert torch.equal(switchable(IMAGES, degree), expected[degree])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    threads += [threading.Thread(target=serve_own, args=(degree,)) for degree in (1, 4)]
    for thread in threads:
        thread.start()
    draw = random.Random(0)
    while any(thread.is_alive() for thread in threads[3:]) or len(answers) < 60:
        switchable.set_degree(draw.choice(DEGREES))
        stop.wait(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    found = {degree for degree in DEGREES for answer in answers if torch.equal(answer, expected[degree])}
    assert all(any(torch.equal(answer, one) for one in expected.values()) for answer in answers)
    assert len(found) > 1


def test_a_batch_keeps_the_degree_it_started_with(make_vit, make_plugin):
    model = make_vit()
    switchable = tokcomp.Switchable(model, make_plugin(model), 0, DEGREES)
    expected = switchable(IMAGES, 3)
    switchable.set_degree(3)
    handle = model.norm.register_forward_pre_hook(lambda *_: switchable.set_degree(0))
    assert torch.equal(switchable(IMAGES), expected)
    handle.remove()
    assert switchable.degree == 0 and torch.equal(switchable(IMAGES), switchable(IMAGES, 0))


# ---- what a degree means


def test_schedules_as_degrees(make_vit, make_plugin):
    model = make_vit()
    dear = tokcomp.CompressionSchedule([17, 16, 15, 15], [17, 16, 15, 14])
    middle = tokcomp.CompressionSchedule([17, 14, 12, 11], [17, 13, 12, 11])
    cheap = tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 9, 6, 5], [17, 8, 6, 5]), metric="cls_attn_v")
    degrees = diffrate_degrees(model, [cheap, dear, middle])
    assert list(degrees) == [0, 1, 2, 3]
    costs = [flops_by(model, method) for method in degrees.values()]
    assert costs == sorted(costs, reverse=True) and costs[0] == tokcomp.flops(model)
    assert degrees[1].schedule == dear and degrees[3] is cheap
    plugin = make_plugin(model, max_degree=3)
    switchable = tokcomp.Switchable(model, plugin, 1, list(degrees), degrees)
    for degree, method in degrees.items():
        assert torch.equal(switchable(IMAGES, degree), folded_by_hand(model, plugin, 1, degree, method))
    with pytest.raises(ValueError, match=r"schedules must differ in cost, got two of .* at 0 and 1"):
        diffrate_degrees(model, [dear, dear])
    with pytest.raises(ValueError, match="must have one entry per block"):
        diffrate_degrees(model, [tokcomp.CompressionSchedule([17], [17])])
    assert type(model) is type(make_vit())


WRONG = {
    "unknown": (ValueError, r"degrees must be from 0 to 4, got 5", dict(degrees=[0, 5])),
    "twice": (ValueError, r"one or more different ones, got \[1, 1\]", dict(degrees=[1, 1])),
    "none": (ValueError, r"one or more different ones, got \[\]", dict(degrees=[])),
    "float": (TypeError, r"degrees must be integers, got 1\.0", dict(degrees=[0, 1.0])),
    "source": (ValueError, "source must be a degree from 0 to 4, got 9", dict(source=9)),
    "scale": (ValueError, "scale must be finite, got inf", dict(scale=float("inf"))),
    "method": (
        TypeError,
        "method must be ToMe, PiToMe, ToMeMLP, EViT, or a mapping or function .* got ToMe",
        dict(method=tokcomp.ToMe(3)),
    ),
    "class": (
        TypeError,
        "method must be ToMe, PiToMe, ToMeMLP, EViT, or a mapping or function .* got DiffRate",
        dict(method=tokcomp.DiffRate),
    ),
    "gap": (
        ValueError,
        r"method must have an entry for each degree, got none for 2: \[0\]",
        dict(method={0: tokcomp.ToMe(0)}),
    ),
    "no method": (
        TypeError,
        "method must give a Method for each degree, got 0 for 0",
        dict(method=lambda degree: degree),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(make_vit, make_plugin, case):
    error, message, options = WRONG[case]
    model = make_vit()
    before = qkv_weights(model)
    with pytest.raises(error, match=message):
        tokcomp.Switchable(model, make_plugin(model), **{"degrees": [0, 2], **options})
    assert same_bits(qkv_weights(model), before) and type(model) is type(make_vit())


def test_models_that_cannot_be_switched(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    with pytest.raises(TypeError, match="tocom must be a ToCom, got str"):
        tokcomp.Switchable(model, "plugin")
    with pytest.raises(ValueError, match=r"must be in evaluation mode, got one in training mode: call model\.eval"):
        tokcomp.Switchable(make_vit().train(), plugin, degrees=[0, 2])
    with pytest.raises(ValueError, match="made for 4 blocks of width 24, got a model of 5 blocks"):
        tokcomp.Switchable(make_vit(depth=5), plugin, degrees=[0, 2])
    plugin.method = "evit"
    with pytest.raises(ValueError, match="trained with the method evit, got a model compressed by tome"):
        tokcomp.Switchable(model, plugin, degrees=[0, 2])
    plugin.fold(model, 0, 2)
    with pytest.raises(ValueError, match=r"no plugin folded in, got one with degree 0 to 2 at scale 0\.1: unfold it"):
        tokcomp.Switchable(model, plugin, degrees=[0, 2])


def test_unknown_degrees(make_vit, make_plugin):
    model = make_vit()
    switchable = tokcomp.Switchable(model, make_plugin(model), degrees=[0, 2])
    for wrong in (1, True, "2", None, 2.0, [2]):
        with pytest.raises(ValueError, match="degree must be one of 0, 2, got"):
            switchable.set_degree(wrong)
    with pytest.raises(ValueError, match="degree must be one of 0, 2, got 4"):
        switchable(IMAGES, 4)
    assert repr(switchable) == "Switchable(source=0, degrees=[0, 2], degree=0)"
