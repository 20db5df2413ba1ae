"""Agreement with the published code."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from safetensors.torch import save_file

from tests.drawn import draws_what_was_recorded, recorded

# As in tests/library/test_published.py: the published float32 run is itself off its float64 run by up to 1e-6.
TOLERANCE = 1e-5


class Expected:
    """Logits of the published code, and the adapters they were computed with, which come from a seed."""

    def __init__(self) -> None:
        self.logits, settings = recorded("tocom")
        self.scale, slots, std = settings["scale"], settings["slots"], settings["std"]
        self.runs = [tuple(run) for run in settings["runs"]]
        generator = torch.Generator().manual_seed(settings["seed"])
        self.adapters = {}
        for block in range(6):
            for part in "qv":
                for side, shape in (("down", (slots, 96)), ("up", (96, slots))):
                    noise = torch.randn(shape, generator=generator)
                    self.adapters[f"blocks.{block}.attn.{part}_tocom.adapter_{side}.weight"] = noise * std


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


@pytest.fixture
def load(expected, tmp_path):
    def make(model):
        torch.save(expected.adapters, tmp_path / "tocom.pth")
        return tokcomp.ToCom.load(tmp_path / "tocom.pth", model)

    return make


def logits_of(model, plugin, way, run, scale, images):
    with torch.no_grad():
        if way == "fold":
            plugin.fold(model, *run, scale)
            return model(images)
        with plugin.applied(model, *run, scale):
            return model(images)


@pytest.mark.parametrize("run", [(2, 8), (0, 4)], ids=str)
@pytest.mark.parametrize("way", ["fold", "applied"])
def test_logits(published, expected, load, run, way):
    assert run in expected.runs
    source, target = run
    model = tokcomp.compress(published.model(), tokcomp.ToMe(target))
    logits = logits_of(model, load(model), way, run, expected.scale, published.images)
    torch.testing.assert_close(logits, expected.logits[f"{source}-{target}.logits"], atol=TOLERANCE, rtol=0)


@draws_what_was_recorded
@pytest.mark.parametrize("way", ["fold", "applied"])
def test_float64_logits(published, expected, load, way):
    model = tokcomp.compress(published.model().double(), tokcomp.ToMe(8))
    logits = logits_of(model, load(model).double(), way, (2, 8), expected.scale, published.images.double())
    theirs = expected.logits["2-8.logits_f64"]
    assert (logits - theirs).abs().max() < 1e-12 * theirs.abs().max() * model.embed_dim


def test_degree_r_is_the_last_2r_slots(published, expected, load):
    plugin = load(published.model())
    assert (plugin.rank, plugin.max_degree) == (2, 16)
    for degree in (1, 5, 16):
        rows = slice(2 * degree - 2, 2 * degree)
        theirs = slice(32 - 2 * degree, 34 - 2 * degree)
        name = "blocks.3.attn.v_tocom.adapter_{}.weight"
        assert torch.equal(plugin.v_down[3][rows], expected.adapters[name.format("down")][theirs])
        assert torch.equal(plugin.v_up[3][:, rows], expected.adapters[name.format("up")][:, theirs])


WRAPPERS = {
    "plain": lambda adapters: adapters,
    "with a model": lambda adapters: {"pos_embed": torch.zeros(1, 65, 96), **adapters},
    "nested": lambda adapters: {"model": adapters, "epoch": 9},
    "from DataParallel": lambda adapters: {f"module.{name}": tensor for name, tensor in adapters.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_files_of_the_published_code(published, expected, load, tmp_path, wrapper):
    model = published.model()
    plain = load(model).state_dict()
    path = tmp_path / "wrapped.pth"
    torch.save(WRAPPERS[wrapper](expected.adapters), path)
    loaded = tokcomp.ToCom.load(path, model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in loaded.state_dict().items())


def test_published_names_in_safetensors(published, expected, load, tmp_path):
    model = published.model()
    path = tmp_path / "tocom.safetensors"
    save_file({**expected.adapters, "head.weight": torch.zeros(3)}, path)
    assert torch.equal(tokcomp.ToCom.load(path, model).q_up[5], load(model).q_up[5])


def test_incomplete_published_file(published, expected, tmp_path):
    path = tmp_path / "tocom.pth"
    adapters = dict(expected.adapters)
    del adapters["blocks.2.attn.v_tocom.adapter_up.weight"]
    torch.save(adapters, path)
    with pytest.raises(ValueError, match=r"tocom\.pth: must have all four matrices .* none for v_up\.2"):
        tokcomp.ToCom.load(path, published.model())
