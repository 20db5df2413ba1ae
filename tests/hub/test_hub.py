"""Schedules, plugins and configurations in folders and on the hub: a pretended one, since tests ask no network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tokcomp
import torch
from huggingface_hub import errors
from PIL import Image
from timm import create_model
from tokcomp.tocom.card import step_norms

SHAPE = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
SCHEDULE = tokcomp.CompressionSchedule(
    [17, 12, 9], [17, 9, 5], {"gflops": 0.5, "data": "<b>a|b", "command": "tokcomp search x"}, num_tokens=17
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **SHAPE).eval()


@pytest.fixture
def plugin(model):
    plugin = tokcomp.ToCom(model, rank=2, max_degree=4)
    for up in (*plugin.q_up, *plugin.v_up):
        torch.nn.init.normal_(up)
    return plugin


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of folders: what is uploaded can be downloaded. ``hub.error`` is raised instead, if set."""
    hub = SimpleNamespace(root=tmp_path / "hub", error=None, created=[], asked=[])

    def download(name, file, **options):
        hub.asked.append((name, file, options))
        if hub.error is not None:
            raise hub.error
        found = hub.root / name / "snapshots" / "abc" / file
        if not found.is_file():
            raise errors.EntryNotFoundError(f"no {file}")
        return str(found)

    class Api:
        def __init__(self, **options):
            pass

        def create_repo(self, name, **options):
            if hub.error is not None:
                raise hub.error
            whole = name if "/" in name else f"me/{name}"
            hub.created.append((whole, options))
            return SimpleNamespace(repo_id=whole)

        def upload_folder(self, repo_id, folder_path, allow_patterns, **options):
            target = hub.root / repo_id / "snapshots" / "abc"
            target.mkdir(parents=True)
            for pattern in allow_patterns:
                for file in Path(folder_path).glob(pattern):
                    (target / file.name).write_bytes(file.read_bytes())
            return SimpleNamespace(pr_url=None, commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return hub


def test_a_schedule_goes_through_a_folder_and_the_hub(tmp_path, hub):
    SCHEDULE.save_pretrained(tmp_path / "run")
    for found in ("run", "run/schedule.json"):
        again = tokcomp.CompressionSchedule.from_pretrained(tmp_path / found)
        assert again == SCHEDULE and again.provenance == SCHEDULE.provenance
    assert not hub.asked
    assert SCHEDULE.push_to_hub("deit-small-half", private=True) == "https://hub/me/deit-small-half"
    assert hub.created == [("me/deit-small-half", {"private": True, "exist_ok": True})]
    assert tokcomp.CompressionSchedule.from_pretrained("me/deit-small-half", revision="main") == SCHEDULE
    assert hub.asked[-1][2]["revision"] == "main"


def test_a_card_has_use_figures_and_a_picture(tmp_path):
    SCHEDULE.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: tokcomp\n") and "- compression-schedule\n---\n" in card
    assert "from_pretrained" in card and "| GFLOPs per image | 0.5 |" in card and "    tokcomp search x\n" in card
    assert "<b>" not in card and "&#60;b&#62;a&#124;b" in card  # whoever wrote the provenance
    assert "| block | kept by pruning | kept by merging | left |" in card and "| 2 | 9 | 5 | 5 |" in card
    with Image.open(tmp_path / "tokens.png") as picture:
        # Bars of 17, 9 and 5 of 17 tokens, 220 pixels for all.
        pixels = [picture.convert("RGB").getpixel((56 + 44 * bar + 20, y)) for bar in range(3) for y in range(40, 260)]
        heights = [pixels[220 * bar : 220 * (bar + 1)].count((11, 107, 203)) for bar in range(3)]
    assert heights == pytest.approx([220, 220 * 9 / 17, 220 * 5 / 17], abs=1)


def test_somebodys_own_readme_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    SCHEDULE.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and not (tmp_path / "tokens.png").exists()
    (tmp_path / "README.md").unlink()
    SCHEDULE.save_pretrained(tmp_path)
    other = tokcomp.CompressionSchedule([17, 3, 3], [17, 3, 3])
    other.save_pretrained(tmp_path)  # over what tokcomp wrote
    assert "| 2 | 3 | 3 | 3 |" in (tmp_path / "README.md").read_text()
    with pytest.raises(NotADirectoryError, match="folder must be a folder, got the file"):
        other.save_pretrained(tmp_path / "README.md")
    with pytest.raises(TypeError, match="push_to_hub must be True where repo_id, private says how, got False"):
        other.save_pretrained(tmp_path / "new", repo_id="x", private=True)
    assert not (tmp_path / "new").exists()


def test_a_plugin_goes_through_a_folder_and_the_hub(tmp_path, hub, model, plugin):
    plugin.provenance = {"source": "tocom train", "settings": {"lr": 1}}
    plugin.save_pretrained(tmp_path / "plugin", push_to_hub=True, repo_id="me/plugin")
    for name in (tmp_path / "plugin", "me/plugin"):
        again = tokcomp.ToCom.from_pretrained(name, model)
        assert all(torch.equal(one, other) for one, other in zip(plugin.parameters(), again.parameters(), strict=True))
    card = (tmp_path / "plugin" / "README.md").read_text()
    assert "| degrees | 0 to 4 |" in card and "| from | tocom train |" in card and "tokens.png" in card


def test_the_picture_of_a_plugin_is_of_its_steps(model, plugin):
    step = slice(2, 4)  # from degree 1 to 2
    products = [
        up[:, step] @ down[step]
        for ups, downs in ((plugin.q_up, plugin.q_down), (plugin.v_up, plugin.v_down))
        for up, down in zip(ups, downs, strict=True)
    ]
    expected = torch.cat([product.detach().flatten() for product in products]).norm()
    assert step_norms(plugin)[1] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        tokcomp.ToMe(3),
        tokcomp.EViT(keep_rate=0.6, blocks=(1,)),
        tokcomp.DiffRate(SCHEDULE, metric="image_attn"),
        tokcomp.CDPruner(num_kept=9, blocks=(1,)),
        tokcomp.PiToMe([2, 1, 1], margin=0.8),
    ],
    ids=lambda method: method.name,
)
def test_a_configuration_makes_another_model_the_same(tmp_path, hub, model, method):
    other, images = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    tokcomp.compress(model, method, attention="stock")
    config = tokcomp.CompressionConfig.of(model, "vit_test", top1=79.8)
    config.save_pretrained(tmp_path / "config")
    config.push_to_hub("me/config")
    for name in (tmp_path / "config", str(tmp_path / "config"), "me/config"):
        again = tokcomp.CompressionConfig.from_pretrained(name)
        assert again == config and again.attention == "stock"
        assert torch.equal(again.apply(other)(images), model(images))
        tokcomp.restore(other)
    if config.schedule is not None:  # a second file, of the same commit
        assert hub.asked[-1][2]["revision"] == "abc"
    card = (tmp_path / "config" / "README.md").read_text()
    assert "# vit_test, compressed" in card
    assert "| top-1, % | 79.8 |" in card and f"| GFLOPs per image | {tokcomp.flops(model) / 1e9:.6g} |" in card


