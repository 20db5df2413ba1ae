"""tokcomp.export to ONNX: the operators' plain forms, and files run by ONNX Runtime and OpenVINO."""

from __future__ import annotations

import collections
import copy

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp.assets import tokcomp_digits_vit
from tokcomp.data import held_out_digits
from tokcomp.deploy.onnx_forms import FORMS
from torch import nn

from tests.families.table import FAMILIES
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import samples

BATCHES = (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "attention_received", "prune_merge", "tome_merge", "unmerge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forms_are_the_operators(name, dtype):
    form = FORMS[getattr(torch.ops.tokcomp, name).default]
    for sample in samples(name, dtype):
        assert_right(sample, form(*sample.args, **sample.kwargs))


def schedule(num_tokens):
    """Each of two blocks prunes one token and merges two."""
    kept = [num_tokens - 3 * block for block in (1, 2)]
    return tokcomp.CompressionSchedule([count + 2 for count in kept], kept)


def vit(**options):
    torch.manual_seed(0)
    settings = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    return VisionTransformer(**settings | options).eval()


def family(library, name):
    return next(one for one in FAMILIES if (one.library, one.name) == (library, name)).build()


CASES = {
    "class token": lambda: (vit(), tokcomp.DiffRate(schedule(17))),
    "average pooling": lambda: (
        vit(class_token=False, global_pool="avg"),
        tokcomp.DiffRate(schedule(16), pipeline="merge_prune"),
    ),
    "EViT": lambda: (vit(), tokcomp.EViT(0.7, blocks=(0, 1))),
    "rotary places": lambda: (family("timm", "EVA02"), tokcomp.ToMe(3)),
    "transformers": lambda: (family("transformers", "CLIP's vision tower"), tokcomp.ToMe(3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_runtimes_agree(case, tmp_path):
    """Each runtime may be as far from float64 as four times what float32 in PyTorch is at most, over several inputs."""
    onnx = _needed()
    model, method = CASES[case]()
    tokcomp.compress(model, method)
    exact = copy.deepcopy(model).double()
    path = tokcomp.export(model, tmp_path / "model.onnx", batch=2)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 18)] and not proto.functions
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    assert {node.domain for node in proto.graph.node} == {""} and not any("Scatter" in kind for kind in kinds)
    assert kinds["TopK"] and kinds["MatMul"]
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["tokcomp_method"].startswith(type(method).__name__) and facts["tokcomp_width"] == "32"

    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(batch, 3, 32, 32, generator=generator) for batch in (*BATCHES, 8)]
    first = lambda output: output if isinstance(output, torch.Tensor) else output[0]  # noqa: E731
    loss = max((first(model(one)).double() - first(exact(one.double()))).abs().max() for one in draws)
    for run in (_onnxruntime(path), _openvino(path)):
        for images in draws[: len(BATCHES)]:
            want, have = first(exact(images.double())), run(images)
            assert (have - want).abs().max() <= 4 * loss
            assert torch.equal(have.argmax(-1), want.argmax(-1))


@pytest.mark.slow
@torch.no_grad()
def test_linear_layers_in_int8(tmp_path):
    """On the trained model of digits: the products by weights are integers, and the answers stay."""
    onnx = _needed()
    pytest.importorskip("onnxruntime")
    pytest.importorskip("sklearn")
    model = tokcomp.compress(tokcomp_digits_vit(pretrained=True).eval(), tokcomp.ToMe(8))
    path = tokcomp.export(model, tmp_path / "int8.onnx", quantize="int8")
    assert path.stat().st_size < 0.4 * sum(4 * one.numel() for one in model.parameters())
    proto = onnx.load(path)
    kinds = collections.Counter(node.op_type for node in proto.graph.node)
    assert kinds["MatMulInteger"] == sum(isinstance(one, nn.Linear) for one in model.modules())
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", 18)]
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert facts["tokcomp_quantize"] == "int8" and not any(name.startswith("onnx.") for name in facts)
    images, _ = held_out_digits()
    images = images[:256].contiguous()
    exact, coarse = model(images).double(), _onnxruntime(path)(images)
    assert ((coarse - exact).norm() / exact.norm()).item() > 1e-4  # integers indeed
    assert (coarse.argmax(1) == exact.argmax(1)).double().mean() >= 0.98


class Order(nn.Module):
    """One operator's source map and sizes for each image, as numbers."""

    def __init__(self, name, *counts):
        super().__init__()
        self.stem, self.name, self.counts = nn.Conv2d(3, 1, 1, bias=False), name, counts
        nn.init.ones_(self.stem.weight)

    def forward(self, images):
        x = self.stem(images)[:, 0]  # [B, N, C]
        by = x[:, :, 0] if self.name == "prune_merge" else x
        _, size, source = getattr(torch.ops.tokcomp, self.name)(x, by, *self.counts)
        return torch.cat((size, source.to(size.dtype)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [("prune_merge", 9, 5), ("tome_merge", 4)], ids=lambda one: one[0])
@torch.no_grad()
def test_ties_go_to_the_lower_index(operator, tmp_path):
    """Tokens of two kinds in turn: half of them tie in importance, and those that merge have a choice of equals."""
    _needed()
    model = Order(*operator).eval()
    kinds = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # products of these are exact in any order of sums
    images = kinds[torch.randint(2, (3, 17), generator=torch.Generator().manual_seed(0))][:, None].expand(-1, 3, -1, -1)
    images = images.contiguous()
    path = tokcomp.export(model, tmp_path / "ties.onnx", img_size=(17, 2))
    want = model(images).double()
    for run in (_onnxruntime(path), _openvino(path)):
        assert torch.equal(run(images), want)


def _needed():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnx")


def _onnxruntime(path):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]).double()


def _openvino(path):
    core = pytest.importorskip("openvino").Core()
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy()).double()
