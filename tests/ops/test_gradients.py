"""Gradients: numerically on every differentiable operator, and each backend's backward through the dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from tokcomp_kernels._schema import BY_NAME, OPERATORS
from tokcomp_kernels.reference import REFERENCES
from tokcomp_kernels.testing import Sample, samples

DIFFERENTIABLE = [operator.name for operator in OPERATORS if operator.differentiable]
#: Where a small step changes a choice (ties, cosines of exactly 0), or the share of the gradient through the maximum,
#: which is held back, is not small (visible tokens far below a masked maximum). These meet the reference instead.
NOT_SMOOTH = {"ties", "zero-vectors", "special-importance", "bad-sizes", "large", "peaked", "all-masked"}


def _differentiable_inputs(sample: Sample) -> tuple[Sample, list[torch.Tensor]]:
    """The sample with its differentiable inputs as leaves."""
    schema = getattr(torch.ops.tokcomp, sample.op).default._schema.arguments
    leaves = []

    def leaf(value: object, name: str) -> object:
        if name in BY_NAME[sample.op].differentiable and isinstance(value, torch.Tensor):
            value = value.detach().clone().requires_grad_()
            leaves.append(value)
        return value

    args = tuple(leaf(value, argument.name) for value, argument in zip(sample.args, schema, strict=False))
    kwargs = {name: leaf(value, name) for name, value in sample.kwargs.items()}
    return Sample(sample.op, sample.id, args, kwargs, sample.exact), leaves


def _smooth(outputs: object) -> torch.Tensor:
    """What carries a gradient: the first output, and prune_merge_norm's and add_layer_norm's second, side by side."""
    if not isinstance(outputs, tuple):
        return outputs
    return torch.cat([out.flatten() for out in outputs if out is outputs[0] or out.requires_grad])


@pytest.mark.slow
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str) -> None:
    checked = 0
    for sample in samples(op, torch.float64, small=True):
        if sample.args[0].numel() == 0 or sample.id in NOT_SMOOTH:
            continue
        sample, leaves = _differentiable_inputs(sample)

        def run(*values: torch.Tensor, sample: Sample = sample, leaves: list[torch.Tensor] = leaves) -> torch.Tensor:
            swap = {id(leaf): value for leaf, value in zip(leaves, values, strict=True)}
            args = [swap.get(id(value), value) for value in sample.args]
            kwargs = {name: swap.get(id(value), value) for name, value in sample.kwargs.items() if name != "eps"}
            return _smooth(getattr(torch.ops.tokcomp, sample.op)(*args, **kwargs))

        if "merge" in sample.op and _smooth(run(*leaves)).numel() == 0:
            continue
        assert torch.autograd.gradcheck(run, leaves, atol=1e-5, nondet_tol=0.0), sample.id
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradient_equals_that_of_the_reference(op: str) -> None:
    """The dispatcher's backward against autograd through the differentiable reference, in float64."""
    for sample in samples(op, torch.float64):
        if sample.args[0].numel() == 0:
            continue
        ours, our_leaves = _differentiable_inputs(sample)
        theirs, their_leaves = _differentiable_inputs(sample)
        out = _smooth(getattr(torch.ops.tokcomp, op)(*ours.args, **ours.kwargs))
        want = _smooth(REFERENCES[op](*theirs.args, **theirs.kwargs))
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        have_grads = torch.autograd.grad(out, our_leaves, cotangent)
        want_grads = torch.autograd.grad(want, their_leaves, cotangent)
        for have, expected in zip(have_grads, want_grads, strict=True):
            largest = expected.abs().amax().item() if expected.numel() else 1.0
            # float64 sums of some hundred terms in two orders.
            torch.testing.assert_close(have, expected, rtol=0, atol=1e-11 * max(1.0, largest), msg=sample.id)


