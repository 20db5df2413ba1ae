"""What torch asks of a custom operator: opcheck, compile, export, autocast, meta."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import NAMES, SHARED
from tokcomp_kernels import _schema
from tokcomp_kernels.testing import samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: opcheck traces each sample several times; these cover optional inputs, layouts and empty batches.
OPCHECKED = ("N33", "N9", "B0", "ties", "prefix", "last-dim-strided", "transposed", "strided", "r0", "M0", "all-masked")
COMPILED = [operator.name for operator in _schema.OPERATORS if operator.public]


@pytest.mark.slow
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(op: str, requires_grad: bool) -> None:
    operator = _schema.BY_NAME[op]
    if requires_grad and not operator.differentiable:
        pytest.skip("no gradient")
    overload = getattr(torch.ops.tokcomp, op).default
    checked = 0
    for sample in samples(op, torch.float32, DEVICE):
        if not sample.id.startswith(OPCHECKED):
            continue
        args = list(sample.args)
        if requires_grad:
            args[0] = args[0].detach().requires_grad_()
        torch.library.opcheck(overload, tuple(args), sample.kwargs)
        checked += 1
    assert checked >= 2


@pytest.mark.slow
@pytest.mark.parametrize("op", COMPILED)
def test_compiles_whole_with_a_dynamic_batch(op: str) -> None:
    sample = next(s for s in samples(op, torch.float32, DEVICE) if s.id.startswith("N33"))
    schema = getattr(torch.ops.tokcomp, op).default._schema.arguments

    def call(*args: object) -> torch.Tensor:
        outputs = getattr(torch.ops.tokcomp, op)(*args, **sample.kwargs)
        return (outputs[0] if isinstance(outputs, tuple) else outputs) * 2

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 1):
        args = [
            value[:batch] if isinstance(value, torch.Tensor) and argument.name not in SHARED else value
            for value, argument in zip(sample.args, schema, strict=False)
        ]
        sizes = {name: value for name, value in sample.kwargs.items() if isinstance(value, torch.Tensor)}
        if sizes and batch != 2:
            continue
        assert torch.equal(compiled(*args), call(*args))


@pytest.mark.slow
def test_compiles_with_inductor_and_a_gradient() -> None:
    q, k, v = (torch.randn(2, 2, 9, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    importance = torch.rand(2, 9, device=DEVICE)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = torch.ops.tokcomp.attention(q, k, v)
        x, _, _ = torch.ops.tokcomp.prune_merge(out.transpose(1, 2).reshape(2, 9, 16), importance, 8, 5)
        return x.square().sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    have = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


def test_exports_with_a_dynamic_batch() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
            x, size, source = torch.ops.tokcomp.prune_merge(x, importance, 20, 12)
            return torch.ops.tokcomp.unmerge(x * size[:, :, None], source)

    batch = torch.export.Dim("batch", min=1, max=64)
    inputs = torch.randn(3, 25, 8, device=DEVICE), torch.rand(3, 25, device=DEVICE)
    program = torch.export.export(Block(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    fresh = torch.randn(5, 25, 8, device=DEVICE), torch.rand(5, 25, device=DEVICE)
    assert torch.equal(program.module()(*fresh), Block()(*fresh))


@pytest.mark.parametrize("op", ["attention", "masked_attention"])
def test_autocast_lowers_q_k_v_alone(op: str) -> None:
    q, k, v = (torch.randn(2, 2, 9, 8, device=DEVICE) for _ in range(3))
    size = torch.rand(2, 9, device=DEVICE) + 0.5
    mask = (torch.ones(2, 9, device=DEVICE),) if op == "masked_attention" else ()
    call = getattr(torch.ops.tokcomp, op)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out, cls_attn = call(q, k, v, *mask, size=size)
    want, want_cls = call(q.bfloat16(), k.bfloat16(), v.bfloat16(), *mask, size=size)
    assert out.dtype == torch.bfloat16
    assert cls_attn.dtype == torch.float32
    assert torch.equal(out, want)
    assert torch.equal(cls_attn, want_cls)


def test_autocast_lowers_what_attention_is_received_from() -> None:
    q, k = torch.randn(2, 2, 2, 9, 8, device=DEVICE).unbind()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        received = torch.ops.tokcomp.attention_received(q, k)
    assert received.dtype == torch.float32
    assert torch.equal(received, torch.ops.tokcomp.attention_received(q.bfloat16(), k.bfloat16()))


def test_autocast_keeps_softmax_in_float32_and_merging_as_it_is() -> None:
    scores, mask = torch.randn(1, 2, 5, 5, device=DEVICE).bfloat16(), torch.ones(1, 5, device=DEVICE)
    x, importance = torch.randn(1, 5, 8, device=DEVICE), torch.rand(1, 5, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.ops.tokcomp.masked_softmax(scores, mask).dtype == torch.float32
        assert torch.ops.tokcomp.prune_merge(x, importance, 4, 3)[0].dtype == torch.float32
