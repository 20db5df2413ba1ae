"""The study on a pretrained model: its weights, its pictures, the whole command in small."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import timm
import tokcomp
import torch
from tokcomp.methods import Evidence

from benchmarks.reproduce.pretrained import __main__ as pretrained
from benchmarks.reproduce.pretrained import exported as exported_files
from benchmarks.reproduce.pretrained import importance, methods
from benchmarks.reproduce.pretrained.images import FashionMNIST, read_idx
from benchmarks.reproduce.pretrained.page import BEGIN, END, keep_results
from benchmarks.reproduce.pretrained.plan import QUICK, Settings, entries_for
from benchmarks.reproduce.pretrained.weights import as_timm, read_onnx

SHAPE = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "num_heads": 2, "depth": 2, "init_values": 1.0}


def exported(model):
    """A model's weights under the names that the file has."""
    blocks = {}
    for name, value in model.state_dict().items():
        name = name.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace("ls2.gamma", "layer_scale2.lambda1")
        name = name.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = f"backbone.layernorm.{name[5:]}" if name.startswith("norm.") else f"backbone.{name}"
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                blocks[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            blocks[name] = value
    return blocks


def test_every_parameter_goes_to_its_place():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(num_classes=0, **SHAPE).eval()
    tensors = exported(model)
    tensors["places"] = tensors.pop("backbone.pos_embed")
    other = timm.models.VisionTransformer(num_classes=0, **SHAPE).eval()
    other.load_state_dict(as_timm(tensors, other))
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(other(images), model(images))


def test_a_matrix_is_known_by_its_bias(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, made = onnx.helper, onnx.numpy_helper.from_array
    matrix, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(3, np.float32)
    first, table = np.ones((1, 1, 2), np.float32), np.full((1, 4, 2), 2, np.float32)
    tensors = {"m": matrix, "backbone.fc.bias": bias, "onnx::a": first, "onnx::b": table}
    tensors["backbone.embeddings.cls_token"] = first
    nodes = [helper.make_node("MatMul", ["x", "m"], ["y"]), helper.make_node("Add", ["backbone.fc.bias", "y"], ["z"])]
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xz"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [made(one, name) for name, one in tensors.items()])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    found = read_onnx(tmp_path / "model.onnx")
    assert torch.equal(found["backbone.fc.weight"], torch.from_numpy(matrix.T))
    assert found["places"].tolist() == [[[1, 1], *[[2, 2]] * 4]]
    del graph.initializer[3]
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="must hold a DINOv2 backbone"):
        read_onnx(tmp_path / "model.onnx")


def test_pictures_are_read_packed_or_not(tmp_path):
    pixels = np.arange(2 * 28 * 28, dtype=np.int64).astype(np.uint8).reshape(2, 28, 28)
    image_file = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape) + pixels.tobytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(image_file))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x02\x07\x03")
    images = FashionMNIST(tmp_path, train=False)
    assert [label for _, label in images] == [7, 3]
    assert np.array_equal(np.asarray(images[1][0]), pixels[1][:, :, None].repeat(3, 2))
    with pytest.raises(ValueError, match="the images must be in IDX files"):
        FashionMNIST(tmp_path, train=True)
    (tmp_path / "short").write_bytes(image_file[:-1])
    with pytest.raises(ValueError, match="must be an IDX file of bytes"):
        read_idx(tmp_path / "short")


