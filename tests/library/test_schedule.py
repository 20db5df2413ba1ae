from __future__ import annotations

import json
import os

import pytest
import tokcomp
from tokcomp.schedule import PUBLISHED_MODELS, published_budgets

SCHEDULE = tokcomp.CompressionSchedule([17, 12, 9], [17, 10, 8], {"model": "small", "gflops": 0.5, "seeds": [1, 2]})


def test_round_trip(tmp_path):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    loaded = tokcomp.CompressionSchedule.load(path)
    assert loaded == SCHEDULE
    assert loaded.num_prune_kept == [17, 12, 9]
    assert loaded.num_merge_kept == [17, 10, 8]
    assert loaded.provenance == SCHEDULE.provenance
    assert len(loaded) == 3


def test_handwritten_file_needs_only_the_lists(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"num_prune_kept": [5, 4], "num_merge_kept": [4, 3]}')
    assert tokcomp.CompressionSchedule.load(path) == tokcomp.CompressionSchedule([5, 4], [4, 3])


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
    ],
)
def test_unreadable_file_is_named(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"broken\.json.*{message}"):
        tokcomp.CompressionSchedule.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tokcomp.CompressionSchedule.load(tmp_path / "absent.json")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    before = path.read_bytes()

    def full_disk(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
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


def test_published_deit_small():
    schedule = tokcomp.DiffRate.published("deit_small_patch16_224", gflops=2.3).schedule
    assert schedule.num_prune_kept == [197, 192, 168, 143, 121, 105, 92, 74, 62, 45, 33, 3]
    assert schedule.num_merge_kept == [197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3]
    assert tokcomp.DiffRate.published("deit_small_patch16_224.fb_in1k", 2.3).schedule == schedule


def test_published_caformer_only_merges():
    method = tokcomp.DiffRate.published("caformer_s36", gflops=5.2)
    assert method.pipeline == "merge" and method.metric == "image_attn" and not method.similarity_weighted_size
    assert method.schedule.num_prune_kept is None


@pytest.mark.parametrize("name", ["deit_medium_patch16_224", "vit_base_patch16_224", "vit_base_patch16_224.augreg"])
def test_unknown_published_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="deit_tiny_patch16_224, deit_small_patch16_224, .*caformer_s36, got '" + name):
        tokcomp.DiffRate.published(name, gflops=2.3)


@pytest.mark.parametrize("budget", [2.4, "much", None, float("nan")])
def test_unknown_published_budget_lists_the_known_ones(budget):
    with pytest.raises(ValueError, match=r"deit_small_patch16_224 must be one of 2.3, 2.5, 2.7, 2.9, 3.1, got"):
        tokcomp.DiffRate.published("deit_small_patch16_224", gflops=budget)
