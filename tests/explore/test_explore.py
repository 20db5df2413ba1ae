"""The explorer: what it records, and the page in a real browser."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
import timm
import tokcomp
import tokcomp.assets  # registers the digits model
import torch
from tokcomp.explore import Choice, Figure, render, watch
from tokcomp.explore.record import Block

from tests.explore.chrome import Page, find_chromium

GRID = (8, 8)
METHODS = {
    ("EViT", "3/4"): tokcomp.EViT(keep_rate=0.7, blocks=(1, 3), fuse=False),
    ("EViT", "1/2"): tokcomp.EViT(keep_rate=0.5, blocks=(1, 3), fuse=False),
    ("ToMe", "1/2"): tokcomp.ToMe(8),
}


@pytest.fixture(scope="module")
def model():
    return timm.create_model("tokcomp_digits_vit", pretrained=True).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def page(model, images, tmp_path_factory):
    choices = [
        Choice(*name, 0.01 * number, 100.0 * number, repr(method), watch(model, images, method))
        for number, (name, method) in enumerate(METHODS.items(), 1)
    ]
    figures = [Figure("</script><b>first", images[0]), Figure("second", images[1])]
    path = tmp_path_factory.mktemp("page") / "explore.html"
    facts = dict(grid=GRID, num_prefix_tokens=1, gflops=0.02, images_per_second=50.0)
    path.write_text(render("A <title>", "A lead.", figures, choices, **facts))
    return path


def test_a_record_is_what_the_trace_says(model, images):
    method = tokcomp.ToMe(8)
    found = watch(model, images, method)
    assert tokcomp.flops(model) == tokcomp.flops(timm.create_model("tokcomp_digits_vit"))  # left plain
    expected = tokcomp.trace(tokcomp.compress(model, method), images)
    tokcomp.restore(model)
    for image, blocks in enumerate(found):
        assert [block.source for block in blocks] == [after[image, 1:].tolist() for after in expected]
        assert all(block.importance is not None for block in blocks)  # ToMe itself does not go by attention


def test_importance_is_what_evit_goes_by(model, images):
    """What is dropped had less attention than anything that stays; blocks that drop nothing rank nothing."""
    method = METHODS["EViT", "3/4"]
    for blocks in watch(model, images, method):
        assert [number for number, block in enumerate(blocks) if block.importance is not None] == [1, 3]
        before = [0] * 64
        for number in (1, 3):
            importance, source = blocks[number].importance, blocks[number].source
            entering = [own for own, there in zip(importance, before, strict=True) if there >= 0]
            assert sum(entering) / len(entering) == pytest.approx(1, abs=0.005)  # rounded to 0.01
            dropped = [own for own, now, there in zip(importance, source, before, strict=True) if now < 0 <= there]
            kept = [own for own, now in zip(importance, source, strict=True) if now >= 0]
            assert dropped and max(dropped) <= min(kept)
            before = source


def test_images_that_keep_different_numbers_of_tokens(model, images):
    """The mean is that of the tokens that an image has, not of those that fill the batch."""
    images = torch.cat([images, torch.zeros(1, 3, 32, 32)])  # of one colour: everything merges
    found = watch(model, images, tokcomp.DToMe(0.95))
    assert len({len(set(blocks[-1].source)) for blocks in found}) > 1
    for blocks in found:
        for entering, block in pairwise(blocks):
            of_tokens = dict(zip(entering.source, block.importance, strict=True))
            assert sum(of_tokens.values()) / len(of_tokens) == pytest.approx(1, abs=0.01)


def test_a_model_without_class_token_has_the_attention_received(images):
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **sizes).eval()
    (first, *_), _ = watch(model, images, tokcomp.ToMe(4))
    assert len(first.importance) == 16 and sum(first.importance) == pytest.approx(16, abs=0.1)


def test_a_page_must_be_complete(images):
    facts = dict(grid=GRID, num_prefix_tokens=1, gflops=None)
    choice = Choice("ToMe", "r = 8", None, None, "", [[Block([0] * 64, None)]])
    with pytest.raises(ValueError, match="figures and choices must not be empty, got 0 and 1"):
        render("", "", [], [choice], **facts)
    with pytest.raises(ValueError, match="choices must have all 2 pictures, got 1 for ToMe"):
        render("", "", [Figure("a", images[0]), Figure("b", images[1])], [choice], **facts)


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_page_in_a_browser(page, tmp_path):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])
    with Page(page, tmp_path) as browser:
        assert browser.text("h1") == "A <title>" and browser.text("#where") == "after block 3"
        assert browser.evaluate("document.querySelector('#images label').innerText") == "</script><b>first"

        def tokens():
            return int(browser.text("#numbers dd").split()[0])

        def expected(choice, image, block):
            return 1 + len(set(data["choices"][choice]["pictures"][image][block]["source"]) - {-1})

        assert tokens() == expected(0, 0, 3)
        browser.click("#back")
        browser.click("#back")
        assert browser.text("#where") == "after block 1" and tokens() == expected(0, 0, 1)
        browser.click("#strengths label:nth-of-type(2)")
        assert tokens() == expected(1, 0, 1) and "0.0200" in browser.text("#numbers")
        browser.click("#methods label:nth-of-type(2)")  # ToMe has one budget: the switch for it goes
        assert tokens() == expected(2, 0, 1) and browser.evaluate("document.getElementById('strengths').hidden")
        assert "300" in browser.text("#numbers") and "6.00 x uncompressed" in browser.text("#numbers")
        browser.click("#images label:nth-of-type(2)")
        browser.click("#bars", across=6.5 / 7)  # the last bar
        assert browser.text("#where") == "after block 5" and tokens() == expected(2, 1, 5)

        # Pointing at a patch says what became of it.
        source = data["choices"][2]["pictures"][1][5]["source"]
        browser.click("#picture", across=2.5 / 8, down=4.5 / 8)
        size = source.count(source[4 * 8 + 2])
        said = browser.text("#patch")
        assert said.startswith("Row 5, column 3: ")
        assert ("a token of its own" if size == 1 else f"one of {size} patches") in said

        # Everything by keys.
        browser.evaluate("document.getElementById('picture').focus()")
        browser.press("ArrowDown")
        browser.press("ArrowRight")
        assert browser.text("#patch").startswith("Row 6, column 4: ")
        for key, where in (("p", "after block 4"), ("n", "after block 5"), ("n", "after block 5")):
            browser.press(key)
            assert browser.text("#where") == where
        browser.press("m")  # at the same budget
        assert tokens() == expected(1, 1, 5)
        browser.press("b")
        assert tokens() == expected(0, 1, 5)
        browser.press("p")
        browser.press("p")  # to a block that drops tokens
        pixels = "document.getElementById('picture').toDataURL()"
        seen = [browser.evaluate(pixels)]
        for view in ("size", "importance"):
            browser.press("v")
            assert browser.evaluate("document.querySelector('#views input:checked').value") == view
            seen.append(browser.evaluate(pixels))
        assert len(set(seen)) == 3
        # The address leads back to what is shown, and one that asks for what is not there still opens the page.
        where = browser.evaluate("location.hash")
        browser.evaluate("show({image: 0, choice: 2, block: 0, view: 'size'})")
        for address, shown in ((where, "after block 3"), ("#method=x&block=y&picture=9", "after block 3")):
            browser.open(page.as_uri() + address)
            assert browser.text("#where") == shown
            assert browser.evaluate("state.view") == ("importance" if address == where else "groups")
            assert browser.evaluate("state.choice") == 0 and browser.evaluate("state.image") == (address == where)
        assert browser.errors == []
        assert (
            all(address.startswith(("file:", "data:", "about:")) for address in browser.requests) and browser.requests
        )


@pytest.mark.skipif(find_chromium() is None, reason="needs Chromium")
def test_the_page_fits_a_phone(page, tmp_path):
    with Page(page, tmp_path, width=360, height=740) as browser:
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        sides = "[...document.querySelectorAll('button, label')].map((one) => one.getBoundingClientRect().height)"
        assert min(browser.evaluate(sides)) >= 24  # pixels, WCAG 2.2's least target