def test_a_configuration_has_its_plugin_and_products(tmp_path, model, plugin):
    other, third, images = copy.deepcopy(model), copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    plugin.fold(model, 0, 3, 0.05)
    tokcomp.quantize(tokcomp.compress(model, tokcomp.ToMe(3)))
    tokcomp.CompressionConfig.of(model, plugin=plugin).save_pretrained(tmp_path)
    config = tokcomp.CompressionConfig.from_pretrained(tmp_path)
    assert config.quantized and config.folding.target == 3
    with torch.inference_mode():
        assert torch.equal(config.apply(other)(images), model(images))
        plain = third(images)
        # One that was loaded can be written again, and what cannot be applied changes nothing.
        config.save_pretrained(tmp_path / "again")
        again = tokcomp.CompressionConfig.from_pretrained(tmp_path / "again")
        assert torch.equal(again.apply(copy.deepcopy(third))(images), model(images))
        again.schedule = SCHEDULE.rescaled(50)
        with pytest.raises(ValueError, match="the schedule must be for the 17 tokens"):
            again.apply(third)
        assert torch.equal(third(images), plain)
    with pytest.raises(ValueError, match="model must be plain, got one that is compressed"):
        config.apply(other)


def test_what_is_no_configuration_is_refused(tmp_path, model, plugin):
    with pytest.raises(ValueError, match="model must be compressed, got a plain one"):
        tokcomp.CompressionConfig.of(model)
    tokcomp.compress(model, type("Mine", (tokcomp.ToMeMLP,), {})(2))
    with pytest.raises(TypeError, match="method must be one of tokcomp's own, got Mine"):
        tokcomp.CompressionConfig.of(model)
    odd = [None, {"name": "scheduled"}, {"name": "Method", "arguments": {}}, {"name": "ATS", "arguments": {"x": 1}}]
    for method in odd:
        with pytest.raises(ValueError, match="method must"):
            tokcomp.CompressionConfig(None, method=method)
    tokcomp.compress(model, tokcomp.ToMe(2))
    with pytest.raises(ValueError, match="plugin must be the one that is folded in, got a ToCom"):
        tokcomp.CompressionConfig.of(model, plugin=plugin)
    plugin.fold(model, target=3)
    with pytest.raises(ValueError, match=r"got None for a model that has one \(degree 0 to 3"):
        tokcomp.CompressionConfig.of(model)
    with pytest.raises(ValueError, match="got another"):
        tokcomp.CompressionConfig.of(model, plugin=tokcomp.ToCom(model))
    plugin.unfold(model)

    tokcomp.CompressionConfig(SCHEDULE).save_pretrained(tmp_path)
    file = tmp_path / "tokcomp.json"
    whole = json.loads(file.read_text())
    wrong = {"format": "x", "version": 2, "attention": "flash", "quantized": 1, "figures": [], "model": 3}
    for name, value in wrong.items():
        file.write_text(json.dumps({**whole, name: value}))
        with pytest.raises(ValueError, match=r"tokcomp\.json|attention must be"):
            tokcomp.CompressionConfig.from_pretrained(tmp_path)
    foldings = ({}, {"source": 0, "target": 1, "scale": "x"}, {"source": 0.5, "target": 1, "scale": 0.1})
    for text in ("[]", "{", *(json.dumps({**whole, "folding": folding}) for folding in foldings)):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"tokcomp\.json"):
            tokcomp.CompressionConfig.from_pretrained(tmp_path)


def test_the_hub_s_refusals_say_what_to_do(tmp_path, hub, monkeypatch):
    load = tokcomp.CompressionSchedule.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"must hold schedule\.json, got a folder without it"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'me/empty' on the hub must hold schedule\.json, got a repository"):
        load("me/empty")
    offline = (errors.LocalEntryNotFoundError("not cached"), errors.OfflineModeIsEnabled("offline mode is enabled"))
    for hub.error in offline:
        with pytest.raises(ConnectionError, match=r"'me/x' is no local folder, and schedule\.json is not in the hub's"):
            load("me/x")
        with pytest.raises(ConnectionError, match="'x' cannot be written, since the hub cannot be asked"):
            SCHEDULE.push_to_hub("x")
    monkeypatch.undo()  # the real one, which looks at names before it asks
    with pytest.raises(ValueError, match="must be a local folder or a name on the hub, owner/name"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConnectionError, match="name a folder that save_pretrained wrote, or run once with"):
        load("me/x", local_files_only=True, cache_dir=tmp_path)
