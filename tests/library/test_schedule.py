from __future__ import annotations

import json
import os
from dataclasses import replace
from unittest.mock import Mock

import pytest
import tokcomp
from tokcomp.schedule import PUBLISHED_MODELS, published_budgets

SCHEDULE = tokcomp.CompressionSchedule(
    [17, 12, 9],
    [17, 10, 8],
    {"model": "small", "gflops": 0.5, "seeds": [1, 2]},
    num_tokens=17,
    method={"metric": "random", "pipeline": "merge_prune", "seed": 3, "similarity_weighted_size": False},
)


def test_round_trip(tmp_path):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    loaded = tokcomp.CompressionSchedule.load(path)
    assert loaded == SCHEDULE
    assert loaded.num_prune_kept == [17, 12, 9]
    assert loaded.num_merge_kept == [17, 10, 8]
    assert loaded.provenance == SCHEDULE.provenance
    assert (loaded.num_tokens, loaded.num_prefix_tokens, loaded.method) == (17, 1, SCHEDULE.method)
    assert len(loaded) == 3


def test_handwritten_file_needs_only_the_lists(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"num_prune_kept": [5, 4], "num_merge_kept": [4, 3]}')
    loaded = tokcomp.CompressionSchedule.load(path)
    assert loaded == tokcomp.CompressionSchedule([5, 4], [4, 3])
    assert loaded.num_tokens is None and loaded.method is None


def test_provenance_is_not_compared():
    assert tokcomp.CompressionSchedule([5], [4], {"a": 1}) == tokcomp.CompressionSchedule([5], [4])
    assert tokcomp.CompressionSchedule([5], [4]) != tokcomp.CompressionSchedule([5], [3])


def test_index_types_become_ints():
    numpy = pytest.importorskip("numpy")
    schedule = tokcomp.CompressionSchedule(numpy.array([5, 4]), (4, 3))
    assert schedule.num_prune_kept == [5, 4] and type(schedule.num_prune_kept[0]) is int
    assert schedule.num_merge_kept == [4, 3]


@pytest.mark.parametrize(
    ("prune", "merge", "error", "message"),
    [
        ([5, 4], [4], ValueError, "num_prune_kept and num_merge_kept must have one entry per block each, got 2 and 1"),
        ([5, 0], [4, 3], ValueError, r"num_prune_kept\[1\] must be at least 1, got 0"),
        ([5, 4], [4, -3], ValueError, r"num_merge_kept\[1\] must be at least 1, got -3"),
        ([5, 4.5], [4, 3], TypeError, r"num_prune_kept\[1\] must be an integer, got 4.5"),
        ([5, True], [4, 3], TypeError, r"num_prune_kept\[1\] must be an integer, got True"),
        ("54", [4, 3], TypeError, "num_prune_kept must be a list of integers, one per block, got '54'"),
        (5, [4], TypeError, "num_prune_kept must be a list of integers"),
        ([], [], ValueError, "num_prune_kept must have one entry per block, got none"),
        (None, None, ValueError, "must not both be None"),
    ],
)
def test_wrong_counts(prune, merge, error, message):
    with pytest.raises(error, match=message):
        tokcomp.CompressionSchedule(prune, merge)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"num_tokens": 1}, ValueError, "num_tokens must be at least 2, got 1"),
        ({"num_tokens": 17.0}, TypeError, "num_tokens must be an integer, got 17.0"),
        ({"num_tokens": 5, "num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be at least 0, got -1"),
        ({"method": "merge"}, TypeError, "method must be a dict of DiffRate's arguments, got 'merge'"),
        ({"method": {"metrics": "random"}}, ValueError, "no settings but metric, pipeline, seed, .*, got 'metrics'"),
        ({"method": {"seed": "3"}}, TypeError, r"method\['seed'\] must be of type int, got '3'"),
    ],
)
def test_wrong_tokens_and_methods(more, error, message):
    with pytest.raises(error, match=message):
        tokcomp.CompressionSchedule([5], [4], **more)


def test_the_method_is_read_from_the_schedule():
    method = tokcomp.DiffRate(SCHEDULE)
    assert (method.metric, method.pipeline, method.seed) == ("random", "merge_prune", 3)
    assert method.similarity_weighted_size is False and method.needs == frozenset()
    partly = tokcomp.DiffRate(replace(SCHEDULE, method={"metric": "image_attn"}))
    assert (partly.metric, partly.pipeline, partly.similarity_weighted_size) == ("image_attn", "prune_merge", True)
    same = tokcomp.DiffRate(SCHEDULE, metric="random", pipeline="merge_prune", seed=3, similarity_weighted_size=False)
    assert vars(same) == vars(method)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"metric": "cls_attn"}, "metric must be 'random', which the schedule was made with, got 'cls_attn'"),
        ({"pipeline": "prune_merge"}, "pipeline must be 'merge_prune', .* got 'prune_merge'"),
        ({"seed": 0}, "seed must be 3, .* got 0; leave seed out"),
        ({"similarity_weighted_size": True}, "similarity_weighted_size must be False"),
    ],
)
def test_what_contradicts_the_schedule_is_refused(argument, message):
    with pytest.raises(ValueError, match=message + r".*dataclasses\.replace\(schedule, method=None\)"):
        tokcomp.DiffRate(SCHEDULE, **argument)
    assert tokcomp.DiffRate(replace(SCHEDULE, method=None), **argument).schedule.num_prune_kept == [17, 12, 9]


