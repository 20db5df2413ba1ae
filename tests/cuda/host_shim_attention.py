"""attention and attention_received in CUDA C++ on CPU tensors, beyond the samples of
``host_shim_suite.py``, which this belongs to."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.host_shim_suite import DTYPES, bits, check, layouts, rand, randn, run

HALF_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [
        *((1, 64, "f16"), (17, 48, "bf16"), (80, 80, "f16"), (130, 32, "f16"), (197, 64, "bf16"), (256, 40, "f16")),
        *((257, 80, "f16"), (321, 12, "bf16")),
    ],
)
def test_attention_tiles(num_tokens: int, width: int, dtype: str) -> None:
    """Held keys full, nearly empty and of one row; keys that stream; widths with pieces of no number; packed rows."""
    q, k, v = randn(1, num_tokens, 3, 2, width, dtype=DTYPES[dtype]).permute(2, 0, 3, 1, 4)
    sizes = rand(1, num_tokens) * 4
    out, cls_attn = check("attention", q, k, v, size=sizes, scale=0.2)
    by_heads = check("_attention_heads", q, k, v, size=sizes, scale=0.2)
    assert torch.equal(bits(by_heads[0]), bits(out))
    assert torch.equal(bits((by_heads[1][:, 0] + by_heads[1][:, 1]) / 2), bits(cls_attn))


@pytest.mark.parametrize("dtype", HALF_DTYPES.values(), ids=HALF_DTYPES)
@pytest.mark.parametrize(("num_tokens", "width"), [(197, 64), (70, 48), (90, 80), (300, 64)])
def test_attention_puts_every_number_where_it_belongs(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Each query sees one key and no other, by the signs of its channels, so `out` is a row of v to the bit: two
    numbers that change places in a fragment of any of the matrices, and a row is another."""
    generator = torch.Generator().manual_seed(width)
    codes = (torch.randint(0, 2, (num_tokens, width), generator=generator) * 2 - 1).to(dtype)
    order = torch.randperm(num_tokens, generator=generator)
    v = torch.randint(-128, 128, (1, 1, num_tokens, width), generator=generator).to(dtype)
    out, cls_attn = run("attention", codes[order][None, None], codes[None, None], v, scale=40.0)
    assert torch.equal(out, v[:, :, order])
    assert torch.equal(cls_attn[0], torch.nn.functional.one_hot(order[0], num_tokens).float())


@pytest.mark.parametrize("num_tokens", [40, 150, 300])
def test_attention_extremes(num_tokens: int) -> None:
    """A row that is no number is one in `out`, in its image alone; keys that none sees; rows that see no key."""
    q, k, v = (torch.ones(4, 1, num_tokens, 8, dtype=torch.float16) for _ in range(3))
    q[1, 0, 7] = float("nan")
    k[2, 0, : num_tokens // 2], v[2, 0, : num_tokens // 2] = -6e4, 3
    k[3] = float("-inf")
    out, cls_attn = run("attention", q, k, v, scale=1e3)
    assert torch.equal(out[0], v[0]) and torch.allclose(cls_attn[0], torch.tensor(1 / num_tokens))
    assert (
        out[1, 0, 7].isnan().all() and torch.equal(out[1, 0, :7], v[1, 0, :7]) and torch.equal(cls_attn[1], cls_attn[0])
    )
    assert torch.equal(out[2], v[0]) and not cls_attn[2, : num_tokens // 2].any()
    assert out[3].isnan().all() and cls_attn[3].isnan().all()
    bad = torch.tensor([float("nan"), -1.0, 0.0, 1e-9]).repeat(num_tokens)[:num_tokens].expand(4, -1)
    check("attention", q[:1], k[:1], v[:1], size=bad[:1])


def test_attention_leaves_wide_heads_and_float32_to_others() -> None:
    wide = randn(1, 1, 4, 88, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"^attention: q must have heads of at most 80 numbers in CUDA C\+\+, got a"):
        torch.ops.tokcomp_shim.attention(wide, wide, wide)
    with pytest.raises(
        TypeError, match=r"q must be float16 or bfloat16 .* got float32; TOKCOMP_BACKEND=triton takes it"
    ):
        torch.ops.tokcomp_shim.attention(*[wide.float()] * 3)


@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [(256, 64, "f16"), (257, 8, "f32"), (40, 80, "f16"), (40, 80, "f32"), (70, 300, "bf16"), (300, 136, "f16")],
)
def test_attention_received_tiles(num_tokens: int, width: int, dtype: str) -> None:
    """All keys and channels at a time; tiles of keys; slices of channels; both."""
    heads = 2 if num_tokens == 40 else 1
    q, k = (layouts(randn(1, heads, num_tokens, width, dtype=DTYPES[dtype], seed=seed)) for seed in (1, 2))
    for have in zip(q, k, strict=True):
        check("attention_received", *have, size=rand(1, num_tokens) * 4, scale=0.2)
        if num_tokens > 40:
            break


@pytest.mark.parametrize("num_tokens", [40, 300])
def test_attention_received_extremes(num_tokens: int) -> None:
    """A query that is no number is seen in all of its image's keys; a tile of keys that none sees, in none."""
    q, k = torch.ones(3, 1, num_tokens, 8), torch.ones(3, 1, num_tokens, 8)
    q[1, 0, 7] = float("nan")
    k[2, 0, : num_tokens // 2] = -1e38
    (received,) = run("attention_received", q, k, scale=1e3)
    assert torch.allclose(received[0], torch.tensor(1 / num_tokens)) and received[1].isnan().all()
    assert not received[2, : num_tokens // 2].any()
    assert torch.allclose(received[2, num_tokens // 2 :], torch.tensor(2 / num_tokens))
