"""ToMe around the MLP: against an explicit float64 forward pass, and with everything that compression offers."""

from __future__ import annotations

import copy
import pickle

import pytest
import tokcomp
import torch
from timm.models.deit import VisionTransformerDistilled
from tokcomp.tocom.plugin import method_name

from tests.library.small_caformer import caformer
from tests.oracle import rules
from tests.tocom.conftest import lively_plugin

SIDE = 64  # 64 patches


def images(batch: int = 3, seed: int = 0, **options) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)).to(**options)


@pytest.fixture
def vit(make_vit):
    return make_vit(img_size=SIDE)


def explicit(model, pictures, r, merge_residual):
    """Tokens [B, N, C] after each block, with every attention map and every group formed by hand."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(pictures)))
    found = []
    for block, count in zip(model.blocks, r, strict=True):
        attn = block.attn
        batch, num_tokens, width = x.shape
        qkv = attn.qkv(block.norm1(x)).view(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v
        x = x + attn.proj(out.transpose(1, 2).reshape(batch, num_tokens, width))
        rows = []
        for one, keys in zip(x, k.mean(1), strict=True):
            groups = rules.into_odds(rules.cosines(keys, keys), prefix, rules.highest(count))
            slot = [next(place for place, group in enumerate(groups) if token in group) for token in range(num_tokens)]
            merged = torch.stack([one[group].mean(0) for group in groups])
            behind = block.mlp(block.norm2(merged))
            rows.append((merged + behind)[slot] if merge_residual else one + behind[slot])
        x = torch.stack(rows)
        found.append(x)
    return found


@pytest.mark.parametrize("merge_residual", [False, True], ids=["own residual", "merged residual"])
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}], ids=str)
@pytest.mark.parametrize("seed", [0, 1], ids="seed{}".format)
def test_every_block_is_what_the_explicit_computation_gives(make_vit, seed, options, merge_residual):
    model = make_vit(seed, img_size=SIDE, **options).double()
    pictures, r = images(2, seed, dtype=torch.float64), [0, 7, 20, 32]
    with torch.no_grad():
        expected = explicit(model, pictures, r, merge_residual)
        logits = model.forward_head(model.norm(expected[-1]))
        tokcomp.compress(model, tokcomp.ToMeMLP(r, merge_residual=merge_residual))
        last, maps = model.forward_intermediates(pictures, output_fmt="NLC", return_prefix_tokens=True)
        tokens = [torch.cat(pair[::-1], 1) for pair in maps] if model.num_prefix_tokens else maps
        # Two float64 passes of a few hundred operations each, on numbers of order 1 to 10.
        for ours, theirs in zip(tokens, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
        torch.testing.assert_close(last, model.norm(expected[-1]), atol=1e-11, rtol=0)
        torch.testing.assert_close(model.forward_features(pictures), last, atol=1e-11, rtol=0)
        torch.testing.assert_close(model(pictures), logits, atol=1e-11, rtol=0)
        torch.testing.assert_close(model.forward_head(last), logits, atol=1e-11, rtol=0)


def test_the_choice_of_residual_matters(vit):
    with torch.no_grad():
        own, merged = (
            tokcomp.compress(vit, tokcomp.ToMeMLP(16, merge_residual=merge))(images()) for merge in (False, True)
        )
    assert (own - merged).abs().max() > 1e-2


def test_merging_nothing_is_the_model_itself(vit):
    with torch.no_grad():
        logits, maps = vit(images()), vit.forward_intermediates(images())
        tokcomp.compress(vit, tokcomp.ToMeMLP(0))
        # Float32, four blocks: the packed products and the attention kernel add up in another order.
        torch.testing.assert_close(vit(images()), logits, atol=1e-5, rtol=0)
        for ours, theirs in zip(vit.forward_intermediates(images())[1], maps[1], strict=True):
            assert ours.shape == theirs.shape == (3, 24, 8, 8)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("merge_residual", [False, True])
@pytest.mark.parametrize("r", [24, [0, 24, 0, 32]], ids=str)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.3, "qk_norm": True}], ids=str)
def test_both_paths_agree(make_vit, options, r, merge_residual):
    model = tokcomp.compress(make_vit(img_size=SIDE, **options), tokcomp.ToMeMLP(r, merge_residual=merge_residual))
    with torch.no_grad():
        packed = model(images())
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: None)  # a block that is watched runs as modules
    with torch.no_grad():
        mixed = model(images())
    handle.remove()
    plain = model(images())  # a gradient could be wanted
    for logits in (packed, mixed):
        torch.testing.assert_close(logits, plain.detach(), atol=1e-5, rtol=0)


def test_multiply_adds(vit):
    plain = tokcomp.flops(vit)
    mlp = 2 * 24 * 96  # a token's, in one block
    assert tokcomp.flops(tokcomp.compress(vit, tokcomp.ToMeMLP(20))) == plain - 4 * 20 * mlp
    assert tokcomp.flops(tokcomp.compress(vit, tokcomp.ToMeMLP([0, 5, 0, 32]))) == plain - 37 * mlp


def test_multiply_adds_of_the_papers_table(meta_model):
    # ToCom, Table 11: DeiT-B at 512 x 512 costs 106.2, 91.8, 84.5 and 77.3 GFLOPs. That is 0, 256, 384 and 512 tokens
    # merged for each MLP, which the text lost; its decoder's share is the same in all four.
    model = meta_model("deit_base_patch16_384", img_size=512, num_classes=0)
    costs = [tokcomp.flops(tokcomp.compress(model, tokcomp.ToMeMLP(r))) / 1e9 for r in (0, 256, 384, 512)]
    steps = [costs[0] - cost for cost in costs[1:]]
    assert steps == pytest.approx([106.2 - 91.8, 106.2 - 84.5, 106.2 - 77.3], abs=0.15)


def test_every_position_is_traced_to_itself(vit):
    tokcomp.compress(vit, tokcomp.ToMeMLP(30))
    for source in tokcomp.trace(vit, images(2)):
        assert torch.equal(source, torch.arange(65).expand(2, -1))


def test_recomputed_blocks_give_the_same_gradients(vit):
    tokcomp.compress(vit, tokcomp.ToMeMLP(20)).train()
    gradients = []
    for recompute in (False, True):
        vit.set_grad_checkpointing(recompute)
        vit.zero_grad()
        vit.forward_intermediates(images(2))[0].square().sum().backward()
        vit(images(2)).sum().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad.clone())
    assert torch.equal(*gradients)


def test_restore_copies_and_pickles(vit):
    before, plain = dict(vars(vit.blocks[1])), vit(images())
    logits = tokcomp.compress(vit, tokcomp.ToMeMLP(20))(images())
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert torch.equal(other(images()), logits)
        assert torch.equal(tokcomp.restore(other)(images()), plain)
    shorter = tokcomp.compress(vit, tokcomp.ToMe(20)).forward_features(images()).shape[1]
    assert shorter < 65  # no trace of the method before
    assert torch.equal(tokcomp.compress(vit, tokcomp.ToMeMLP(20))(images()), logits)
    assert torch.equal(tokcomp.restore(vit)(images()), plain)
    assert vars(vit.blocks[1]).keys() == before.keys()


def test_other_sizes_than_the_models_own(make_vit):
    model = make_vit(img_size=SIDE, dynamic_img_size=True).eval()
    tokcomp.compress(model, tokcomp.ToMeMLP(100))  # more than half of 64 patches, less than half of 512 x 512's
    with torch.no_grad():
        assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 65, 24)
        assert model.forward_intermediates(torch.randn(1, 3, 128, 96))[1][-1].shape == (1, 24, 16, 12)


def test_distilled_models(make_vit):
    model = make_vit(cls=VisionTransformerDistilled, img_size=SIDE)
    with torch.no_grad():
        plain = model(images())
        compressed = tokcomp.compress(model, tokcomp.ToMeMLP(32))(images())
        torch.testing.assert_close(tokcomp.compress(model, tokcomp.ToMeMLP(0))(images()), plain, atol=1e-5, rtol=0)
    assert compressed.shape == plain.shape and not torch.allclose(compressed, plain, atol=1e-3)


@pytest.mark.slow
def test_it_compiles_whole(vit):
    tokcomp.compress(vit, tokcomp.ToMeMLP(20))
    with torch.no_grad():
        compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")(images())
        torch.testing.assert_close(compiled, vit(images()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "r must be at least 0, got -1"),
        ((2.5,), TypeError, "r must be an integer or one per block, got 2.5"),
        (([3, 3],), ValueError, "r must have one entry per block, got 2 entries for 4 blocks"),
        ((33,), ValueError, "r must be at most half of the model's patch tokens, 32, got 33"),
        (([1, 2, 3, 40],), ValueError, "r must be at most half of the model's patch tokens, 32, got 40"),
    ],
    ids=str,
)
def test_wrong_r_is_refused(vit, arguments, error, message):
    with pytest.raises(error, match=message):
        tokcomp.compress(vit, tokcomp.ToMeMLP(*arguments))
    assert type(vit).__name__ == "VisionTransformer"


def test_what_it_cannot_do_is_refused(vit):
    with pytest.raises(ValueError, match="ToMeMLP needs a plain vision transformer, got a hierarchical model"):
        tokcomp.compress(caformer(), tokcomp.ToMeMLP(2))
    tokcomp.compress(vit, tokcomp.ToMeMLP(2))
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        vit(images(), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask and is_causal cannot be used"):
        vit.forward_intermediates(images(), is_causal=True)


def test_a_plugin_knows_it_by_its_name(vit):
    plugin = tokcomp.ToCom(vit, max_degree=8)
    assert method_name(tokcomp.ToMeMLP(3)) == "tome_mlp" and method_name(tokcomp.ToMe(3)) == "tome"
    plugin.method = "tome"
    with pytest.raises(ValueError, match="trained with the method tome, got a model compressed by tome_mlp"):
        plugin.fold(tokcomp.compress(vit, tokcomp.ToMeMLP(8)), 0, 8)


def test_folded_applied_and_switched_agree(vit):
    plugin = lively_plugin(vit, seed=2, std=0.3, max_degree=8)
    plugin.method = "tome_mlp"
    methods = {degree: tokcomp.ToMeMLP(4 * degree) for degree in range(9)}
    switchable = tokcomp.Switchable(vit, plugin, degrees=[0, 4, 8], method=methods)
    plain = switchable(images(), degree=8)
    with torch.no_grad():
        tokcomp.compress(vit, methods[8])
        without = vit(images())
        with plugin.applied(vit, 0, 8):
            applied = vit(images())
        plugin.fold(vit, 0, 8)
        folded = vit(images())
    for logits in (applied, folded):
        torch.testing.assert_close(logits, plain, atol=1e-4, rtol=0)
    assert (plain - without).abs().max() > 1e-2
    plugin.unfold(vit)
    by_class = tokcomp.Switchable(vit, plugin, degrees=[0, 8], method=tokcomp.ToMeMLP)
    assert repr(by_class.method(8)) == "ToMeMLP(r=8, merge_residual=False)"
