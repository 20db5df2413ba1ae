"""tokcomp.compile: on CPU as it is, its use of CUDA graphs on stand-ins, and on a GPU for real."""

from __future__ import annotations

import copy
import io
import warnings
from unittest.mock import Mock

import pytest
import timm
import tokcomp
import torch
from tokcomp.deploy.inputs import inputs_of
from tokcomp.deploy.watch import Watch
from torch import nn

from tests.deploy.conftest import eager
from tests.threads import in_threads

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_cpu_it_is_the_model(model, images_for):
    compiled = tokcomp.compile(model, batch=[1, 3])
    assert compiled.batches == [1, 3] and not compiled.training
    for batch in (1, 3, 5, 0):
        images = images_for(model, batch)
        logits = compiled(images)
        assert torch.equal(logits, eager(model, images)) and not logits.requires_grad
    memory = compiled.memory()
    assert memory.graphs == {1: 0, 3: 0} and memory.total == memory.packed
    if torch.backends.mkldnn.is_available():
        assert memory.packed >= sum(block.mlp.fc1.weight.nbytes for block in model.blocks)


@pytest.mark.slow
def test_a_plain_model_and_one_of_torch_compile(make_vit, images_for):
    model = make_vit()
    images = images_for(model)
    assert torch.equal(tokcomp.compile(model, 3)(images), eager(model, images))
    torch._dynamo.reset()
    inner = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(tokcomp.compile(inner, 3)(images), eager(model, images))


def test_autocast_is_the_compiled_model_s_own(model, images_for):
    images = images_for(model)
    plain, mixed = tokcomp.compile(model, 3), tokcomp.compile(model, 3, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(images), plain.model(images).float()) is False
        in_autocast = model(images)
        assert plain(images).dtype == torch.float32
    assert torch.equal(mixed(images), in_autocast) and torch.equal(plain(images), eager(model, images))


def test_replays_graphs(served, model, images_for, stand_in):
    compiled = served()
    memory = compiled.memory()
    assert memory.graphs == {size: 100 + size * 3 * 32 * 32 * 4 for size in (2, 4)}
    stand_in.asked.clear()
    before = compiled.model.eager
    for batch in (4, 2, 4):
        images = images_for(model, batch, seed=batch)
        torch.testing.assert_close(compiled(images), eager(model, images), atol=2e-5, rtol=0)
    assert stand_in.asked.count(("replay on", "own")) == 3 and compiled.model.eager == before


def test_the_largest_is_captured_first(stand_in, served):
    shapes = []
    capture = stand_in.graph

    def noting(*args, **kwargs):
        shapes.append(stand_in.pool)
        return capture(*args, **kwargs)

    stand_in.graph = noting
    compiled = served()
    assert shapes == [0, 100] and compiled._batches == [4, 2]


def test_other_shapes_run_without_and_that_is_said_once(served, model, images_for, stand_in):
    compiled = served()
    images = images_for(model, 3)
    stand_in.asked.clear()
    with pytest.warns(
        UserWarning, match=r"images \[3, 3, 32, 32\] have no CUDA graph .* for 2, 4 images of \[3, 32, 3"
    ):
        logits = compiled(images)
    assert torch.equal(logits, eager(model, images)) and not stand_in.asked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(images_for(model, 5))
    compiled.capture(3)
    assert compiled.batches == [2, 3, 4]
    compiled(images)
    assert ("replay on", "own") in stand_in.asked


@pytest.mark.parametrize("batch, replays", [(1, 1), (3, 1), (4, 1), (9, 3), (11, 3)])
def test_padded(served, model, images_for, stand_in, batch, replays):
    compiled = served(pad=True)
    compiled(torch.full((4, 3, 32, 32), torch.nan))  # what is left in the places does not matter
    images = images_for(model, batch)
    stand_in.asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(images), eager(model, images), atol=2e-5, rtol=0)
    assert stand_in.asked.count(("replay on", "own")) == replays


def test_autocast_on_a_gpu_is_said_to_be_slower(served):
    with pytest.warns(UserWarning, match=r"leaves the fused kernels.*\.to\(torch\.float16\)"):
        served(dtype=torch.float16)