def test_the_most_telling_rows_come_first(tmp_path):
    for settings in (Settings(), QUICK):
        budgets = [3.0, 2.0, 1.0][: len(settings.shares)]
        first, second = (entries_for(settings, place, budgets, [tmp_path, tmp_path]) for place in (0, 1))
        names = [entry.name for entry in first]
        assert len(set(names)) == len(names) and names[:4] == ["tome", "evit", "uniform", "published"]
        assert names.index("refine") < names.index("random 1") < names.index("refine, seed 1")
        assert {entry.only for entry in first} == {(), (budgets[len(budgets) // 2],)}
        assert any(entry.kind == "file" for entry in second)
    assert Settings().random >= 100 and Settings().seeds >= 3 and len(Settings().shares) == 3


def test_tokens_are_ranked_by_the_importance_that_is_asked_for():
    draw = torch.Generator().manual_seed(0)
    received, values = torch.rand(2, 9, generator=draw), torch.randn(2, 3, 9, 4, generator=draw)
    evidence = Evidence(cls_attn=received.flip(1), image_attn=received, values=values)
    norms = values.transpose(1, 2).flatten(2).norm(dim=2)
    wanted = {
        "attention received": received,
        "value norm": norms,
        "received x value norm": received * norms,
        "class attention": received.flip(1),
    }
    schedule = tokcomp.CompressionSchedule([9, 7], [9, 6])
    x = torch.zeros(2, 9, 12)
    for method in (tokcomp.DiffRate(schedule, metric="cls_attn"), tokcomp.EViT(0.5, blocks=(1,))):
        for name, needs in importance.IMPORTANCES.items():
            one = importance.ranked(method, name)
            assert one.assign(1, 9, 1) == method.assign(1, 9, 1) and one.needs == needs
            given = evidence._replace(**{field: None for field in evidence._fields if field not in needs})
            score = one.score(given, 1, x)
            if name in wanted:
                assert torch.equal(score.argsort(dim=1), wanted[name].argsort(dim=1))
            else:
                assert torch.equal(score[0], score[1]) and not torch.equal(score, one.score(given, 0, x))
            if name not in ("attention received", "class attention"):
                torch.testing.assert_close(score.sum(1), torch.ones(2))


@pytest.mark.slow
def test_the_command_in_small(tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrained.main(["--quick", "-o", str(out), "--minutes", "1e-9"]) == 1
    assert pretrained.main(["--quick", "-o", str(out), "--minutes", "1e-9", "--only", "latency"]) == 1
    assert "stopped; the same command goes on from here" in capsys.readouterr().out
    assert pretrained.main(["--quick", "-o", str(out)]) == 0
    results = json.loads((out / "84" / "results.json").read_text())
    assert results["finished"] and len(results["budgets"]) == 2
    rows = {row["name"]: row for row in results["budgets"][1]["rows"]}
    assert {"tome", "evit", "uniform", "published", "search", "refine", "refine, seed 1", "search, merge"} <= set(rows)
    assert {"random, median of 2", "search, match_inference", "search, 8 images", "search, 2 updates"} <= set(rows)
    moved = {row["name"] for row in json.loads((out / "70" / "results.json").read_text())["budgets"][0]["rows"]}
    assert "search at 84 px" in moved
    refined = sorted((out / "84" / "refined").glob("*.json"))
    assert len(refined) == 4  # two budgets, two seeds
    for path in refined:
        state = json.loads(path.read_text())
        assert state["best"][0]["loss"] <= min(state["starts"].values()) and len(state["starts"]) >= 4
    schedule = tokcomp.CompressionSchedule.load(out / "84" / rows["refine"]["schedule"])
    assert schedule.num_tokens == 37
    plugins = json.loads((out / "tocom" / "results.json").read_text())
    assert plugins["gains"].keys() == {"noise", "digits"} and list(plugins["plugins"]) == ["0", "1"]
    assert plugins["gains"]["digits"].keys() == {"0 -> 1", "0 -> 2", "2 -> 0", "2 -> 1"}
    assert all(len(one["top1"]) == 2 for one in plugins["gains"]["digits"].values())
    trained = json.loads((out / "trained" / "results.json").read_text())
    assert list(trained["rows"]) == ["dynamicvit", "spvit", "tome", "evovit", "avit"]
    for name, row in trained["rows"].items():
        assert len(row["right"]) == 20 and abs(row["gflops"] / trained["facts"]["gflops"] - 1) < 0.05, name
    again = (out / "trained" / "results.json").read_bytes()
    assert pretrained.main(["--quick", "--only", "trained", "-o", str(out)]) == 0
    assert (out / "trained" / "results.json").read_bytes() == again
    times = json.loads((out / "latency" / "results.json").read_text())
    assert list(times["rows"])[:4] == ["whole 1", "flops 0.75", "time 0.75, batch 1", "time 0.75, batch 2"]
    for batch, speeds in times["speeds"].items():
        assert speeds.keys() == {name for name, row in times["rows"].items() if row["batch"] in (None, int(batch))}
        for share in (0.75, 0.6):  # the limit is what the schedule for multiply-adds takes
            [state] = (out / "latency" / "refined").glob(f"time {share}, batch {batch}-*.json")
            limit = json.loads(state.read_text())["facts"]["budget"]
            assert limit == times["rows"][f"flops {share}"]["table_ms"][batch]
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}")
    kept = keep_results(out, tmp_path / "kept", tmp_path / "page.md", readme)
    assert [path.name for path in kept] == [
        *("70.json", "84.json", "tocom.json", "trained.json", "latency.json", "page.md", "README.md")
    ]
    assert "| DiffRate, searched | " in readme.read_text() and "| uncompressed | " in readme.read_text()
    page = (tmp_path / "page.md").read_text()
    assert (
        "## At 84 x 84 pixels" in page
        and "## ToCom on the backbone" in page
        and "## Methods that are trained" in page
        and "### Batch 2" in page
        and "refine over 2 seeds" in page
        and "nan" not in page
    )
    assert all("before_merge" not in row for row in json.loads(kept[1].read_text())["budgets"][0]["rows"])


@pytest.mark.slow
def test_importances_in_small(tmp_path, capsys):
    assert importance.main(["--quick", "-o", str(tmp_path / "importance.json")]) == 0
    record = json.loads((tmp_path / "importance.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["DiffRate, uniform", "EViT"] * 2
    assert all(row["over_the_default"]["attention received"] == [0, 0] for row in record["rows"])
    assert importance.section(record) in capsys.readouterr().out


@pytest.mark.slow
def test_methods_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", ("tome", "ats", "published"))
    path, page = tmp_path / "methods.json", tmp_path / "page.md"
    assert methods.main(["--quick", "-o", str(path)]) == 0
    record, text = json.loads(path.read_text()), capsys.readouterr().out
    names = [[row["name"] for row in budget["rows"]] for budget in record["budgets"]]
    assert names == [["tome", "ats", "published"]] * 2 and record["recommended"]["name"] in names[0]
    for budget in record["budgets"]:
        assert all(row["gflops"] == pytest.approx(budget["target"], rel=0.02) for row in budget["rows"])
        best = next(row for row in budget["rows"] if row["name"] == budget["recommended"]["best"])
        assert f"**{best['top1']:.2f} %** |" in text
    page.write_text(f"Before.\n{methods.BEGIN}\n{methods.END}\nAfter.\n")
    methods.draw(path, page)
    assert methods.table(record) in text and methods.table(record) in page.read_text()


def test_the_page_has_the_methods_that_are_kept():
    assert methods.table(json.loads(methods.KEPT.read_text())) in methods.PAGE.read_text()


def test_missing_files_are_named(tmp_path, capsys):
    for command in (importance, exported_files, methods):
        assert command.main(["--weights", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "out")]) == 2
        assert "--weights must be the file vit_s_focus.onnx" in capsys.readouterr().err
    assert pretrained.main(["--weights", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "out")]) == 2
    assert "--weights must be the file vit_s_focus.onnx" in capsys.readouterr().err
    assert pretrained.main(["--keep", "-o", str(tmp_path / "out")]) == 2
    assert "the output folder must hold results, got none" in capsys.readouterr().err
