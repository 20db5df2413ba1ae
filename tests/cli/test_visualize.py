from __future__ import annotations

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tokcomp.cli import build_parser
from tokcomp.cli.pictures import drawing_names
from tokcomp.cli.visualize import _choose_method
from tokcomp.visualize import choose_blocks, paint_groups

TINY = ("visualize", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu")
TOME = ("--method", "tome", "--r", "8")


def test_group_has_its_mean_colour_and_pruned_is_black():
    image = torch.zeros(3, 4, 4)
    image[:, :2, :2] = 1.0  # patch 0 white, patch 1 black: the pair's mean is grey
    image[0, 2:, 2:] = 1.0  # patch 3 red
    painted = paint_groups(image, torch.tensor([5, 5, -1, 2]), (2, 2), cell=8, outline=0)
    assert painted.size == (16, 16)
    assert painted.getpixel((4, 4)) == painted.getpixel((12, 4)) == (128, 128, 128)
    assert painted.getpixel((4, 12)) == (0, 0, 0)
    assert painted.getpixel((12, 12)) == (255, 0, 0)


def test_merged_groups_are_outlined_in_one_colour_and_not_inside():
    image = torch.full((3, 4, 4), 0.5)
    painted = paint_groups(image, torch.tensor([0, 0, 1, 0]), (2, 2), cell=10, outline=2)
    outline = painted.getpixel((0, 0))
    assert outline != (128, 128, 128)
    assert painted.getpixel((19, 19)) == painted.getpixel((10, 15)) == outline  # a corner, and the edge to patch 2
    assert painted.getpixel((9, 5)) == painted.getpixel((10, 5)) == (128, 128, 128)  # between patches 0 and 1


def test_detail_shows_lone_patches_as_they_are():
    image = torch.rand(3, 8, 8)
    painted = paint_groups(image, torch.tensor([0, 0, -1, 1]), (2, 2), cell=4, outline=1, detail=True)
    whole = torch.from_numpy(np.array(painted)).long()
    lone = image.mul(255).round().byte().permute(1, 2, 0)[4:, 4:]
    assert torch.equal(whole[4:, 4:], lone.long())
    assert not whole[4:, :4].any()  # pruned
    assert torch.equal(whole[1:3, 1:3], whole[1:3, 5:7])  # the pair has one colour within its outline


def test_wrong_source_is_an_error():
    with pytest.raises(ValueError, match=r"source must be \[4\], one entry per patch, got \[5\]"):
        paint_groups(torch.zeros(3, 4, 4), torch.zeros(5, dtype=torch.long), (2, 2))


def test_chosen_blocks_follow_the_token_counts():
    counts = (12, 9, 8, 6, 5, 4, 2)
    sources = [(torch.arange(12) % count).unsqueeze(0) for count in counts]
    assert choose_blocks(sources) == [1, 3, 5, 6]
    assert choose_blocks(sources[:1] * 3) == [2]


@pytest.mark.parametrize(
    "options",
    [TOME, ("--method", "evit", "--keep-rate", "0.6", "--keep-blocks", "1,3"), ("--method", "none")],
    ids=lambda options: options[1],
)
def test_one_picture(run, picture, tmp_path, options):
    target = tmp_path / "drawn.png"
    status, out, _ = run(*TINY, picture, *options, "--columns", "0,5", "--cell", "10", "-o", target)
    assert status == 0 and f"written: {target}" in out
    with Image.open(target) as drawn:
        assert drawn.size == (3 * 80 + 2 * 10, 80 + 26)


@pytest.mark.parametrize(
    ("options", "taken", "drawn_by"),
    [
        ((), "--method tome --r 5 was chosen: half of the patches", "ToMe(r=5"),
        (("--keep-rate", "0.5", "--keep-blocks", "1"), None, "EViT(keep_rate=0.5"),
    ],
)
def test_a_method_is_chosen_where_none_is_named(ran, picture, tmp_path, options, taken, drawn_by):
    out, _ = ran(*TINY, picture, *options, "-o", tmp_path / "drawn")
    assert drawn_by in out and (taken in out if taken else "was chosen" not in out)


def test_a_published_model_is_drawn_by_its_smallest_budget(capsys):
    parser = build_parser("visualize")
    args = parser.parse_args(["cat.jpg"])
    _choose_method(args, None)
    assert (args.method, args.gflops) == ("diffrate", 2.3)
    assert "--method diffrate --gflops 2.3 was chosen: the smallest budget published" in capsys.readouterr().out


def test_schedule_prunes_to_black(run, picture, tmp_path):
    from tokcomp import CompressionSchedule

    CompressionSchedule([65, 40, 40, 40, 40, 40], [65, 30, 30, 30, 30, 30]).save(tmp_path / "mine.json")
    schedule = ("--method", "diffrate", "--schedule", tmp_path / "mine.json")
    status, _, _ = run(*TINY, picture, *schedule, "--columns", "1", "--cell", "10", "-o", tmp_path / "d.png")
    assert status == 0
    with Image.open(tmp_path / "d.png") as drawn:
        column = drawn.convert("RGB").crop((90, 26, 170, 106))
        centres = [column.getpixel((10 * x + 5, 10 * y + 5)) for y in range(8) for x in range(8)]
    assert centres.count((0, 0, 0)) == 25  # 64 patches, 39 of them kept


def test_folder(run, image_folder, tmp_path):
    status, _, _ = run(
        *TINY, image_folder / "validation" / "dog", *TOME, "--num-samples", "2", "-o", tmp_path / "drawn"
    )
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.png", "1.png"]


def test_a_photograph_is_never_written_over(refused, image_folder):
    folder = image_folder / "validation" / "dog"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "--output must not overwrite what tokcomp did not draw, got" in refused(*TINY, folder, *TOME, "-o", folder)
    assert f"got '{folder / '0.png'}'" in refused(*TINY, folder / "1.png", *TOME, "-o", folder / "0.png")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_drawing_is_drawn_again(ran, picture, tmp_path):
    for r in ("8", "4"):
        ran(*TINY, picture, "--method", "tome", "--r", r, "-o", tmp_path / "drawn")


def test_names_of_drawings_differ():
    pictures = [Path(name) for name in ("A.jpg", "a.jpg", "a.png", "a.png.png", "a.png.jpg", "b.bmp")]
    names = drawing_names(pictures)
    assert len({name.casefold() for name in names}) == len(pictures)
    assert names[-1] == "b.png"
    assert drawing_names([Path("a.jpg"), Path("a.jpg"), Path("a.jpg.png")])[0] == "a.jpg.png"


def test_unreadable_picture_is_named_and_the_rest_drawn(run, image_folder, tmp_path):
    folder = image_folder / "validation" / "dog"
    (folder / "0.png").write_bytes(b"no picture")
    status, out, err = run(*TINY, folder, *TOME, "-o", tmp_path / "drawn")
    assert status == 0
    assert f"not a readable picture: '{folder / '0.png'}'" in err
    assert out.count("written:") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere.png", *TOME), "IMAGE must be a picture or a folder, got 'nowhere.png', which does not exist"),
        (("PICTURE", *TOME, "--columns", "0,6"), "--columns must be blocks of tokcomp_digits_vit, 0 to 5, got 6"),
        (("PICTURE", "--method", "diffrate"), "--method diffrate needs --gflops or --schedule, got none of them"),
        (("FOLDER", *TOME, "-o", "one.png"), "--output must be a folder for a folder of pictures, got 'one.png'"),
        (("EMPTY", *TOME), "IMAGE must hold pictures, got the folder"),
        (("TEXT", *TOME), "IMAGE must be a readable picture or a folder of them"),
        (("PICTURE", *TOME, "-o", "PICTURE/sub"), "--output must be a folder, got"),
    ],
)
def test_mistakes_are_named(refused, image_folder, picture, tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    names = {
        "PICTURE": picture,
        "FOLDER": picture.parent,
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.txt",
        "PICTURE/sub": picture / "sub",
    }
    err = refused(*TINY, *(names.get(option, option) for option in options))
    assert message in err and "Traceback" not in err


def test_interrupt_leaves_no_half_picture(run, picture, tmp_path, monkeypatch):
    monkeypatch.setattr("tokcomp.visualize.draw_blocks", Mock(side_effect=KeyboardInterrupt))
    status, _, err = run(*TINY, picture, *TOME, "-o", tmp_path / "drawn")
    assert status == 130 and "interrupted" in err
    assert not (tmp_path / "drawn").exists()


def choices_of(page: Path) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])["choices"]