def test_rescaled_keeps_the_shares_of_the_patches():
    wide = tokcomp.DiffRate.published("deit_small_patch16_224", 2.3, num_tokens=577).schedule
    plain = tokcomp.DiffRate.published("deit_small_patch16_224", 2.3).schedule
    assert wide == plain.rescaled(577) and wide.num_tokens == 577
    for counts, scaled in ((plain.num_prune_kept, wide.num_prune_kept), (plain.num_merge_kept, wide.num_merge_kept)):
        # 576 patches for 196, rounded to the nearest; the class token is no patch.
        assert all(abs((many - 1) - (few - 1) * 576 / 196) <= 0.5 for few, many in zip(counts, scaled, strict=True))
    assert wide.provenance["rescaled"] == {"num_tokens": 197, "provenance": plain.provenance}
    assert plain.rescaled(197) == plain and plain.rescaled(197).provenance == plain.provenance


def test_rescaled_counts_by_hand():
    schedule = tokcomp.CompressionSchedule([17, 10, 1, 3], [99, 9, 4, 2], num_tokens=17, method={"metric": "random"})
    few = schedule.rescaled(5)  # 4 patches for 16
    assert (few.num_prune_kept, few.num_merge_kept) == ([5, 3, 1, 2], [26, 3, 2, 2])  # one patch is left where one was
    assert few.method == schedule.method
    assert schedule.rescaled(18, num_prefix_tokens=2).num_prune_kept == [18, 11, 2, 4]  # a distillation token more
    assert schedule.rescaled(18, num_prefix_tokens=2).num_prefix_tokens == 2
    merging = tokcomp.CompressionSchedule(None, [196, 98, 49], num_tokens=196, num_prefix_tokens=0)
    assert merging.rescaled(576).num_merge_kept == [576, 288, 144] and merging.rescaled(576).num_prune_kept is None


def test_rescaled_refusals():
    with pytest.raises(ValueError, match=r"must know its num_tokens .*got None; .*replace\(schedule, num_tokens=197\)"):
        tokcomp.CompressionSchedule([5], [4]).rescaled(9)
    with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
        SCHEDULE.rescaled(1)
    with pytest.raises(TypeError, match="num_tokens must be an integer, got"):
        SCHEDULE.rescaled(9.5)


def test_wrong_provenance(tmp_path):
    with pytest.raises(TypeError, match="provenance must be a dict, got str"):
        tokcomp.CompressionSchedule([5], [4], "DeiT")
    with pytest.raises(TypeError, match="provenance must be JSON data"):
        tokcomp.CompressionSchedule([5], [4], {"when": object()}).save(tmp_path / "schedule.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[1, 2]", "must be a JSON object with num_prune_kept and num_merge_kept"),
        ('{"num_prune_kept": [1]}', "must be a JSON object with num_prune_kept and num_merge_kept"),
        ('{"num_prune_kept": [1], "num_merge_kept": [1], "format": "other"}', "format must be"),
        ('{"num_prune_kept": [1], "num_merge_kept": [1], "version": 9}', "version must be 1, got 9"),
        ('{"num_prune_kept": [1, 2], "num_merge_kept": [1]}', "one entry per block each"),
        ('{"num_prune_kept": [1], "num_merge_kept": [1], "num_tokens": "197"}', "num_tokens must be an integer"),
        ('{"a": {"1": {"prune_kept_num": "[1", "merge_kept_num": "[1]"}}}', "Expecting"),
    ],
)
def test_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
        tokcomp.CompressionSchedule.load(path)


def published_file(folder):
    """A file as DiffRate's repository has it: lists as text."""
    table = {
        name: {
            f"{budget:.1f}": {
                "prune_kept_num": str(schedule.num_prune_kept),
                "merge_kept_num": str(schedule.num_merge_kept),
            }
            for budget in budgets
            for schedule in [tokcomp.DiffRate.published(timm_name, budget).schedule]
        }
        for timm_name, budgets in published_budgets().items()
        for name in [PUBLISHED_MODELS[timm_name]]
    }
    path = folder / "compression_rate.json"
    path.write_text(json.dumps(table))
    return path


