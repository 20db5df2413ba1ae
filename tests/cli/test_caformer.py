"""Commands with a CAFormer, whose defaults are not a ViT's."""

from __future__ import annotations

import json

import pytest
import tokcomp

# 64 x 64 pixels are 4 x 4 tokens in the third stage's 9 blocks.
SMALL = ("-m", "caformer_s18", "--num-classes", "2", "--img-size", "64", "--device", "cpu")


@pytest.fixture
def schedule(tmp_path):
    path = tmp_path / "schedule.json"
    tokcomp.CompressionSchedule(None, [16, 14, 12, 10, 8, 6, 5, 4, 16]).save(path)
    return path


@pytest.mark.slow
def test_evaluate_at_another_size(run, ran, image_folder, schedule):
    command = ("evaluate", image_folder, *SMALL, "--json")
    status, plain, _ = run(*command)
    assert status == 0
    out, _ = ran(*command, "--method", "diffrate", "--schedule", schedule)
    plain, result = json.loads(plain), json.loads(out)
    assert "metric='image_attn', pipeline='merge'" in json.dumps(result)
    assert result["gflops"] < plain["gflops"] < 0.5  # 4.1 GFLOPs at 224 x 224
    out, _ = ran(*command, "--method", "tome", "--gflops", round(0.9 * plain["gflops"], 3))
    assert json.loads(out)["gflops"] == pytest.approx(0.9 * plain["gflops"], rel=0.05)


def test_visualize(ran, picture, schedule, tmp_path):
    target = tmp_path / "drawn.png"
    ran("visualize", picture, *SMALL, "--method", "diffrate", "--schedule", schedule, "-o", target, "--cell", "10")
    assert target.stat().st_size > 0


def test_what_cannot_be_done_is_refused(refused, image_folder, schedule):
    command = ("evaluate", image_folder, *SMALL)
    err = refused(*command, "--method", "diffrate", "--schedule", schedule, "--metric", "cls_attn")
    assert "metric 'cls_attn' needs a class token" in err
    err = refused("evaluate", image_folder, "-m", "poolformer_s12", "--method", "diffrate", "--schedule", schedule)
    assert "--model 'poolformer_s12': stages.2.blocks.0.token_mixer: Pooling is not understood" in err
    err = refused("bench", "-m", "caformer_s18", "--method", "tome")
    assert "--model must be a timm VisionTransformer" in err


@pytest.mark.slow
def test_search_finetune_evaluate(ran, image_folder, tmp_path):
    """What the search writes, the other commands take as it is."""
    output = tmp_path / "found"
    common = (image_folder, *SMALL, "--workers", "0", "-b", "2")
    out, _ = ran(
        *("search", *common, "--train-split", "validation", "--held-out", "2", "--target-gflops", "0.25"),
        *("--steps", "2", "--granularity", "3", "--lr", "0.1", "--min-lr", "0.1", "-o", output, "--json"),
    )
    settings = json.loads(out)["settings"]
    assert (settings["metric"], settings["pipeline"]) == ("image_attn", "merge")
    schedule = output / "schedule.json"
    found = tokcomp.CompressionSchedule.load(schedule)
    assert found.num_prune_kept is None
    assert len(found.num_merge_kept) == 9
    assert found.num_merge_kept[0] == found.num_merge_kept[-1] == 16
    assert min(found.num_merge_kept) < 16
    out, _ = ran("evaluate", image_folder, *SMALL, "--method", "diffrate", "--schedule", schedule, "--json")
    assert json.loads(out)["gflops"] < 0.35
    ran(
        *("finetune", *common, "--from-scratch", "--method", "diffrate", "--schedule", schedule),
        *("--train-split", "validation", "--held-out", "2", "--epochs", "1", "-o", tmp_path / "tuned"),
    )
