"""Measured latency: the table, its file, the budget made of it. Clocks are made up, so every number is known."""

from __future__ import annotations

import functools
import json

import pytest
import tokcomp
import torch
from tokcomp.blocks.state import BlockState
from tokcomp.budgets import (
    LatencyBudget,
    LatencyTable,
    MeasurementStopped,
    TargetError,
    TokenCounts,
    counts_of,
    find_latency_table,
    measure_latency,
)
from tokcomp.budgets.latency import TabulatedLatency
from tokcomp.budgets.measure import counts_to_measure
from tokcomp.budgets.vit_parts import VitParts


def stepped(part: str, count: int) -> float:
    """Milliseconds of a machine that works in tiles of 4 tokens."""
    tiles = -(-count // 4)
    return {"attention": tiles * tiles / 8, "reduce": 0.25, "mlp": tiles / 2, "head": count / 64, "embed": 1.5}[part]


def stepped_model(counts: TokenCounts) -> float:
    pairs = [(int(num_in), int(num_out)) for num_in, num_out in zip(*counts, strict=True)]
    blocks = sum(stepped("attention", a) + stepped("mlp", b) + (b < a) * stepped("reduce", a) for a, b in pairs)
    return stepped("embed", 0) + blocks + stepped("head", pairs[-1][1])


class Clock:
    """A stopwatch that runs the call once and says what :func:`stepped` says."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, call, launches: int) -> float:
        call()
        if not isinstance(call, functools.partial):
            self.asked.append(("embed", 0))
            return stepped("embed", 0) / 1e3
        if isinstance(call.func, torch.nn.Module):
            self.asked.append(("whole", 0))
            return stepped_model(counts_of(call.func, call.func._tokcomp_method)) / 1e3
        self.asked.append((call.func.__name__, call.args[0]))
        return stepped(*self.asked[-1]) / 1e3


@pytest.fixture(scope="module")
def table(make_vit) -> LatencyTable:
    return measure_latency(make_vit(), batch_size=2, spacing=4, rounds=2, watch=Clock())


def test_an_entry_is_what_the_clock_said(make_vit, table):
    assert table.counts == [2, 4, 5, 8, 9, 12, 13, 16, 17]
    for part in ("attention", "reduce", "mlp", "head"):
        assert getattr(table, f"{part}_ms") == pytest.approx([stepped(part, count) for count in table.counts])
    assert (table.depth, table.num_tokens, table.num_prefix_tokens, table.batch_size) == (4, 17, 1, 2)
    assert table.provenance["rounds"] == 2 and table.provenance["versions"]["torch"] == torch.__version__
    for row in table.provenance["check"].values():
        assert row["table_ms"] == pytest.approx(row["measured_ms"])


def test_every_entry_takes_its_turn_in_every_round(make_vit):
    clock = Clock()
    measure_latency(make_vit(), batch_size=1, spacing=8, rounds=3, watch=clock, check={})
    entries = 4 * len(counts_to_measure(17, 1, 8)) + 1
    turns = clock.asked[2 * entries :]  # the warm-up asks twice
    assert len(turns) == 3 * entries
    assert turns[:entries] == turns[entries : 2 * entries] == turns[2 * entries :]
    assert len(set(turns)) == entries


@pytest.mark.parametrize("spacing", [1, 4, 8, 16])
@pytest.mark.parametrize("tokens", [1, 2, 17, 197])
def test_both_sides_of_every_edge_are_measured(tokens, spacing):
    counts = counts_to_measure(tokens, 1, spacing)
    assert counts == sorted(set(counts)) and counts[0] == min(2, tokens) and counts[-1] == tokens
    assert {n for n in range(2, tokens + 1) if n % spacing == 0 or (n - 1) % spacing == 0} <= set(counts)
    if spacing == 1:
        assert counts == list(range(min(2, tokens), tokens + 1))


@pytest.mark.parametrize("seed", range(4))
def test_the_value_is_the_staircase_itself(table, seed):
    generator = torch.Generator().manual_seed(seed)
    measured = torch.tensor(table.counts)
    left = measured[torch.randint(0, len(measured), (4,), generator=generator)].sort(descending=True).values
    counts = TokenCounts(torch.cat([torch.tensor([17]), left[:-1]]).double(), left.double())
    assert table.milliseconds(counts) == pytest.approx(stepped_model(counts), rel=1e-12)


def test_between_measured_counts_it_is_linear(table):
    latency = TabulatedLatency(table)
    counts = [TokenCounts(torch.full((4,), 17.0), torch.tensor([17.0, 17.0, 17.0, last])) for last in (5.0, 6.0, 8.0)]
    five, six, eight = (latency(one).item() for one in counts)
    assert six == pytest.approx(five + (eight - five) / 3)


def test_gradients_see_past_a_flat_step(make_vit, table):
    num_out = torch.tensor([17.0, 16.0, 12.0, 7.0], requires_grad=True)  # 7: inside the step 5 .. 8
    num_in = torch.tensor([17.0, 17.0, 16.0, 12.0], requires_grad=True)
    budget = LatencyBudget(make_vit(), table, target_ms=15)
    budget.cost(TokenCounts(num_in, num_out)).backward()
    assert (num_out.grad > 0).all() and (num_in.grad > 0).all()
    # mlp rises by 0.5 ms per 4 tokens; the head adds 1/64 a token after the last block alone.
    assert num_out.grad[2].item() == pytest.approx(0.5 / 4, rel=0.15)
    assert num_out.grad[3].item() == pytest.approx(0.5 / 4 + 1 / 64, rel=0.15)


def test_more_tokens_never_cost_less(table):
    values = [table.milliseconds(TokenCounts(torch.full((4,), n), torch.full((4,), n))) for n in range(2, 18)]
    assert values == sorted(values)


def test_cost_keeps_float64_and_loss_is_relative(make_vit, table):
    model = make_vit()
    budget = LatencyBudget(model, table, target_ms=15)
    dense = counts_of(model)
    assert budget.cost(dense).dtype == torch.float64
    assert budget.uncompressed == pytest.approx(stepped_model(dense))
    assert budget.loss(dense).item() == pytest.approx((1 - 15 / budget.uncompressed) ** 2)


def test_a_rate_is_the_same_budget(make_vit, table):
    model = make_vit()
    by_time = LatencyBudget(model, table, target_ms=15)
    by_rate = LatencyBudget(model, table, target_images_per_s=2000 / 15)
    assert by_rate.target == pytest.approx(by_time.target)
    assert by_time.describe()["images_per_second"] == pytest.approx(2000 / 15)
    assert by_rate.describe()["batch_size"] == 2


@pytest.mark.parametrize("option", [dict(target_ms=100), dict(target_ms=1), dict(target_images_per_s=10)])
def test_an_unreachable_target_names_both_ends(make_vit, table, option):
    name, value = next(iter(option.items()))
    with pytest.raises(TargetError, match=rf"{name} must lie between .*uncompressed.*smallest.*got {value}"):
        LatencyBudget(make_vit(), table, **option)


@pytest.mark.parametrize("options", [dict(), dict(target_ms=15, target_images_per_s=133)])
def test_there_is_one_target(make_vit, table, options):
    with pytest.raises(ValueError, match="exactly one of target_ms and target_images_per_s"):
        LatencyBudget(make_vit(), table, **options)


def test_a_saved_table_comes_back(table, tmp_path):
    path = tmp_path / "table.json"
    table.save(path)
    loaded = LatencyTable.load(path)
    assert loaded == table and loaded.provenance == table.provenance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format="other"), "not a latency table"),
        (dict(version=2), "version must be 1, got 2"),
        (dict(counts=[4, 2]), "counts must be ascending"),
        (dict(mlp_ms=[1.0]), "mlp_ms must have one entry per count, 9, got 1"),
        (dict(num_tokens=99), "counts must end with the 99 tokens"),
        (dict(embed_ms=-1), "must be a finite number"),
        (dict(unknown=1), "not a valid latency table"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(table, tmp_path, change, message):
    path = tmp_path / "table.json"
    table.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        LatencyTable.load(path)
    assert str(path) in str(caught.value)


def test_what_is_no_json_is_refused_by_name(tmp_path):
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(ValueError, match=r"table\.json: not a JSON file"):
        LatencyTable.load(tmp_path / "table.json")


@pytest.mark.parametrize("options", [dict(depth=3), dict(embed_dim=48), dict(img_size=64), dict(class_token=False)])
def test_another_models_table_is_refused(make_vit, table, options):
    pool = dict(global_pool="avg") if "class_token" in options else {}
    with pytest.raises(ValueError, match="the latency table must be for this model"):
        LatencyBudget(make_vit(**options, **pool), table, target_ms=15)


def test_a_table_is_measured_once_and_then_read(make_vit, tmp_path):
    model, path = make_vit(), tmp_path / "table.json"
    measured = find_latency_table(model, path, batch_size=2, spacing=8, rounds=1, watch=Clock())

    def never(call, launches):
        raise AssertionError("the table is there already")

    assert find_latency_table(model, path, batch_size=2, watch=never) == measured
    with pytest.raises(ValueError, match=r"table\.json was measured with batch_size 2, got batch_size 3"):
        find_latency_table(model, path, batch_size=3, watch=never)
    with pytest.raises(ValueError, match=r"measured with dtype float32, got dtype bfloat16"):
        find_latency_table(model, path, dtype="bfloat16", watch=never)


def test_an_unwritable_place_shows_before_the_measurement(make_vit, tmp_path):
    clock, file = Clock(), tmp_path / "file"
    file.touch()
    with pytest.raises(OSError):
        find_latency_table(make_vit(), file / "table.json", watch=clock)
    assert not clock.asked


def test_stopping_leaves_no_file(make_vit, tmp_path):
    asked = iter(range(1000))
    path = tmp_path / "table.json"
    with pytest.raises(MeasurementStopped):
        find_latency_table(make_vit(), path, rounds=1, watch=Clock(), stop=lambda: next(asked) > 30)
    assert not list(tmp_path.iterdir())


def test_progress_is_reported(make_vit):
    lines: list[str] = []
    measure_latency(make_vit(), batch_size=1, spacing=4, rounds=1, watch=Clock(), report=lines.append)
    assert lines[0] == "measuring latency: 0 %, round 0 of 1"
    assert lines[-1] == "the latency table is within 0.0 % of 2 whole models"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=1, rounds=0), "rounds must be at least 1"),
        (dict(batch_size=1, dtype="int8"), "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (dict(batch_size=1, spacing=0), "spacing must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(make_vit, options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(make_vit(), watch=Clock(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(class_token=False, global_pool="avg"),
        dict(init_values=1e-4, qk_norm=True),
        dict(reg_tokens=2),
    ],
    ids=str,
)
def test_real_clocks_on_real_parts(make_vit, monkeypatch, options, dtype):
    monkeypatch.setattr("tokcomp.budgets.measure.TURN_SECONDS", 0)
    model = make_vit(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = measure_latency(model, batch_size=3, dtype=dtype, spacing=16, rounds=1)
    assert all(time > 0 for time in (*table.attention_ms, *table.mlp_ms, *table.head_ms, table.embed_ms))
    assert table.milliseconds(counts_of(model, tokcomp.ToMe(2))) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model).__name__ == "VisionTransformer" and tokcomp.restore(model) is model


def test_what_is_timed_as_a_reduction_drops_tokens(make_vit, monkeypatch):
    reduced: list[tuple[int, ...]] = []
    reduce = BlockState.reduce

    def spy(state: BlockState, x: torch.Tensor) -> torch.Tensor:
        x = reduce(state, x)
        reduced.append(tuple(x.shape))
        return x

    monkeypatch.setattr(BlockState, "reduce", spy)
    parts = VitParts(make_vit(), 2, torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        parts.attention(17)
        parts.mlp(17)
        assert not reduced
        parts.reduce(17)
        parts.reduce(2)  # a class token and one patch: nothing can go
    assert reduced == [(2, 16, 24), (2, 2, 24)]