def test_a_page_has_every_method_at_every_budget(run, ran, image_folder, tmp_path):
    page, folder = tmp_path / "page.html", image_folder / "validation" / "dog"
    status, out, err = run(*TINY, folder, "--num-samples", "2", "--html", page)
    assert status == 0 and f"written: {page}" in out and not (tmp_path / "tokcomp-pictures").exists(), err
    choices = choices_of(page)
    assert {one["method"] for one in choices} == {"ToMe", "EViT", "uniform"}  # nothing was published for six blocks
    assert len({(one["method"], one["strength"]) for one in choices}) == len(choices) == 6
    assert all(one["gflops"] == pytest.approx(float(one["strength"].split()[0]), rel=0.02) for one in choices)
    assert all(len(one["pictures"]) == 2 and len(one["pictures"][0]) == 6 for one in choices)
    # A method of the user's comes first, with the others at its cost; what tokcomp wrote may be written again.
    ran(*TINY, folder / "0.png", "--r", "6", "--html", page)
    first, *others = choices_of(page)
    assert first["method"] == "ToMe (yours)" and {one["strength"] for one in others} == {first["strength"]}


def test_a_page_is_refused_before_any_work(refused, picture, tmp_path):
    mine, page = tmp_path / "mine.html", tmp_path / "page.html"
    mine.write_text("<p>mine")
    wrong = [
        (("--html", mine), "--html must not overwrite what tokcomp did not write"),
        (("--columns", "1", "--html", page), "--columns is for pictures, got it with --html"),
        (("--budgets", "0.01"), "--budgets goes with --html FILE"),
        (("--budgets", "1", "--html", page), "--budgets must be below the uncompressed model's 0.02261, got 1"),
        (("--budgets", "0.0001", "--html", page), "--budgets must be GFLOPs that some method can reach"),
        (("--latency-table", tmp_path / "none.json", "--html", page), "--latency-table must be a file, got"),
    ]
    for options, rule in wrong:
        assert rule in refused(*TINY, picture, *options)
    assert mine.read_text() == "<p>mine" and not page.exists()