def test_no_images(served):
    assert served(pad=True)(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_weights_written_in_place_count(served, model, images_for, stand_in):
    compiled, images = served(), images_for(model, 2)
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    stand_in.asked.clear()
    torch.testing.assert_close(compiled(images), eager(model, images), atol=2e-5, rtol=0)
    assert stand_in.asked.count(("replay on", "own")) == 1


def replace_weight(model):
    model.blocks[1].mlp.fc1.weight = nn.Parameter(model.blocks[1].mlp.fc1.weight * 1.5)


def replace_memory(model):
    model.head.bias.data = model.head.bias.data + 1


def replace_module(model):
    model.head = nn.Linear(24, 7).eval()


@pytest.mark.parametrize(
    "change, what",
    [
        (replace_weight, "the memory of inner.blocks.1.mlp.fc1.weight"),
        (replace_memory, "the memory of inner.head.bias"),
        (replace_module, "the modules in inner"),
    ],
)
def test_what_was_replaced_is_captured_again(served, model, images_for, change, what):
    compiled, images = served(), images_for(model, 2)
    change(model)
    with pytest.warns(UserWarning, match=f"{what} changed since the model was compiled"):
        logits = compiled(images)
    torch.testing.assert_close(logits, eager(model, images), atol=2e-5, rtol=0)
    assert compiled.batches == [2, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in (2, 4):
            images = images_for(model, batch, seed=1)
            torch.testing.assert_close(compiled(images), eager(model, images), atol=2e-5, rtol=0)


def test_a_model_that_was_converted(served, model, images_for):
    compiled, images = served(), images_for(model, 2)
    model.double()
    with pytest.warns(UserWarning, match="capturing its graphs again"):
        logits = compiled(images.double())
    torch.testing.assert_close(logits, eager(model, images.double()))
    with pytest.raises(TypeError, match="images must be float64, as the model is, got float32"):
        compiled(images)


def test_a_capture_that_fails(served, model, images_for, stand_in):
    compiled, images = served(pad=True), images_for(model, 2)
    replace_weight(model)
    capture = stand_in.graph

    stand_in.graph = Mock(side_effect=torch.OutOfMemoryError("no memory"))
    with pytest.warns(UserWarning, match="capturing"), pytest.raises(torch.OutOfMemoryError):
        compiled(images)
    assert compiled.batches == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(images), eager(model, images))
    stand_in.graph = capture
    compiled.capture(2)
    torch.testing.assert_close(compiled(images), eager(model, images), atol=2e-5, rtol=0)


def test_change_of_method(make_vit, methods):
    model = make_vit()
    watch = Watch(model)
    assert watch.change() is None
    tokcomp.compress(model, methods["tome"])
    assert watch.change() == "its compression method"
    watch = Watch(model)
    tokcomp.compress(model, methods["diffrate"])
    assert watch.change() == "its compression method"
    watch = Watch(model)
    assert watch.change() is None
    tokcomp.restore(model)
    assert watch.change() == "its compression method"


def test_threads(served, model, images_for):
    compiled = served(pad=True)
    batches = [images_for(model, batch, seed=batch) for batch in (1, 2, 3, 4)]
    expected = [eager(model, images) for images in batches]

    def work(index):
        for _ in range(10):
            torch.testing.assert_close(compiled(batches[index]), expected[index], atol=2e-5, rtol=0)

    in_threads(work, range(4))


def test_copies_and_pickles(model, images_for):
    compiled = tokcomp.compile(model, [1, 3], dtype=torch.bfloat16, pad=True)
    images = images_for(model)
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    for other in (copy.deepcopy(compiled), torch.load(file, weights_only=False)):
        assert other.model is not model and repr(other) == repr(compiled)
        assert torch.equal(other(images), compiled(images))
    assert "batch=[1, 3], dtype=torch.bfloat16, pad=True" in repr(compiled)


def test_image_sizes(make_vit):
    assert inputs_of(make_vit(img_size=(32, 48), in_chans=4)).shape == (4, 32, 48)
    assert inputs_of(timm.create_model("caformer_s18").eval()).shape == (3, 224, 224)
    assert inputs_of(make_vit(), (16, 40)).shape == (3, 16, 40)
    assert inputs_of(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), 8).shape == (1, 8, 8)


def on_meta(model):
    return model.to("meta")


def head_trains(model):
    model.head.train()
    return model


def in_parts(model):
    model.head.to("meta")
    return model


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return self.conv(images), images


