"""tokcomp.export: a package of one small model, opened as users open it. tests/building runs one from C++."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer

#: Of the C++ that calls the kernels; they themselves are compiled as always.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    return tokcomp.compress(plain, tokcomp.DiffRate(tokcomp.CompressionSchedule([14, 11], [12, 6])))


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "small.pt2"
    assert tokcomp.export(model, path, batch=1, max_batch=64, inductor_configs=QUICK) == path
    return path


@pytest.mark.slow
@torch.no_grad()
def test_any_batch(model, package, images_for):
    exported = tokcomp.load_exported(package)
    for batch in (1, 2, 5, 64):
        images = images_for(model, batch)
        torch.testing.assert_close(exported(images), model(images), atol=2e-5, rtol=0)
        torch.testing.assert_close(exported(images.mT.contiguous().mT), model(images), atol=2e-5, rtol=0)
    images = images_for(model, 2).requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = exported(images)
    torch.testing.assert_close(logits, model(images), atol=2e-5, rtol=0)
    assert not logits.requires_grad


@pytest.mark.slow
def test_what_it_says_of_itself(package):
    facts = tokcomp.load_exported(package).facts
    assert facts["model"] == "VisionTransformer" and facts["device"] == "cpu" and facts["torch"] == torch.__version__
    assert facts["method"].startswith("DiffRate(") and "num_merge_kept=[12, 6]" in facts["method"]
    assert "max_batch=64" in repr(tokcomp.load_exported(package))


@pytest.mark.slow
def test_other_images_are_refused(model, package, images_for):
    exported, images = tokcomp.load_exported(package), images_for(model, 65)
    for wrong, error, message in (
        (images, ValueError, r"images must be 1 to 64 of \[3, 32, 32\], got \[65, 3, 32, 32\]"),
        (images[:0], ValueError, r"got \[0, 3, 32, 32\]"),
        (images[:2, :, 1:], ValueError, r"got \[2, 3, 31, 32\]"),
        (images[0], ValueError, r"got \[3, 32, 32\]; a single image is a batch"),
        (images[:2].double(), TypeError, "images must be float32, as the model is, got float64"),
        (images.tolist(), TypeError, "images must be a Tensor"),
    ):
        with pytest.raises(error, match=message):
            exported(wrong)


@pytest.mark.slow
def test_the_kernels_alone_run_it(model, package, images_for, tmp_path):
    """Neither this library nor timm is imported where a package runs."""
    images = images_for(model)
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys; sys.modules['tokcomp'] = sys.modules['timm'] = None\n"
        "import torch, tokcomp_kernels\n"
        "import torch._inductor.codecache\n"  # PyTorch 2.10 looks there for the device, and forgets to import it
        f"images = torch.load('{tmp_path}/images.pt')\n"
        f"torch.save(torch._inductor.aoti_load_package('{package}')(images), '{tmp_path}/logits.pt')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(images), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_one_size_of_batch(make_vit, images_for, tmp_path):
    model = tokcomp.compress(make_vit(depth=1), tokcomp.EViT(0.6, blocks=(0,)))
    images = images_for(model, 3)
    path = tokcomp.export(model, tmp_path / "m.pt2", batch=3, dynamic_batch=False, inductor_configs=QUICK)
    exported = tokcomp.load_exported(path)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images), atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"images must be 3 of \[3, 32, 32\], got \[2, 3"):
        exported(images[:2])


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 1)

    def forward(self, images):
        return self.conv(images), images


def test_refusals(model, tmp_path):
    path = tmp_path / "m.pt2"
    for build, arguments, error, message in (
        (lambda: Pair().eval(), dict(img_size=8), TypeError, "model must return one tensor, got tuple"),
        (lambda: Pair(), dict(img_size=8), ValueError, "in training mode"),
        (lambda: Pair().double().eval(), dict(img_size=8), TypeError, "model must be of float32, float16, bfloat16"),
        (lambda: model, dict(batch=0), ValueError, "batch must be at least 1"),
        (lambda: model, dict(batch=9, max_batch=8), ValueError, "batch must be at most max_batch, 8, got 9"),
        (lambda: model, dict(max_batch=0), ValueError, "max_batch must be at least 1"),
        (lambda: model, dict(path=tmp_path / "no" / "m.pt2"), ValueError, "path must be a file in an existing folder"),
        (lambda: model, dict(path=tmp_path), ValueError, "path must be a file"),
    ):
        with pytest.raises(error, match=message):
            tokcomp.export(build(), **{"path": path, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_files_that_are_no_packages(tmp_path, package):
    import zipfile

    with pytest.raises(FileNotFoundError, match="which does not exist"):
        tokcomp.load_exported(tmp_path / "m.pt2")
    (tmp_path / "m.pt2").write_text("no package")
    with pytest.raises(ValueError, match="must be a package written by"):
        tokcomp.load_exported(tmp_path / "m.pt2")
    with zipfile.ZipFile(package) as whole, zipfile.ZipFile(tmp_path / "part.pt2", "w") as part:
        for name in whole.namelist():
            if not name.endswith("metadata.json"):
                part.writestr(name, whole.read(name))
    with pytest.raises(ValueError, match="must be a package written by"):
        tokcomp.load_exported(tmp_path / "part.pt2")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_package_for_cuda_says_so(package, monkeypatch):
    from tokcomp.deploy import exported

    monkeypatch.setattr(exported, "_facts_of", lambda path: {"device": "cuda"})
    with pytest.raises(RuntimeError, match="was exported for CUDA, which is not available here"):
        tokcomp.load_exported(package)
