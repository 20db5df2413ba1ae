"""The repository for the `kernels` hub, loaded as its loader does: by path, beside the installed package."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokcomp_kernels
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import samples
from tools.kernels_hub import BACKENDS, write_repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "repository"
    return out, write_repository(out)


@pytest.fixture(scope="module")
def loaded(repository):
    """Every variant, by its metadata's id."""
    found = {}
    for variant in BACKENDS:
        folder = repository[0] / "build" / variant
        name = json.loads((folder / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name in [one for one in sys.modules if one.partition(".")[0] in found]:
        del sys.modules[name]


def test_operators_are_right_in_a_namespace_of_their_own(repository, loaded):
    assert len(loaded) == len(BACKENDS)
    for namespace, kernel in zip(repository[1], loaded.values(), strict=True):
        assert kernel.__all__ == tokcomp_kernels.__all__ and kernel.load_error.startswith("no compiled kernels")
        for name in ("attention", "prune_merge", "tome_merge", "prune_merge_norm"):
            for sample in list(samples(name, torch.float32))[:3]:
                own = getattr(getattr(torch.ops, namespace), name)
                outputs = own(*sample.args, **sample.kwargs)
                assert_right(sample, outputs)
                x, *_ = getattr(kernel, name)(*sample.args, **sample.kwargs)
                assert torch.equal(x, outputs[0])
    x = torch.randn(1, 9, 4, requires_grad=True)
    kernel.prune_merge(x, torch.rand(1, 9), 7, 4)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_nothing_leads_back_to_the_installed_package(repository, loaded):
    out, _ = repository
    modules = sorted(path.relative_to(out / "build/torch-cuda") for path in (out / "build/torch-cuda").rglob("*.py"))
    assert len(modules) > 60
    kernel = next(iter(loaded))
    for path in modules:
        if path.stem not in ("__init__", "int8"):
            importlib.import_module(".".join([kernel, *path.with_suffix("").parts]))
        text = (out / "build/torch-cuda" / path).read_text()
        assert not re.search(r"^\s*(?:from|import) tokcomp_kernels|import_module\(f?.tokcomp", text, re.M), path
        assert not re.search(rf"torch\.ops\.(?!{repository[1][0]})tokcomp\w*[.\"']", text), path
        assert not re.search(rf"Library\(.(?!{repository[1][0]})tokcomp\w*[.\"']", text), path


def test_its_benchmark_verifies(repository, loaded, monkeypatch):
    """On two images instead of 64."""
    benchmark = SimpleNamespace(Benchmark=type("Benchmark", (), {"device": "cpu"}))
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(benchmark=benchmark))
    monkeypatch.setitem(sys.modules, "kernels.benchmark", benchmark)
    names: dict = {}
    exec((repository[0] / "benchmarks" / "benchmark.py").read_text().replace("(64, ", "(2, "), names)
    block = names["BlockBenchmark"]()
    block.kernel = next(iter(loaded.values()))
    block.setup()
    for name in ("attention", "prune"):
        getattr(block, f"benchmark_{name}")()
        assert block.out.shape[0] == 2
        torch.testing.assert_close(block.out, getattr(block, f"verify_{name}")())


def test_a_folder_in_use_is_left(repository):
    with pytest.raises(FileExistsError, match="OUT must be a new or empty folder"):
        write_repository(Path(repository[0]))


def test_the_hub_s_own_loader_takes_it(repository):
    kernels = pytest.importorskip("kernels")
    out, (_, namespace) = repository
    kernel = kernels.get_local_kernel(out, backend="cpu")
    assert kernel.__name__ == f"_{namespace}"