@pytest.mark.parametrize(
    "build, arguments, error, message",
    [
        (lambda model: "deit", dict(batch=1), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda model: model.train(), dict(batch=1), ValueError, r"got one in training mode: call model.eval\(\)"),
        (head_trains, dict(batch=1), ValueError, "got head in training mode"),
        (on_meta, dict(batch=1), ValueError, "model must have weights, got one on the meta device"),
        (in_parts, dict(batch=1), ValueError, "model must have weights"),
        (lambda model: nn.Identity().eval(), dict(batch=1), ValueError, "must have parameters, got a Identity"),
        (lambda model: Pair().eval(), dict(batch=1), ValueError, "img_size must be given for a Pair"),
        (lambda model: Pair().eval(), dict(batch=1, img_size=8), TypeError, "must return one tensor, got tuple"),
        (lambda model: model, dict(batch=0), ValueError, "batch must be at least 1, got 0"),
        (lambda model: model, dict(batch=[]), ValueError, "batch must name at least one size"),
        (lambda model: model, dict(batch=True), TypeError, "batch must be a whole number, got True"),
        (lambda model: model, dict(batch=[1, 2.0]), TypeError, "batch must be a whole number, got 2.0"),
        (lambda model: model, dict(batch=1, img_size=-1), ValueError, "img_size must be a side or .* got -1"),
        (lambda model: model, dict(batch=1, dtype=torch.int8), TypeError, "dtype must be float16 or bfloat16"),
        (lambda model: model.bfloat16(), dict(batch=1, dtype=torch.float16), TypeError, "dtype must be the weights'"),
    ],
)
def test_refusals(model, build, arguments, error, message):
    with pytest.raises(error, match=message):
        tokcomp.compile(build(model), **arguments)


def test_refused_images(model, images_for):
    compiled = tokcomp.compile(model, 1)
    images = images_for(model, 1)
    for wrong, error, message in (
        (images.numpy(), TypeError, "images must be a Tensor .*, got ndarray"),
        (images[0], ValueError, r"got \[3, 32, 32\]; a single image is a batch with images\[None\]"),
        (images.to("meta"), ValueError, "images must be on cpu, where the model is, got meta"),
        (
            images.half(),
            TypeError,
            r"images must be float32, as the model is, got float16: pass images.to\(torch.float3",
        ),
    ):
        with pytest.raises(error, match=message):
            compiled(wrong)
    with pytest.raises(ValueError, match="a compiled model is for inference"):
        compiled.train()
    model.train()
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        compiled(images)


def test_switchable_is_pointed_at_its_own_graphs(make_vit):
    model = make_vit()
    switchable = tokcomp.Switchable(model, tokcomp.ToCom(model, max_degree=2), degrees=[0, 2])
    with pytest.raises(TypeError, match=r"got Switchable: a Switchable captures its own graphs, call its prepare"):
        tokcomp.compile(switchable, 1)


@on_gpu
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["half", "autocast"])
def test_graphs_on_a_gpu(make_vit, method, images_for, dtype):
    model = tokcomp.compress(make_vit(embed_dim=48), method).cuda()
    if dtype is None:
        model.half()
    compiled = tokcomp.compile(model, [1, 3, 8], dtype=dtype, pad=True)
    assert all(number > 0 for number in compiled.memory().graphs.values())
    for batch in (1, 2, 3, 8, 11):
        images = images_for(model, batch).cuda().to(next(model.parameters()).dtype)
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=dtype is not None):
            expected = model(images)
        atol = 0 if batch in compiled.batches else 2e-2  # another size of batch may take another GEMM
        torch.testing.assert_close(compiled(images), expected, atol=atol, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        images = images_for(model, 3).cuda().to(next(model.parameters()).dtype)
        before = compiled(images)
        with torch.autocast("cuda", torch.float16, enabled=dtype is not None):
            assert torch.equal(before, model(images))
    model.head.weight.data = torch.zeros_like(model.head.weight)
    with pytest.warns(UserWarning, match="capturing its graphs again"):
        assert torch.equal(compiled(images), model.head.bias.to(before.dtype).expand(3, -1))


@on_gpu
def test_threads_on_a_gpu(model, images_for):
    compiled = tokcomp.compile(model.cuda().half(), [1, 4])
    batches = [images_for(model, batch).cuda().half() for batch in (1, 4)]
    expected = [compiled(images) for images in batches]

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert all(torch.equal(compiled(batches[index]), expected[index]) for _ in range(50))

    torch.cuda.synchronize()
    in_threads(work, (0, 1, 0, 1))
