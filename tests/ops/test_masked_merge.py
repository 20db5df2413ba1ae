"""masked_merge against what it stands for: prune_merge on sorted tokens, and no value read by the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.backends import Target, targets

TARGETS = [pytest.param(target, id=f"{target.backend}-{target.device}") for target in targets("masked_merge")]
NUM_TOKENS = 61


def _inputs(seed: int, device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, NUM_TOKENS, 20, generator=generator, dtype=dtype)
    importance, size = torch.rand(2, 3, NUM_TOKENS, generator=generator, dtype=torch.float64)
    return x.to(device), importance.to(device), (size * 5 + 0.5).to(device)


@pytest.mark.parametrize("weighted", [False, True], ids=["whole", "by-similarity"])
@pytest.mark.parametrize(("num_before", "num_kept", "prefix"), [(55, 31, 1), (61, 4, 3), (40, 40, 0), (12, 9, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_is_prune_merge_without_the_dropping(
    target: Target, num_before: int, num_kept: int, prefix: int, weighted: bool
) -> None:
    """Pruned tokens masked: what prune_merge keeps, at the place the token had before."""
    dtype = target.dtypes[0]
    x, importance, size = _inputs(num_before, target.device, dtype)
    options = {"size": size, "num_prefix_tokens": prefix, "similarity_weighted_size": weighted}
    kept, kept_size, source = torch.ops.tokcomp.prune_merge(x, importance, num_before, num_kept, **options)
    # Tokens that prune_merge prunes are dead here; some of the prefix too, which makes no difference.
    token_mask = ((source >= 0) & (torch.arange(NUM_TOKENS, device=x.device) >= prefix)).to(torch.float32)
    counts = torch.tensor([NUM_TOKENS, num_kept], device=x.device)
    merged, merged_size, rank, destination = target.call(x, importance, token_mask, counts, **options)

    order = rank.argsort(1)
    slots = order[:, : kept.shape[1]]
    accuracy = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(merged.gather(1, slots[:, :, None].expand(-1, -1, x.shape[2])), kept, **accuracy)
    torch.testing.assert_close(merged_size.gather(1, slots), kept_size, **accuracy)
    pruned = source < 0
    assert torch.equal(torch.where(pruned, 0, rank.gather(1, destination)), torch.where(pruned, 0, source))
    assert torch.equal(merged[pruned], x[pruned])
    assert bool((rank[pruned] >= num_before).all())


@pytest.mark.parametrize("target", TARGETS)
def test_does_what_the_worked_example_says(target: Target) -> None:
    """Dead tokens do not take part, a mean is not weighted by size, the bound holds for all that take part."""
    rows = [[9.0, 9.0], [4.0, 0.0], [0.0, 2.0], [-6.0, 1.5], [8.0, 0.0], [0.0, 7.0]]
    x = torch.tensor([rows], device=target.device)
    importance = torch.tensor([[0.0, 0.5, 0.1, 0.2, 0.9, 0.3]], device=target.device)
    token_mask = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 1.0]], device=target.device)
    size = torch.tensor([[1.0, 3.0, 2.0, 5.0, 1.0, 1.0]], device=target.device)
    # Live: 0 | 1 5 3 2. Two stay: 3 (cosine to 5: 0.24) and 2 (cosine to 5: 1) join token 5.
    counts = torch.tensor([6, 3], device=target.device)
    merged, merged_size, rank, destination = target.call(
        x, importance, token_mask, counts, size=size, min_weighted_size=1.5
    )
    assert rank.tolist() == [[0, 1, 4, 3, 5, 2]]
    assert destination.tolist() == [[0, 1, 5, 5, 4, 5]]
    rows[5] = [-2.0, 3.5]
    assert torch.equal(merged.cpu(), torch.tensor([rows]))
    # 5 * 1.5 / sqrt(38.25) = 1.2127 counts as 1.5 and is the size of token 3 from now on; the 1 of tokens 0 and 5
    # counts as 1.5 too, that of the dead token 4 stays.
    torch.testing.assert_close(merged_size.cpu(), torch.tensor([[1.5, 3.0, 2.0, 1.5, 1.0, 1.5 + 1.5 + 2.0]]))
    _, plain_size, _, _ = target.call(x, importance, token_mask, counts, size=size)
    added = 5 * 1.5 / 38.25**0.5 + 2
    torch.testing.assert_close(plain_size.cpu(), torch.tensor([[1.0, 3.0, 2.0, 5.0, 1.0, 1.0 + added]]))


class _NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", TARGETS)
def test_reads_no_value_on_the_host(target: Target) -> None:
    x, importance, size = _inputs(0, target.device, torch.float32)
    counts = torch.tensor([50, 30], device=x.device)
    with _NoHostRead():
        target.call(x, importance, torch.ones_like(size), counts, size=size, min_weighted_size=1.0)
        torch.ops.tokcomp._masked_merge_backward(x, torch.arange(NUM_TOKENS, device=x.device).repeat(3, 1))


def test_shapes_do_not_depend_on_values() -> None:
    """Under fake tensors any read of a value is an error: in the operator's fake, and in the reference too."""
    with FakeTensorMode() as mode:
        x, importance, size = (mode.from_tensor(t) for t in _inputs(0, "cpu", torch.float32))
        counts = torch.empty(2, dtype=torch.int64)
        for target in (torch.ops.tokcomp.masked_merge, Target("masked_merge", "reference", "cpu").call):
            outputs = target(x, importance, torch.ones_like(size), counts, size=size, min_weighted_size=1.0)
            assert [tuple(t.shape) for t in outputs] == [tuple(x.shape), *[(3, NUM_TOKENS)] * 3]


def test_counts_change_without_recompilation() -> None:
    """One graph serves a search whose counts move from step to step, forward and backward."""
    x, importance, size = _inputs(1, "cpu", torch.float32)
    graphs = 0

    def count_graphs(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    def loss(x: Tensor, counts: Tensor) -> Tensor:
        merged, merged_size, _, _ = torch.ops.tokcomp.masked_merge(
            x, importance, torch.ones_like(size), counts, size=size, min_weighted_size=1.0
        )
        return (merged * merged_size[:, :, None]).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count_graphs)
    for counts in ([61, 30], [44, 12], [3, 40]):
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        have = torch.autograd.grad(compiled(leaf, torch.tensor(counts)), leaf)[0]
        want = torch.autograd.grad(loss(other, torch.tensor(counts)), other)[0]
        assert torch.equal(have, want)
    assert graphs == 1


def test_exports_with_counts_as_an_input() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, importance: Tensor, token_mask: Tensor, counts: Tensor) -> Tensor:
            return torch.ops.tokcomp.masked_merge(x, importance, token_mask, counts)[0] * 2

    x, importance, _ = _inputs(2, "cpu", torch.float32)
    mask = torch.ones(3, NUM_TOKENS)
    program = torch.export.export(Block(), (x, importance, mask, torch.tensor([60, 30])))
    counts = torch.tensor([31, 7])
    assert torch.equal(program.module()(x, importance, mask, counts), Block()(x, importance, mask, counts))