@pytest.mark.parametrize("op", ["masked_softmax", "masked_attention"])
def test_mask_gradient_reaches_masked_tokens(op: str) -> None:
    sample, leaves = _differentiable_inputs(next(s for s in samples(op, torch.float64) if s.id.startswith("N33")))
    token_mask = leaves[1 if op == "masked_softmax" else 3]
    with torch.no_grad():
        token_mask[:, 5:] = 0
    _smooth(getattr(torch.ops.tokcomp, op)(*sample.args, **sample.kwargs)).square().sum().backward()
    assert bool((token_mask.grad[:, 5:] != 0).all())


@pytest.mark.parametrize("op", [name for name in DIFFERENTIABLE if name != "unmerge"])
def test_which_outputs_carry_a_gradient(op: str) -> None:
    sample, _ = _differentiable_inputs(next(samples(op, torch.float64, small=True)))
    outputs = getattr(torch.ops.tokcomp, op)(*sample.args, **sample.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    number = 2 if op.endswith("_norm") else 1
    assert [output.requires_grad for output in outputs] == [i < number for i in range(len(outputs))]


@pytest.mark.parametrize("op", ["prune_merge_norm", "add_layer_norm"])
@pytest.mark.parametrize("output", [0, 1])
def test_either_output_alone_carries_its_gradient(op: str, output: int) -> None:
    sample = next(s for s in samples(op, torch.float64) if s.id == "N33")
    ours, our_leaves = _differentiable_inputs(sample)
    theirs, their_leaves = _differentiable_inputs(sample)
    out = getattr(torch.ops.tokcomp, op)(*ours.args, **ours.kwargs)[output]
    want = REFERENCES[op](*theirs.args, **theirs.kwargs)[output]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    have_grads = torch.autograd.grad(out, our_leaves, cotangent, allow_unused=True)
    want_grads = torch.autograd.grad(want, their_leaves, cotangent, allow_unused=True)
    for have, expected in zip(have_grads, want_grads, strict=True):
        assert (have is None) == (expected is None)
        if have is not None:
            torch.testing.assert_close(have, expected, rtol=0, atol=1e-11 * max(1.0, expected.abs().amax().item()))


def test_importance_is_a_constant() -> None:
    q, k = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(2))
    cls_attn, token_order = torch.ops.tokcomp.class_attention_sort(q[:, :, 0], k)
    for output in (cls_attn, token_order, torch.ops.tokcomp.attention_received(q, k)):
        assert not output.requires_grad


@pytest.mark.parametrize("functional", [True, False], ids=["jvp", "dual numbers"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_is_refused(op: str, functional: bool) -> None:
    """In every differentiable input; a derivative of zero would be wrong without a word."""
    sample, _ = _differentiable_inputs(next(s for s in samples(op, torch.float64, small=True) if s.args[0].numel()))
    schema = getattr(torch.ops.tokcomp, op).default._schema.arguments
    leaves = [i for i, value in enumerate(sample.args) if isinstance(value, torch.Tensor) and value.requires_grad]
    for i in leaves:

        def run(value: torch.Tensor, i: int = i) -> object:
            args = [one.detach() if isinstance(one, torch.Tensor) else one for one in sample.args]
            args[i] = value
            return getattr(torch.ops.tokcomp, op)(*args, **sample.kwargs)

        value = sample.args[i].detach()
        with pytest.raises(NotImplementedError, match=f"forward AD with {op} that does not support it"):
            if functional:
                torch.func.jvp(run, (value,), (torch.ones_like(value),))
            else:
                with forward_ad.dual_level():
                    run(forward_ad.make_dual(value, torch.ones_like(value)))
        assert schema[i].name in BY_NAME[op].differentiable


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivative_is_refused(op: str) -> None:
    """Of each output that has a gradient; first derivatives are there all the same."""
    sample, leaves = _differentiable_inputs(
        next(s for s in samples(op, torch.float64, small=True) if s.args[0].numel())
    )
    outputs = getattr(torch.ops.tokcomp, op)(*sample.args, **sample.kwargs)
    for out in outputs if isinstance(outputs, tuple) else (outputs,):
        if out.requires_grad:
            loss = out.square().sum()
            with pytest.raises(RuntimeError, match=": gradients of gradients are not available"):
                torch.autograd.grad(loss, leaves, create_graph=True, retain_graph=True, allow_unused=True)
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
