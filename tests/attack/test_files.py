"""Every format that is read, damaged and hostile: refused by name, or read as what was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokcomp
import torch
from safetensors.torch import save
from tokcomp import adaptformer
from tokcomp.budgets.latency import LatencyTable
from tokcomp.cli.weights import read_weights
from tokcomp.dense.files import SegmenterSettings, load_segmenter, save_segmenter
from tokcomp.reading import DIGEST, digest, parse_json, read_metadata, read_tensors, tensors_to_bytes
from tokcomp.runs.checkpoint import load_checkpoint, save_checkpoint
from tokcomp.runs.log import read_log
from tokcomp.tocom.files import read_plugin

from tests.attack.parts import Part

HOSTILE = (
    None,
    -1,
    0,
    10**10,
    10**400,
    1e308,
    "",
    "x",
    [],
    {},
    True,
    "\0",
    [[[]]],
    "hf-hub:a/b",
    "../../x",
    float("nan"),
)


class Format(NamedTuple):
    """A file that loads, and how: what ``load`` gives is compared by its digest."""

    content: bytes
    load: Callable[[Path], Any]
    has_digest: bool = False
    structured: str = ""  # "json", or the metadata's JSON entries of a safetensors file


@pytest.fixture
def formats(make_vit: Any, tmp_path: Path) -> dict[str, Format]:
    """One file of each kind, read as the commands read it."""
    model, path = make_vit(), tmp_path / "made"

    def written(write: Callable[[Path], Any]) -> bytes:
        write(path)
        return path.read_bytes()

    schedule = tokcomp.CompressionSchedule([17, 13, 9, 5], [17, 11, 7, 4], {"a": [1]}, num_tokens=17)
    times = [0.1, 0.2]
    block = {"projections": 1, "width": 2, "mlp": 3}
    latency = LatencyTable(4, 17, 1, block, 8, "float32", 0.1, [1, 17], times, times, times, times)
    plugin = tokcomp.ToCom(model, max_degree=2)
    plugin.method, plugin.provenance = "tome", {"steps": [1, 2]}
    branches = adaptformer.attach(make_vit(), 2)
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    settings = SegmenterSettings("vit_tiny_patch16_224", (32, 32), "linear", ("a", "b"), (0.5,), (0.5,), options)
    names = {f"blocks.0.attn.{part}_tocom.adapter_{side}.weight" for part in "qv" for side in ("down", "up")}
    published = {name: torch.ones(4, 24) if "down" in name else torch.ones(24, 4) for name in names}
    state = {"settings": {"lr": 0.1}, "step": 3, "weights": {"w": torch.arange(50.0)}}
    weights = {"w": torch.arange(50.0), "b": torch.ones(3, 2)}
    log = "step,loss,lr\n" + "".join(f"{step},{1 / step!r},0.1\n" for step in range(1, 9))
    return {
        "schedule": Format(written(schedule.save), lambda p: vars(tokcomp.CompressionSchedule.load(p)), False, "json"),
        "latency table": Format(written(latency.save), lambda p: vars(LatencyTable.load(p)), False, "json"),
        "plugin": Format(
            written(plugin.save),
            lambda p: [tokcomp.ToCom.load(p, model).state_dict(), read_plugin(p).provenance],
            True,
            "width attention_width provenance depth rank max_degree",
        ),
        "published plugin": Format(written(lambda p: torch.save(published, p)), lambda p: read_plugin(p).tensors),
        "branches": Format(
            written(lambda p: adaptformer.save(branches, p)),
            lambda p: adaptformer.load(p, branches).state_dict(),
            True,
            "bottleneck depth width scale",
        ),
        "segmenter": Format(
            written(lambda p: save_segmenter(p, settings.build(), settings)),
            lambda p: load_segmenter(p)[0].state_dict(),
            True,
            "settings",
        ),
        "checkpoint": Format(
            written(lambda p: save_checkpoint(p, "search", state)), lambda p: load_checkpoint(p, "search"), True
        ),
        "log": Format(log.encode(), read_log),
        "weights": Format(written(lambda p: torch.save(weights, p)), read_weights),
        "safetensors": Format(save(weights), lambda p: read_tensors(p, "weights")),
    }


def damaged(rng: random.Random, data: bytes) -> bytes:
    place, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 100])
    end = place + length
    return rng.choice(
        [
            lambda: data[:place],
            lambda: data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :],
            lambda: data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :],
            lambda: data[:place] + rng.randbytes(length) + data[end:],
            lambda: data[:place] + bytes(length) + data[end:],
            lambda: data[:place] + data[end:],
            lambda: data[:place] + rng.randbytes(length) + data[place:],
            lambda: data[:place] + data[place:end] * 3 + data[end:],
            lambda: rng.randbytes(length),
            lambda: b"",
        ]
    )()


def test_damaged(formats: dict[str, Format], tmp_path: Path) -> None:
    path, want = tmp_path / "damaged", {}
    for name, one in formats.items():
        path.write_bytes(one.content)
        want[name] = digest(one.load(path))

    def check(rng: random.Random) -> str:
        name = rng.choice(list(formats))
        one = formats[name]
        path.write_bytes(damaged(rng, one.content))
        try:
            found = digest(one.load(path))
        except (ValueError, OSError) as error:
            assert str(error), f"{name}: {error!r} says nothing"
            return "refused"
        if found == want[name]:
            return "read as written"
        # Damage to the digest's own name leaves a file without one.
        assert not one.has_digest or DIGEST not in {*read_metadata(path)}, f"{name}: other contents were read"
        return "read as something else, without a digest"

    Part("damaged", share=0.06, few=60).each(check)


def leaf(rng: random.Random, data: Any) -> Any:
    """The same data with a hostile value at some place."""
    if isinstance(data, dict) and data and rng.random() < 0.9:
        name = rng.choice(list(data))
        return {**data, name: leaf(rng, data[name])}
    if isinstance(data, list) and data and rng.random() < 0.7:
        place = rng.randrange(len(data))
        return [*data[:place], leaf(rng, data[place]), *data[place + 1 :]]
    return rng.choice(HOSTILE)


def test_hostile(formats: dict[str, Format], tmp_path: Path) -> None:
    """Well-formed files with a value that does not belong there, and a digest that fits."""
    path = tmp_path / "hostile"

    def check(rng: random.Random) -> str:
        name = rng.choice([name for name, one in formats.items() if one.structured])
        one = formats[name]
        path.write_bytes(one.content)
        if one.structured == "json":
            path.write_text(json.dumps(leaf(rng, parse_json(one.content))))
        else:
            tensors, about = read_tensors(path, name)
            entry = rng.choice(one.structured.split())
            about[entry] = json.dumps(leaf(rng, parse_json(about[entry])))
            path.write_bytes(tensors_to_bytes(tensors, about))
        try:
            one.load(path)
        except (ValueError, OSError):
            return "refused"
        return "read"

    Part("hostile", share=0.04, few=60).each(check)
