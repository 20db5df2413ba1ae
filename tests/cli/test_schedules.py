"""--schedule, --gflops, --rescale: what a schedule says of itself is heeded, or the command refuses."""

from __future__ import annotations

import json

import pytest
import tokcomp

RANDOM = {"metric": "random", "pipeline": "merge_prune", "seed": 5, "similarity_weighted_size": False}
COUNTS = ([65, 50, 40, 30, 20, 12], [65, 55, 45, 35, 25, 15])
DIGITS = ("--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "-j", "0")
EVALUATE = ("evaluate", *DIGITS, "--num-samples", "20", "--json", "--method", "diffrate")


@pytest.fixture
def schedule(tmp_path):
    tokcomp.CompressionSchedule(*COUNTS, num_tokens=65, method=RANDOM).save(tmp_path / "schedule.json")
    return tmp_path / "schedule.json"


def settings_of(ran, *argv):
    out, _ = ran(*argv)
    return json.loads(out)["method_settings"]


def test_a_schedule_is_run_by_its_own_method(ran, schedule):
    found = settings_of(ran, *EVALUATE, "--schedule", schedule)
    assert "metric='random'" in found and "pipeline='merge_prune'" in found
    assert settings_of(ran, *EVALUATE, "--schedule", schedule, "--metric", "random") == found


@pytest.mark.parametrize("command", ["evaluate", "finetune", "visualize", "tocom", "serve-sim"])
def test_what_contradicts_it_is_refused(refused, schedule, tmp_path, picture, command):
    more = ("--method", "diffrate", "--schedule", schedule, "--metric", "cls_attn")
    argv = {
        "evaluate": ("evaluate", *DIGITS, *more),
        "finetune": ("finetune", *DIGITS, *more, "-b", "4", "-o", tmp_path / "run"),
        "visualize": ("visualize", picture, *DIGITS[2:-2], *more, "-o", tmp_path / "drawn"),
        "tocom": ("tocom", "train", *DIGITS, *more[:2], "--schedules", *more[3:], "-b", "4", "-o", tmp_path / "plugin"),
        "serve-sim": ("serve-sim", "--device", "cpu", *more[:2], "--schedules", *more[3:], "-o", tmp_path / "served"),
    }[command]
    err = refused(*argv)
    assert "--metric must be random, which the schedule was made with, got cls_attn; leave --metric out" in err
    assert not any((tmp_path / name).exists() for name in ("run", "drawn", "plugin", "served"))


def test_the_search_writes_what_evaluate_reads(ran, tmp_path):
    search = ("search", *DIGITS, "-b", "8", "--steps", "1", "--images", "16", "--held-out", "0", "--mixup", "0")
    options = ("--target-gflops", "0.015", "--cutmix", "0", "--metric", "random", "--pipeline", "merge_prune")
    out, _ = ran(*search, *options, "-o", tmp_path / "run")
    saved = tokcomp.CompressionSchedule.load(tmp_path / "run" / "schedule.json")
    assert (saved.num_tokens, saved.num_prefix_tokens) == (65, 1)
    assert saved.method == {**RANDOM, "seed": 0, "similarity_weighted_size": True}
    assert f"--method diffrate --schedule {tmp_path / 'run' / 'schedule.json'}" in out and "--metric" not in out
    found = settings_of(ran, *EVALUATE, "--schedule", tmp_path / "run" / "schedule.json")
    assert "metric='random'" in found and "pipeline='merge_prune'" in found


@pytest.mark.parametrize("given", ["--gflops", "--schedule"])
def test_another_image_size_takes_rescale(refused, ran, tmp_path, image_folder, given):
    tokcomp.DiffRate.published("deit_tiny_patch16_224", 0.6).schedule.save(tmp_path / "published.json")
    plan = ("--gflops", "0.6") if given == "--gflops" else ("--schedule", tmp_path / "published.json")
    argv = ("evaluate", image_folder, "-m", "deit_tiny_patch16_224", "--img-size", "64", "--device", "cpu", "-j", "0")
    argv += ("--method", "diffrate", *plan, "--json")
    err = refused(*argv)
    assert "the schedule is for 197 tokens, and 17 enter deit_tiny_patch16_224 at this image size; add --rescale" in err
    found = settings_of(ran, *argv, "--rescale")
    assert "num_tokens=17" in found and "num_merge_kept=[17, 16, 15, 12, 10, 8, 7, 6, 6, 5, 4, 2]" in found


def test_rescale_needs_a_schedule_that_knows_its_tokens(run, ran, tmp_path):
    tokcomp.CompressionSchedule(*COUNTS).save(tmp_path / "old.json")
    assert "metric='cls_attn'" in settings_of(ran, *EVALUATE, "--schedule", tmp_path / "old.json")
    status, _, err = run(*EVALUATE, "--schedule", tmp_path / "old.json", "--rescale")
    assert status == 2 and "--rescale needs a schedule that says how many tokens it is for" in err
    status, _, err = run("evaluate", *DIGITS, "--method", "tome", "--r", "4", "--rescale")
    assert status == 2 and "--rescale goes with --schedule, got --r; leave it out" in err


def test_a_published_table(run, ran, tmp_path):
    entry = {"prune_kept_num": str(COUNTS[0]), "merge_kept_num": str(COUNTS[1])}
    other = {"prune_kept_num": "[65, 9, 9, 9, 9, 9]", "merge_kept_num": "[65, 9, 9, 9, 9, 9]"}
    (tmp_path / "rates.json").write_text(json.dumps({"tokcomp_digits_vit": {"0.01": entry, "0.005": other}}))
    found = settings_of(ran, *EVALUATE, "--schedule", tmp_path / "rates.json", "--gflops", "0.01")
    assert f"num_merge_kept={COUNTS[1]}" in found
    status, _, err = run(*EVALUATE, "--schedule", tmp_path / "rates.json")
    assert status == 2 and "gflops for tokcomp_digits_vit must be one of 0.01, 0.005, got None" in err
    tokcomp.CompressionSchedule(*COUNTS).save(tmp_path / "one.json")
    status, _, err = run(*EVALUATE, "--schedule", tmp_path / "one.json", "--gflops", "0.01")
    assert status == 2 and "gflops chooses among the entries of a table, got a single schedule; leave it out" in err


def test_degrees_are_rescaled_and_keep_their_methods(tmp_path):
    """What serve-sim and tocom run at each degree."""
    import argparse

    import timm
    from tokcomp.cli.degrees import add_degree_options, build_degrees

    for name, least in (("dear", 12), ("cheap", 4)):
        counts = [17, 16, 15, 14, 13, least]
        schedule = tokcomp.CompressionSchedule(counts, counts, num_tokens=17, method={"metric": "cls_attn_v"})
        schedule.save(tmp_path / f"{name}.json")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="tokcomp_digits_vit")
    add_degree_options(parser)
    files = ["--schedules", str(tmp_path / "cheap.json"), str(tmp_path / "dear.json")]
    args = parser.parse_args(["--method", "diffrate", *files, "--rescale"])
    degrees, highest = build_degrees(args, timm.create_model("tokcomp_digits_vit"))
    assert highest == 2
    assert [degrees(degree).metric for degree in (0, 1, 2)] == ["cls_attn_v"] * 3
    assert degrees(1).schedule.num_merge_kept == [65, 61, 57, 53, 49, 45]
    assert degrees(2).schedule.num_tokens == 65


