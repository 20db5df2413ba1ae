"""Both paths of the attention and softmax kernels: whole rows in one tile, and rows in several.

The tables pick a path by the number of tokens; here the tile sizes are forced, so that each path meets rows that fill a
tile, overrun it by one and leave lanes over, and values that only several tiles can get wrong.
"""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton._attention as attention_tiles
import tokcomp_kernels.triton.masked_softmax as masked_softmax_module
from tokcomp_kernels import native_kernels
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import Sample
from tokcomp_kernels.triton.attention import attention_triton
from tokcomp_kernels.triton.attention_backward import attention_backward_triton
from tokcomp_kernels.triton.masked_attention import masked_attention_triton
from tokcomp_kernels.triton.masked_attention_backward import masked_attention_backward_triton
from tokcomp_kernels.triton.masked_softmax import masked_softmax_backward_triton, masked_softmax_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]  # float16: the samples that all backends share
LAUNCHERS = {
    "attention": attention_triton,
    "_attention_backward": attention_backward_triton,
    "masked_attention": masked_attention_triton,
    "_masked_attention_backward": masked_attention_backward_triton,
    "masked_softmax": masked_softmax_triton,
    "_masked_softmax_backward": masked_softmax_backward_triton,
}
#: rows by columns of a tile, and the token counts that fit one tile, and that do not
TILES = {"single": ((16, 64), (1, 17, 64)), "several": ((32, 16), (17, 65))}


@pytest.fixture
def force_tiles(monkeypatch):
    """Make the kernels take these tiles, and check that this is the path they then take."""

    def force(rows, columns, num_tokens):
        config = {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 4, "num_stages": 1}
        for module in (attention_tiles, masked_softmax_module):
            monkeypatch.setattr(module, "launch_config", lambda *_, **__: config)
        device = torch.device(DEVICE)
        options = attention_tiles.launch_options("attention", "forward", device, num_tokens, 16, 4)
        assert options["SINGLE_TILE"] == (num_tokens <= columns)
        assert masked_softmax_module._launch_options("forward", device, num_tokens)["SINGLE_TILE"] == (
            num_tokens <= columns
        )

    return force


