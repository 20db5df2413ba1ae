"""A CAFormer with Semantic FPN, from its head's arithmetic to the command; and windows over whole photographs."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import tokcomp
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.metaformer import MetaFormer, SepConv
from tokcomp.cli import main
from tokcomp.dense import Segmenter, SemanticFPN, sliding_logits
from tokcomp.dense.data import WholeImages
from tokcomp.dense.files import SegmenterSettings, load_segmenter, save_segmenter
from tokcomp.dense.segmenter import position_tokens, pyramid_maps
from tokcomp.dense.windows import classes_at, window_starts
from tokcomp.runs.recipe import TOCOM_RECIPE
from tokcomp.tocom.distill import Distiller

from tests.cli.conftest import run  # noqa: F401
from tests.library.small_caformer import DIFFRATE, caformer, images_of, register_small
from tests.tocom.conftest import lively_plugin

NAME = register_small()


@pytest.fixture(scope="module")
def segmenter():
    encoder = caformer(num_classes=0)
    encoder.reset_classifier(0, "", reset_other=True)
    torch.manual_seed(1)
    return Segmenter(encoder, 4, "semantic_fpn").eval()


def test_the_head_by_hand():
    """Three maps in float64; sums over taps instead of convolutions, repeated pixels instead of interpolation."""
    torch.manual_seed(0)
    head = SemanticFPN((3, 5, 7), 4, width=6, head_width=32).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    maps = [torch.randn(2, width, 8 >> i, 12 >> i, dtype=torch.float64) for i, width in enumerate((3, 5, 7))]

    def convolved(x, layer):  # 3 x 3, as nine products with shifted images
        height, width = x.shape[-2:]
        x = F.pad(x, (1, 1, 1, 1))
        taps = [
            torch.einsum("oc,bchw->bohw", layer.weight[..., i, j], x[..., i : i + height, j : j + width])
            for i in range(3)
            for j in range(3)
        ]
        return sum(taps) + (0 if layer.bias is None else layer.bias[:, None, None])

    def normalised(x, norm):  # one channel per group here
        x = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
        return (x * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()

    def doubled(x):  # bilinear by 2: a quarter of the neighbour on either side
        for axis in (2, 3):
            size = x.shape[axis]
            before = x.index_select(axis, torch.arange(size).sub(1).clamp(min=0))
            after = x.index_select(axis, torch.arange(size).add(1).clamp(max=size - 1))
            x = torch.stack((0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after), axis + 1).flatten(axis, axis + 1)
        return x

    levels = []
    for norm, lateral, x in zip(head.norms, head.lateral, maps, strict=True):
        centred = x - x.mean(1, keepdim=True)
        x = centred / (x.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
        x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
        levels.append(torch.einsum("oc,bchw->bohw", lateral.weight[..., 0, 0], x) + lateral.bias[:, None, None])
    for level in (1, 0):
        levels[level] = levels[level] + levels[level + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    total = 0
    for level, (smooth, convolutions) in enumerate(zip(head.smooth, head.scales, strict=True)):
        assert len(convolutions) == max(1, level)
        x = convolved(levels[level], smooth)
        for convolution, norm, _ in convolutions:
            x = normalised(convolved(x, convolution), norm)
            x = doubled(x) if level else x
        total = total + x
    last = head.classifier
    expected = torch.einsum("oc,bchw->bohw", last.weight[..., 0, 0], total) + last.bias[:, None, None]
    ours = head(maps)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11 * float(expected.detach().abs().max()))


def test_a_caformer_with_semantic_fpn(segmenter):
    images = images_of(batch=2)
    with torch.no_grad():
        plain = segmenter(images)
        assert plain.shape == (2, 4, 64, 96) and segmenter.patch_logits(images).shape == (2, 4, 16, 24)
        assert segmenter(images_of(batch=1, height=57, width=70)).shape == (1, 4, 57, 70)
        tokcomp.compress(segmenter.encoder, tokcomp.ToMe(0))
        torch.testing.assert_close(segmenter(images), plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
        tokcomp.compress(segmenter.encoder, DIFFRATE)
        merged = segmenter(images)
        assert merged.shape == plain.shape and not torch.allclose(merged, plain)
    F.cross_entropy(segmenter(images), torch.randint(4, (2, 64, 96))).backward()
    missing = [name for name, one in segmenter.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert not missing
    segmenter.zero_grad()
    tokcomp.restore(segmenter.encoder)
    with torch.no_grad():
        assert torch.equal(segmenter(images), plain)


def test_the_papers_multiply_adds():
    """DiffRate, Table 13: 77.2 G at 512 x 704."""
    with torch.device("meta"):
        encoder = timm.create_model("caformer_s36", num_classes=0)
    assert round(tokcomp.flops(encoder, img_size=(512, 704)) / 1e9, 1) == 77.2
    tokcomp.compress(encoder, tokcomp.DiffRate.published("caformer_s36", 6.0, num_tokens=32 * 44))
    assert tokcomp.flops(encoder, img_size=(512, 704)) < 54.5e9


def test_heads_and_encoders_have_to_fit(segmenter, make_vit):
    with pytest.raises(ValueError, match="head must be semantic_fpn for a MetaFormer, got 'mask_transformer'"):
        Segmenter(segmenter.encoder, 4)
    with pytest.raises(ValueError, match="head must be linear or mask_transformer for a VisionTransformer"):
        Segmenter(make_vit(), 4, "semantic_fpn")
    with pytest.raises(tokcomp.UnsupportedModelError, match="SepConv is not understood"):
        Segmenter(MetaFormer(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), token_mixers=SepConv), 4, "semantic_fpn")
    with pytest.raises(tokcomp.UnsupportedModelError, match="tokens of one grid, got a MetaFormer; its maps are"):
        position_tokens(segmenter.encoder, images_of(batch=1))
    with pytest.raises(ValueError, match=re.escape("images must be [B, 3, H, W], got [3, 64, 96]")):
        segmenter(torch.zeros(3, 64, 96))


def test_windows_cover_every_pixel(segmenter):
    """Each pixel's logits are the mean over the windows that it is in, whatever the batches."""
    assert (
        window_starts(10, 4, 3) == [0, 3, 6] and window_starts(4, 4, 4) == [0] and window_starts(9, 4, 4) == [0, 4, 5]
    )
    with pytest.raises(ValueError, match=r"a window must be no larger than the image .* got 8 of 4 pixels"):
        window_starts(4, 8, 2)
    images = images_of(batch=2, height=64, width=80)
    with torch.no_grad():
        ours = sliding_logits(segmenter, images, (48, 64), (12, 16), batch_size=3)
        parts = [[[] for _ in range(80)] for _ in range(64)]
        for top in (0, 12, 16):
            for left in (0, 16):
                logits = segmenter(images[:, :, top : top + 48, left : left + 64])
                for row in range(48):
                    for column in range(64):
                        parts[top + row][left + column].append(logits[:, :, row, column])
    expected = torch.stack([torch.stack([torch.stack(one).mean(0) for one in row], -1) for row in parts], -2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    large = F.interpolate(ours, (100, 131), mode="bilinear", align_corners=False)
    assert torch.equal(classes_at(ours, (100, 131), at_once=3), large.argmax(1))


def test_whole_images_keep_their_shape():
    pairs = [
        (Image.new("RGB", (90, 40)), np.zeros((40, 90), np.uint8)),
        (Image.new("RGB", (30, 70)), np.zeros((70, 30))),
    ]
    data = WholeImages(pairs, (32, 48), (0.5,) * 3, (0.5,) * 3)
    (wide, wide_mask), (tall, tall_mask) = data[0], data[1]
    assert wide.shape == (3, 32, 72) and wide_mask.shape == (40, 90)
    assert tall.shape == (3, 112, 48) and tall_mask.shape == (70, 30)


def test_its_file(tmp_path):
    settings = SegmenterSettings(NAME, (64, 96), "semantic_fpn", ("sky", "sea"), (0.5,), (0.5,))
    segmenter, images = settings.build(), images_of(batch=1)
    save_segmenter(tmp_path / "one.safetensors", segmenter, settings)
    other, _ = load_segmenter(tmp_path / "one.safetensors", img_size=(96, 64), drop_path_rate=0.1)
    with torch.no_grad():
        assert torch.equal(other(images), segmenter(images))
    huge = SegmenterSettings(**{**vars(settings), "img_size": (10**6, 10**6)})
    save_segmenter(tmp_path / "huge.safetensors", segmenter, huge)
    with pytest.raises(ValueError, match="img_size must be that of the weights"):
        load_segmenter(tmp_path / "huge.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramid")
    few = ("--train-images", "4", "--num-samples", "2", "--steps", "2", "-b", "2", "--device", "cpu", "--r", "1")
    data = ("-m", NAME, "--img-size", "48,64")
    assert main(["dense", "train", *data, *few, "-o", str(folder / "run")]) == 0
    schedule = tokcomp.CompressionSchedule(None, [12, 9, 7, 6], num_tokens=12)
    schedule.save(folder / "mine.json")
    return SimpleNamespace(folder=folder, weights=folder / "run" / "segmenter.safetensors")


def test_the_command(run, trained, tmp_path):  # noqa: F811
    summary = json.loads((trained.folder / "run" / "summary.json").read_text())
    assert summary["settings"]["head"] == "semantic_fpn" and 0 <= summary["mean_iou"] <= 100
    common = ("dense", "evaluate", trained.weights, "--num-samples", "2", "--device", "cpu")
    schedule = ("--schedule", trained.folder / "mine.json")
    status, out, err = run(*common, "--degrees", "0,2", *schedule, "--json")
    assert status == 0, err
    rows = json.loads(out)["degrees"]
    assert [row["r"] for row in rows] == [0, 2, None] and rows[2]["schedule"] == "mine"
    assert rows[0]["gflops"] > rows[1]["gflops"] and rows[0]["gflops"] > rows[2]["gflops"]
    status, out, err = run(*common, *schedule, "--img-size", "32,64", "--full-resolution", "--stride", "12,16")
    assert status == 0 and "mine" in out and "2 images, 32 x 64" in out, err
    few = ("--train-images", "2", "--steps", "1", "-b", "2", "--device", "cpu", "-o", tmp_path / "plugin")
    status, _, err = run("dense", "tocom", trained.weights, "--max-degree", "2", *few)
    assert status == 0, err
    plugin = ("--plugin", tmp_path / "plugin" / "tocom.safetensors")
    status, out, err = run(*common, *plugin, "--json")
    rows = json.loads(out)["degrees"]
    assert status == 0 and rows[0]["mean_iou"] == rows[0]["mean_iou_with_plugin"], err
    target = tmp_path / "drawn.png"
    drawn = ("--degrees", "0,2", "--num-samples", "1", "-o", target)
    status, _, err = run("dense", "visualize", trained.weights, *plugin, *drawn)
    assert status == 0 and target.is_file(), err


def test_a_plugin_s_step_compares_the_pyramid_s_answers(segmenter):
    segmenter = copy.deepcopy(segmenter).double().requires_grad_(False)
    encoder, images = segmenter.encoder, images_of(batch=2).double()
    plugin = lively_plugin(encoder, std=1.0, max_degree=3)
    recipe = replace(TOCOM_RECIPE, mixup=0.0, cutmix=0.0, opt="sgd", sched="none", weight_decay=0.0)
    places = dict(total_steps=2, steps_per_epoch=2, device=torch.device("cpu"))
    asked = dict(call=pyramid_maps, read=segmenter.patch_answers)
    distiller = Distiller(encoder, plugin, lambda degree: tokcomp.ToMe(3 * degree), recipe, **places, **asked)
    before = copy.deepcopy(plugin.state_dict())
    found = distiller.step(images.clone())
    source, target = distiller.drawn
    plugin.load_state_dict(before)
    assert all(parameter.grad.abs().sum() > 0 for parameter in plugin.parameters())
    with torch.no_grad():
        tokcomp.compress(encoder, tokcomp.ToMe(3 * source))
        p = segmenter.patch_logits(images).softmax(1)
        with plugin.applied(tokcomp.compress(encoder, tokcomp.ToMe(3 * target)), source, target):
            q = segmenter.patch_logits(images).softmax(1)
    expected = (p * (p / q).log()).sum(1).mean()  # over the images and positions
    assert expected > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "FILE", "--stride", "8"), "--stride belongs to --full-resolution"),
        (("evaluate", "FILE", "--full-resolution", "--stride", "60"), "--stride must be at most the window, 48,64"),
        (("evaluate", "FILE", "--gflops", "5.2"), "--gflops: name must be one of deit_tiny"),
        (("evaluate", "FILE", "--method", "tome_mlp", "--degrees", "1"), "degree 1 at --tokens-per-degree 1: "),
        (("evaluate", "FILE", "--merge-residual"), "--merge-residual belongs to --method tome_mlp"),
        (("tocom", "FILE", "--merge-residual"), "--merge-residual belongs to --method tome_mlp, got tome"),
        (
            ("train", "-m", NAME, "--head", "linear"),
            "--head must be semantic_fpn for caformer_small, got linear",
        ),
    ],
    ids=str,
)
def test_mistakes_are_named(run, trained, tmp_path, arguments, message):  # noqa: F811
    output = () if arguments[0] == "evaluate" else ("-o", tmp_path / "out")
    status, _, err = run("dense", *(trained.weights if one == "FILE" else one for one in arguments), *output)
    assert status == 2 and message in err