@pytest.mark.parametrize("method", [{"name": "tome", "prop_attn": False}, {"name": "evit", "fuse": True}])
def test_a_schedule_of_another_method_is_run_by_that(run, ran, tmp_path, picture, method):
    name = method["name"]
    pruned, merged = (None, [57, 50, 40, 30, 20, 12]) if name == "tome" else ([65, 50, 50, 30, 30, 12], None)
    path = tmp_path / "other.json"
    tokcomp.CompressionSchedule(pruned, merged, num_tokens=65, method=method).save(path)
    status, _, err = run(*EVALUATE, "--schedule", path)
    assert status == 2 and f"--method must be {name}, which the schedule was made for, got diffrate" in err
    found = settings_of(ran, *EVALUATE[:-1], name, "--schedule", path)
    assert found.startswith({"tome": "ToMe(r=(8, 7, 10, 10, 10, 8), prop_attn=False)", "evit": "EViT("}[name])
    # No method named: the schedule says which.
    status, out, err = run("visualize", picture, *DIGITS[2:-2], "--schedule", path, "-o", tmp_path / "drawn")
    assert status == 0 and {"tome": "ToMe(", "evit": "EViT("}[name] in out, err


@pytest.mark.slow
def test_the_refined_schedule_is_what_evaluate_reads(run, ran, tmp_path):
    search = ("search", *DIGITS, "-b", "8", "--steps", "1", "--images", "16", "--held-out", "0", "--mixup", "0")
    options = ("--target-gflops", "0.012", "--cutmix", "0", "--refine", "8", "--refine-images", "12")
    out, _ = ran(*search, *options, "-o", tmp_path / "run")
    refined = tokcomp.CompressionSchedule.load(tmp_path / "run" / "refined.json")
    starts = refined.provenance["starts"]
    assert set(starts) == {"search", "tome", "evit", "uniform"} and refined.provenance["loss"] <= min(starts.values())
    found = out.split("Next: tokcomp ")[1].split()
    out, _ = ran(*found, "--num-samples", "20", "--json", "--device", "cpu", "-j", "0")
    assert json.loads(out)["gflops"] == pytest.approx(refined.provenance["gflops"], abs=1e-6)
    # More candidates go on from those.
    options = tuple("12" if option == "8" else option for option in options)
    status, _, err = run(*search, *options, "-o", tmp_path / "run", "--resume")
    assert status == 0 and "start tome" not in err
    more = tokcomp.CompressionSchedule.load(tmp_path / "run" / "refined.json").provenance
    assert more["candidates"] == 12 and more["loss"] <= refined.provenance["loss"] and more["starts"] == starts