def test_the_published_file_format(tmp_path):
    path = published_file(tmp_path)
    assert '"None"' in path.read_text() and '"[197, ' in path.read_text()
    for name, budgets in published_budgets().items():
        for budget in budgets:
            for wanted in (name, PUBLISHED_MODELS[name]):
                loaded = tokcomp.CompressionSchedule.load(path, model=wanted, gflops=budget)
                assert loaded == tokcomp.DiffRate.published(name, budget).schedule
    with pytest.raises(ValueError, match=r"rate\.json: model must be one of ViT-T-DeiT, .*CAFormer-S36.*, got None"):
        tokcomp.CompressionSchedule.load(path, gflops=2.3)
    with pytest.raises(ValueError, match=r"rate\.json: gflops for ViT-S-DeiT must be one of 2.3, .*, got None"):
        tokcomp.CompressionSchedule.load(path, model="deit_small_patch16_224")


def test_a_table_of_one_entry_needs_no_choice(tmp_path):
    path = tmp_path / "mine.json"
    entry = {"prune_kept_num": [9, 7], "merge_kept_num": [9, 5]}
    path.write_text(json.dumps({"my-vit": {"0.5": entry}}))
    loaded = tokcomp.CompressionSchedule.load(path)
    assert loaded == tokcomp.CompressionSchedule([9, 7], [9, 5]) and loaded.num_tokens is None
    assert loaded.provenance == {"model": "my-vit", "gflops": 0.5}
    assert tokcomp.CompressionSchedule.load(path, model="another name", gflops=0.5) == loaded
    with pytest.raises(ValueError, match=r"gflops for my-vit must be one of 0\.5, got 0\.6"):
        tokcomp.CompressionSchedule.load(path, gflops=0.6)
    SCHEDULE.save(path)
    with pytest.raises(ValueError, match="gflops chooses among the entries of a table, got a single schedule"):
        tokcomp.CompressionSchedule.load(path, gflops=0.6)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tokcomp.CompressionSchedule.load(tmp_path / "absent.json")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    before = path.read_bytes()

    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        tokcomp.CompressionSchedule([3], [2]).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["schedule.json"]


def test_file_has_the_mode_of_a_plain_file(tmp_path):
    SCHEDULE.save(tmp_path / "schedule.json")
    (tmp_path / "plain").touch()
    assert (tmp_path / "schedule.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    json.loads((tmp_path / "schedule.json").read_text())


def test_every_published_schedule_loads():
    budgets = published_budgets()
    assert set(budgets) == set(PUBLISHED_MODELS)
    for name, values in budgets.items():
        for budget in values:
            method = tokcomp.DiffRate.published(name, gflops=budget)
            assert len(method.schedule) == {"caformer_s36": 21, "vit_large_patch16_224.mae": 24}.get(
                name, 32 if "huge" in name else 12
            )
            assert method.schedule.provenance["gflops"] == budget


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_schedules_know_their_tokens(meta_model, name):
    model = meta_model(name)
    method = tokcomp.DiffRate.published(name, published_budgets()[name][0])
    tokcomp.compress(model, method)
    counts = method.schedule.num_merge_kept
    assert method.schedule.num_tokens == counts[0]  # block 0 keeps every token
    assert tokcomp.flops(model) > 0  # which asks for the model's own count


def test_published_deit_small():
    schedule = tokcomp.DiffRate.published("deit_small_patch16_224", gflops=2.3).schedule
    assert schedule.num_prune_kept == [197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3]
    assert schedule.num_merge_kept == [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3]
    assert tokcomp.DiffRate.published("deit_small_patch16_224.fb_in1k", 2.3).schedule == schedule


def test_published_caformer_only_merges():
    method = tokcomp.DiffRate.published("caformer_s36", gflops=5.2)
    assert method.pipeline == "merge" and method.metric == "image_attn" and not method.similarity_weighted_size
    assert method.schedule.num_prune_kept is None
    assert vars(tokcomp.DiffRate(method.schedule)) == vars(method)


def test_deit_tiny_at_its_largest_budget_is_the_repository_s():
    """The paper's Table 10 has 3 and 3 in the last block; the logits are the same, the cost is not."""
    schedule = tokcomp.DiffRate.published("deit_tiny_patch16_224", 1.0).schedule
    assert (schedule.num_prune_kept[-1], schedule.num_merge_kept[-1]) == (21, 21)


@pytest.mark.parametrize("name", ["deit_medium_patch16_224", "vit_base_patch16_224", "vit_base_patch16_224.augreg"])
def test_unknown_published_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="deit_tiny_patch16_224, deit_small_patch16_224, .*caformer_s36, got '" + name):
        tokcomp.DiffRate.published(name, gflops=2.3)


@pytest.mark.parametrize("budget", [2.4, "much", None, float("nan")])
def test_unknown_published_budget_lists_the_known_ones(budget):
    with pytest.raises(ValueError, match=r"deit_small_patch16_224 must be one of 2.3, 2.5, 2.7, 2.9, 3.1, got"):
        tokcomp.DiffRate.published("deit_small_patch16_224", gflops=budget)
