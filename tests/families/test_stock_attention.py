"""A compressed model that keeps its own attention computes what ours computes."""

from __future__ import annotations

import copy
import pickle

import pytest
import tokcomp
import torch
from tokcomp.adapters import find_adapter
from tokcomp.adapters import flex as flex_module
from torch.nn import functional as F

from tests.families.test_families import build, diffrate, images_for, logits

ROWS = ("timm: ViT", "timm: DINOv3", "timm: ViT, parallel attentions", "transformers: ViT", "transformers: DINOv3")
ROWS += ("transformers: SigLIP's vision tower", "torchvision: ViT", "open_clip: CLIP's vision tower")


@torch.no_grad()
@pytest.mark.parametrize("name", ROWS)
def test_it_computes_what_ours_computes(name, monkeypatch):
    calls, function = [], F.scaled_dot_product_attention
    model = build(name).double()
    images = images_for(model, torch.float64)
    for method in (diffrate(model), tokcomp.ToMe(3)):
        ours = logits(tokcomp.compress(model, method), images)
        tokcomp.compress(model, method, attention="stock")
        with monkeypatch.context() as patched:
            patched.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or function(*a, **k))
            stock = logits(model, images)
        pools = name == "transformers: SigLIP's vision tower"  # by attention, too
        assert len(calls) == 4 + pools  # one a block: its own attention runs, and ours does not
        calls.clear()
        torch.testing.assert_close(stock, ours, rtol=0, atol=1e-12 * float(ours.abs().max()))
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert find_adapter(copied).keeps_attention(copied)
    tokcomp.compress(model, method)
    assert not find_adapter(model).keeps_attention(model)
    tokcomp.restore(tokcomp.compress(model, method, attention="stock"))
    assert not any(name.startswith("_tokcomp") for module in model.modules() for name in vars(module))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "flex_attention", "flash_attention_2"])
def test_what_transformers_is_told_to_use_is_used(implementation, monkeypatch):
    model = build("transformers: ViT")
    images, attended = images_for(model), []
    ours = logits(tokcomp.compress(model, diffrate(model)), images)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def own(module, q, k, v, mask, scaling, dropout):
        attended.append(None if mask is None else tuple(mask.shape))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).transpose(1, 2), None

    def flex(q, k, v, score_mod, scale):  # as PyTorch runs it where nothing is compiled
        attended.append(score_mod(torch.zeros(()), *torch.zeros(4, dtype=torch.int64)).shape)
        scores = (q @ k.mT * scale)[..., None, None]
        places = [torch.arange(size).view(-1, *[1] * (3 - dim)) for dim, size in enumerate((*q.shape[:3], k.shape[2]))]
        return score_mod(scores[..., 0, 0], *places).softmax(-1) @ v

    monkeypatch.setattr(flex_module, "_for_each_length", lambda: flex)
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda name, eager: own)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", implementation)
    if implementation == "flash_attention_2":
        with pytest.raises(tokcomp.UnsupportedModelError, match="takes no mask, so sizes cannot reach it"):
            tokcomp.compress(model, diffrate(model), attention="stock")
        tokcomp.compress(model, tokcomp.ToMe(3, prop_attn=False), attention="stock")(images)
        assert attended == [None] * 4
        return
    stock = logits(tokcomp.compress(model, diffrate(model), attention="stock"), images)
    # The first tokens merge in block 1, so sizes reach blocks 2 and 3.
    masks = [(2, 1, 1, 12), (2, 1, 1, 11)] if implementation == "eager" else [(), ()]
    assert attended == [None, None, *masks]
    torch.testing.assert_close(stock, ours, rtol=0, atol=1e-5 * float(ours.abs().max()))


def test_other_words_and_other_families_are_refused():
    model = build("timm: ViT")
    with pytest.raises(ValueError, match="attention must be 'tokcomp' or 'stock', got 'flash'"):
        tokcomp.compress(model, tokcomp.ToMe(3), attention="flash")
    assert find_adapter(model).method(model) is None