class Inputs:
    """Random tensors of one seed, in a dtype."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype).to(DEVICE)

    def per_token(self, low, high, *shape):
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(DEVICE)

    def qkv(self, batch, heads, num_tokens, width):
        return self.normal(batch, num_tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)


def sample_of(op, dtype, num_tokens, width=24):
    inputs = Inputs(num_tokens, dtype)
    q, k, v = inputs.qkv(2, 2, num_tokens, width)
    size = inputs.per_token(0.5, 9.0, 2, num_tokens)
    token_mask = (inputs.per_token(0.0, 1.0, 2, num_tokens) > 0.4).float()
    scores, grad_scores = inputs.normal(2, 2, num_tokens, num_tokens) * 4, inputs.normal(2, 2, num_tokens, num_tokens)
    grad_out = inputs.normal(2, 2, num_tokens, width)
    args = {
        "attention": (q, k, v),
        "_attention_backward": (grad_out, q, k, v),
        "masked_attention": (q, k, v, token_mask),
        "_masked_attention_backward": (grad_out, q, k, v, token_mask),
        "masked_softmax": (scores, token_mask),
        "_masked_softmax_backward": (grad_scores, scores, token_mask),
    }[op]
    return Sample(op, f"N{num_tokens}", args, {} if "softmax" in op else {"size": size})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("path", "num_tokens"), [(path, n) for path, (_, counts) in TILES.items() for n in counts], ids=str
)
@pytest.mark.parametrize("op", LAUNCHERS)
def test_both_paths_agree_with_float64(op, path, num_tokens, dtype, force_tiles):
    force_tiles(*TILES[path][0], num_tokens)
    sample = sample_of(op, dtype, num_tokens)
    assert_right(sample, LAUNCHERS[op](*sample.args, **sample.kwargs))


@pytest.mark.parametrize("has_size", [True, False], ids=["sizes", "ones"])
@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("num_tokens", [129, 197, 256, 257])
def test_the_tables_paths_of_whole_images(num_tokens, width, has_size):
    """Half precision: up to 256 keys of width 64 in one pass over several tiles; a width of 80 in two parts."""
    dtype = torch.float16 if has_size else torch.bfloat16
    options = attention_tiles.forward_options("attention", torch.device(DEVICE), num_tokens, width, 2)
    assert (options["KEYS"] > 0) == (num_tokens <= 256 and width == 64)
    inputs = Inputs(num_tokens + width, dtype)
    size = inputs.per_token(0.5, 9.0, 1, num_tokens) if has_size else None
    sample = Sample("attention", f"N{num_tokens}", inputs.qkv(1, 1, num_tokens, width), {"size": size})
    assert_right(sample, attention_triton(*sample.args, **sample.kwargs))


@pytest.mark.parametrize("op", ["attention", "masked_attention"])
def test_one_pass_over_several_tiles_gives_an_image_its_bits_whatever_the_batch(op):
    num_tokens = 197
    inputs = Inputs(5, torch.float16)
    args = inputs.qkv(2, 2, num_tokens, 64)
    size = inputs.per_token(0.5, 9.0, 2, num_tokens)
    if op == "masked_attention":
        args = (*args, (inputs.per_token(0.0, 1.0, 2, num_tokens) > 0.4).float())
    both = LAUNCHERS[op](*args, size=size)
    assert_right(Sample(op, "N197", args, {"size": size}), both)
    alone = LAUNCHERS[op](*(tensor[1:] for tensor in args), size=size[1:])
    for have, want in zip(alone, both, strict=True):
        assert torch.equal(have[0], want[1])


@pytest.mark.parametrize("width", [1, 16, 24, 64, 72, 80, 96, 112, 128])
def test_tiles_cover_a_width_and_waste_little(width):
    tiles = attention_tiles.width_tiles(width)
    assert all(size >= 16 and size & (size - 1) == 0 for size in tiles)
    assert sum(tiles[:-1]) < width <= sum(tiles) < width + 16


def test_tiles_of_a_single_pass_are_full_but_for_the_last():
    """The kernel masks no keys of the others."""
    for num_tokens in range(1, 257):
        options = attention_tiles.forward_options("attention", torch.device(DEVICE), num_tokens, 64, 2)
        tiles = attention_tiles.key_tiles(options["KEYS"])
        assert sum(tiles[:-1]) < num_tokens <= sum(tiles)
        assert len(tiles) == 1 or sum(tiles) < num_tokens + 16


@pytest.mark.parametrize("path", TILES)
def test_a_first_tile_of_minus_infinity_leaves_the_rest(path, force_tiles):
    """Scores of -inf in all of the first tile: their powers are 0, and nothing is NaN."""
    num_tokens = 40
    force_tiles(*TILES[path][0], num_tokens)
    inputs = Inputs(1, torch.float32)
    q, k, v = (tensor.clone() for tensor in inputs.qkv(1, 1, num_tokens, 16))
    q[..., 0], k[:, :, :20, 0] = 1.0, float("-inf")
    out, cls_attn = attention_triton(q, k, v)
    assert_right(Sample("attention", path, (q, k, v)), (out, cls_attn))
    assert out.isfinite().all() and (cls_attn[:, :20] == 0).all()
    scores = inputs.normal(1, 2, num_tokens, num_tokens)
    scores[..., :20] = float("-inf")
    scores[:, :, 3] = float("-inf")
    token_mask = torch.ones(1, num_tokens, device=DEVICE)
    out = masked_softmax_triton(scores, token_mask)
    assert_right(Sample("masked_softmax", path, (scores, token_mask)), out)
    assert torch.allclose(out[:, :, 3], torch.full_like(out[:, :, 3], 1 / num_tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", TILES)
def test_masked_keys_far_above_the_visible_ones(path, dtype, force_tiles):
    """The maximum counts masked keys: all visible powers are around 2^-20, far below what float16 holds."""
    num_tokens, width = 40, 16
    force_tiles(*TILES[path][0], num_tokens)
    inputs = Inputs(2, dtype)
    q, k, v = (tensor.clone() for tensor in inputs.qkv(1, 2, num_tokens, width))
    token_mask = torch.ones(1, num_tokens, device=DEVICE)
    token_mask[:, 30:] = 0.0
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 30:, 0] = 14.0
    sample = Sample("masked_attention", path, (q, k, v, token_mask))
    out, cls_attn = masked_attention_triton(*sample.args)
    assert_right(sample, (out, cls_attn))
    sample = Sample("_masked_attention_backward", path, (inputs.normal(1, 2, num_tokens, width), *sample.args))
    assert_right(sample, masked_attention_backward_triton(*sample.args))


@pytest.mark.parametrize(
    ("num_tokens", "width", "dtype"),
    [(257, 80, torch.float32), (290, 80, torch.bfloat16)],
    ids=str,
)
def test_the_masks_gradient_of_the_large_models(num_tokens, width, dtype):
    """With the tiles of the tables; the compiled CPU kernel, where there is one, is held to the same bound."""
    backward = sample_of("_masked_attention_backward", dtype, num_tokens, width)
    one_head = tuple(t[:1, :1] if t.dim() == 4 else t[:1] for t in backward.args)
    one = Sample(backward.op, backward.id, one_head, {"size": backward.kwargs["size"][:1]})
    launchers = [LAUNCHERS[one.op]]
    if one.op in native_kernels()["cpu"] and DEVICE == "cpu":
        launchers.append(torch.ops.tokcomp_cpu._masked_attention_backward)
    token_mask = one.args[4]
    for launcher in launchers:
        grads = launcher(*one.args, **one.kwargs)
        assert_right(one, grads)
        assert bool((grads[3][token_mask == 0] != 0).all()), "a masked token's gradient is missing"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", TILES)
def test_what_is_not_a_number_stays_in_its_image(path, value, force_tiles):
    num_tokens = 33
    force_tiles(*TILES[path][0], num_tokens)
    inputs = Inputs(3, torch.float32)
    q, k, v = (tensor.clone() for tensor in inputs.qkv(2, 2, num_tokens, 16))
    grad_out, token_mask = inputs.normal(2, 2, num_tokens, 16), torch.ones(2, num_tokens, device=DEVICE)
    clean = [
        *masked_attention_triton(q, k, v, token_mask),
        *masked_attention_backward_triton(grad_out, q, k, v, token_mask),
    ]
    k[0, 1, 32], v[0, 1, 32] = value, value
    spoiled = [
        *masked_attention_triton(q, k, v, token_mask),
        *masked_attention_backward_triton(grad_out, q, k, v, token_mask),
    ]
    for before, after in zip(clean, spoiled, strict=True):
        assert torch.equal(before[1], after[1])
        assert not after[0].isfinite().all()
        if after.dim() == 4:
            assert torch.equal(before[0, 0], after[0, 0]), "another head changed"


def test_rows_may_lie_more_than_two_to_the_31_elements_apart():
    """Offsets are 64-bit: a view whose third row begins at element 2^31. The pages between are never touched."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    stride = 1 << 30
    views = [
        torch.empty(2 * stride + 16, dtype=torch.float16, device=DEVICE).as_strided((1, 1, 3, 16), (0, 0, stride, 1))
        for _ in range(3)
    ]
    compact = Inputs(4, torch.float16).qkv(1, 1, 3, 16)
    for view, values in zip(views, compact, strict=True):
        view.copy_(values)
    for have, want in zip(attention_triton(*views), attention_triton(*compact), strict=True):
        assert torch.equal(have, want)
