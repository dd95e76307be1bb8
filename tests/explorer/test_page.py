"""The page, as a browser shows it: Debian's chromium, driven by playwright."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import make_bank

import pyels
from pyels.explorer import write_page
from pyels.provenance import attribute, trace

STEPS, SIZES, SEEN = 3, (3, 5, 3), 4
in_browser = pytest.mark.needs(package="playwright")

NUMBERS = """([step, row, column]) => {
  show({step, row, column});
  const text = (id) => document.getElementById(id).textContent;
  const cards = [...document.querySelectorAll("#sources li")].map((card) =>
    [card.querySelector("strong").textContent, card.querySelector("span").textContent]);
  const values = [...document.querySelectorAll("#values tr")].map((line) =>
    [...line.querySelectorAll("td")].map((cell) => cell.textContent));
  return [text("entropy"), text("effective"), text("shown"), text("evidence"), cards, values];
}"""


def share(text):
    return float(text.removesuffix(" %")) / 100


def rounded(value, digits=3):
    return float(f"{100 * value:.{digits}g}") / 100


def traced(machine, network=None, batch=1, seed=0, sizes=SIZES):
    noise = torch.randn((batch, *machine.bank.shape), generator=torch.Generator().manual_seed(seed))
    return trace(machine, noise, STEPS, patch_sizes=sizes, network=network, top=SEEN)


@pytest.fixture(scope="module")
def colour():
    """A machine whose windows wrap around, the trace of three samples that another denoiser leads."""
    bank = make_bank(12, (3, 7, 8), labels=[0, 1, 2] * 4)
    machine = pyels.ELS(bank, boundary="circular")
    return machine, traced(machine, pyels.LS(bank, 5), batch=3)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """A function that writes a page and opens it; in the end nothing has gone wrong, and nothing was fetched."""
    met, pages = [], []

    def at(machine, of, fragment="", viewport=(1366, 768), touch=False, **options):
        path = tmp_path / "explorer.html"
        write_page(path, of, machine, **options)
        context = chromium.new_context(viewport=dict(zip(("width", "height"), viewport, strict=True)), has_touch=touch)
        page = context.new_page()
        page.on("console", lambda message: met.append(message.text))
        page.on("pageerror", lambda error: met.append(str(error)))
        page.on("request", lambda request: pages.append(request.url))
        page.goto(f"{path.as_uri()}{fragment}")
        page.wait_for_selector("#sources li")
        return page

    yield at
    assert met == []
    assert all(url.startswith("file:") and url.endswith("explorer.html") for url in pages)
    for context in chromium.contexts:
        context.close()


def place(page, row, column, canvas="#x0"):
    """Where on a picture a pixel is."""
    box = page.locator(canvas).bounding_box()
    return {"x": (column + 0.5) / 8 * box["width"], "y": (row + 0.5) / 7 * box["height"]}


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("sample", range(3))
def test_numbers_are_those_of_the_machine(opened, colour, sample):
    """At every pixel and step: what `sources` and `posterior` compute anew the page says, in the trace's rounding."""
    machine, of = colour
    page = opened(machine, of, sample=sample)
    for step, level in enumerate(of.levels):
        sources = machine.sources(of.x[step], level.alpha, level.sigma, top=SEEN, **level.told)
        posterior = machine.posterior(of.x[step], level.alpha, level.sigma, **level.told)
        torch.testing.assert_close(of.weight[step], sources.weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(of.entropy[step], posterior.entropy, rtol=1e-5, atol=1e-5)
        images = of.x[step, sample], of.network_x0[step, sample], of.x0[step, sample]
        for row in range(7):
            for column in range(8):
                entropy, effective, shown, evidence, cards, values = page.evaluate(NUMBERS, [step, row, column])
                here = float(of.entropy[step, sample, row, column])
                assert entropy == f"{here:.3f} nats"
                assert float(effective) == float(f"{math.exp(here):.3g}")
                assert evidence == f"{of.log_evidence[step, sample, row, column]:.3f} nats"
                weights = of.weight[step, sample, row, column].tolist()
                assert share(shown) == pytest.approx(sum(weights), rel=5e-3)
                for i, (weight, words) in enumerate(cards):
                    image, *at = (getattr(sources, name)[sample, row, column, i] for name in ("image", "row", "column"))
                    assert share(weight) == rounded(weights[i])
                    assert words == "#{} class {}\nrow {}, col {}".format(image, machine.bank.labels[image], *at)
                assert values == [[f"{v:.3f}" for v in one[:, row, column].tolist()] for one in images]


@in_browser
def test_mouse_and_touch(opened, colour):
    """A pixel is pointed at; a click holds it, another lets it go; a finger taps."""
    page = opened(*colour)
    summary = page.locator("#summary")
    for canvas, row, column in ("#x0", 2, 3), ("#drawn", 0, 0), ("#network_x0", 6, 7):
        page.hover(canvas, position=place(page, row, column, canvas))
        assert summary.text_content().startswith(f"Row {row}, column {column}: the network says ")
    page.click("#x0", position=place(page, 1, 1))
    page.hover("#x0", position=place(page, 5, 5))
    assert summary.text_content().startswith("Row 1, column 1 (held)")
    page.click("#x0", position=place(page, 1, 1))
    page.hover("#x0", position=place(page, 5, 5))
    assert summary.text_content().startswith("Row 5, column 5:")
    phone = opened(*colour, viewport=(390, 844), touch=True)
    phone.tap("#x", position=place(phone, 3, 6, "#x"))
    assert phone.locator("#summary").text_content().startswith("Row 3, column 6")


@in_browser
def test_keys(opened, colour):
    page = opened(*colour, fragment="#step=2&pixel=3,3")
    page.locator("#pictures").focus()
    for key, step, pixel in (
        ("ArrowUp", 2, "2,3"),
        ("ArrowRight", 2, "2,4"),
        ("ArrowLeft", 2, "2,3"),
        ("ArrowDown", 2, "3,3"),
        ("[", 1, "3,3"),
        ("[", 1, "3,3"),  # the first
        ("]", 2, "3,3"),
        ("PageDown", 3, "3,3"),
        ("PageUp", 2, "3,3"),
    ):
        page.keyboard.press(key)
        page.wait_for_url(f"**#step={step}&pixel={pixel}&*")
    page.locator("#step").focus()
    page.keyboard.press("ArrowRight")  # of the slider
    assert page.evaluate("[state.step, state.row, state.column]") == [2, 3, 3]
    assert page.locator("#step").get_attribute("aria-valuetext").startswith("Step 3 of 3")


@in_browser
def test_the_address_holds_the_state(opened, colour):
    machine, of = colour
    page = opened(machine, of)
    page.click("#images li:nth-child(2) button")
    page.select_option("#map", "made")
    page.click("#x0", position=place(page, 4, 2))
    page.click("#after")
    image = int(attribute(of).image[0, 1])
    page.wait_for_url(f"**#step=3&pixel=4,2&map=made&image={image}")
    texts = ("#level", "#summary", "#sources", "#values", "#key", "#most")
    before = [page.locator(text).text_content() for text in texts]
    again = opened(machine, of, fragment=page.evaluate("location.hash"))
    assert [again.locator(text).text_content() for text in texts] == before
    assert again.locator("#images li:nth-child(2) button").get_attribute("aria-pressed") == "true"
    again.wait_for_timeout(300)  # the page's own change of its address, which comes late, is not to come between
    again.evaluate("location.hash = '#step=99&pixel=-1,nonsense&map=none&image=1'")
    again.wait_for_url(f"**#step={STEPS}&pixel=0,0&map=source&image=1")


@in_browser
def test_maps(opened, colour):
    """Of an image, the pixels that it made; network against machine; and what there is without a network."""
    machine, of = colour
    page = opened(machine, of, fragment="#step=2&pixel=0,0")
    owed = attribute(of)
    page.click("#images li:first-child button")
    theirs = (of.weight[:, 0] * (of.image[:, 0] == owed.image[0, 0])).sum(-1)
    made = (owed.steps[:, 0, None, None] * theirs).sum(0)
    assert page.evaluate("state.map") == "made_all"
    assert page.evaluate("MAPS.made_all.numbers()") == pytest.approx(made.flatten().tolist(), abs=1e-6)
    assert page.evaluate("MAPS.made.numbers()") == pytest.approx(theirs[1].flatten().tolist(), abs=1e-6)
    assert page.evaluate("[...MAPS.owner.images()[0]]") == owed.pixel_image[0].flatten().tolist()
    apart = (of.x0 - of.network_x0)[1, 0].square().mean(0).sqrt()
    assert page.evaluate("MAPS.disagreement.numbers()") == pytest.approx(apart.flatten().tolist(), abs=1e-6)
    alone = opened(machine, traced(machine))
    assert alone.locator("#network_x0").is_hidden()
    names = alone.locator("#map option:enabled").evaluate_all("(all) => all.map((one) => one.value)")
    assert names == ["source", "owner", "entropy", "evidence"]


@in_browser
def test_windows(opened, colour):
    """Clipped at the border, in two parts around it, all of the image, or none that could be drawn."""
    page = opened(*colour)
    for arguments, parts in (
        ("0, 5, 8, false", [[0, 3]]),
        ("0, 5, 8, true", [[0, 3], [6, 8]]),
        ("7, 5, 8, true", [[5, 8], [0, 2]]),
        ("3, 5, 8, true", [[1, 6]]),
    ):
        assert page.evaluate(f"spans({arguments})") == parts
    bank = make_bank(6, (1, 7, 8))
    weights = torch.ones(56, 7, 8)
    for machine, words, side in (
        (pyels.IS(bank), "the whole image, 7 x 8", 16),
        (pyels.Machine(bank, pyels.Definition(pyels.Gaussian(1.0), "circular")), "a Gaussian of width 1", 7),
        (pyels.Machine(bank, pyels.Definition(pyels.Masks(weights), "same_position")), "a mask of its own", None),
    ):
        page = opened(machine, traced(machine, sizes=None))
        assert words in page.locator("#level").text_content()
        assert page.evaluate("said.sides[0]") == side


@in_browser
def test_small_screens_and_colours(opened, colour):
    for width in 320, 390, 820, 1366:
        page = opened(*colour, viewport=(width, 800), title="A title of several words that has to be broken somewhere")
        assert page.evaluate("document.documentElement.scrollWidth") == width
    colours = set()
    for _ in range(2):
        page.click("#theme")
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2


@in_browser
def test_in_a_notebook(chromium, colour, tmp_path):
    """In a frame of another page, whose address is not its own."""
    _, of = colour
    page, met = chromium.new_page(), []
    page.on("console", lambda message: met.append(message.text))
    page.on("pageerror", lambda error: met.append(str(error)))
    (tmp_path / "notebook.html").write_text(f"<!DOCTYPE html><p>A cell</p>{of.show()._repr_html_()}")
    page.goto((tmp_path / "notebook.html").as_uri() + "#cell")
    frame = page.frame_locator("iframe")
    frame.locator("#before").click()
    frame.locator("#x0").click(position={"x": 1, "y": 1})
    page.wait_for_timeout(300)  # by then a page by itself has changed its address
    assert frame.locator("#summary").text_content().startswith("Row 0, column 0")
    assert frame.locator("#level").text_content().startswith("Step 1 of")
    assert page.url.endswith("#cell")
    assert met == []
    page.close()


def test_size(tmp_path):
    """A colour sample of 20 steps, of 60,000 images that all count: as many pictures as there is room for."""
    few = make_bank(60, (3, 32, 32))
    of, bank = traced(pyels.LS(few)), pyels.PatchBank(few.images.repeat(1000, 1, 1, 1))
    generator, shape, count = torch.Generator().manual_seed(0), (20, 1, 32, 32, 8), len(bank)
    of = replace(
        of,
        **{name: getattr(of, name)[[0] * 20] for name in ("t", "alpha", "sigma")},
        **{name: torch.randn(20, 1, 3, 32, 32, generator=generator) for name in ("x", "x0", "network_x0")},
        **{name: torch.rand(shape[:-1], generator=generator) for name in ("entropy", "log_evidence")},
        image=torch.randint(count, shape, generator=generator),
        **{name: torch.randint(32, shape, generator=generator) for name in ("row", "column")},
        weight=torch.rand(shape, generator=generator) / 8,
        influence=torch.rand(20, 1, count, generator=generator),
        candidates=torch.ones(1, count, dtype=torch.bool),
        per_step={"patch_size": [3] * 20},
        bank=bank.fingerprint(),
    )
    path = tmp_path / "explorer.html"
    write_page(path, of, pyels.LS(bank))
    assert 4_800_000 < path.stat().st_size < 5_000_000


def test_texts_are_texts(tmp_path, small):
    """Whatever they are, in the page's heading and in what its script reads."""
    small.class_names = ["</script><script>", "$said", "a & b"]
    machine = pyels.ELS(small)
    write_page(tmp_path / "explorer.html", traced(machine), machine, title="</title><b>&amp; $tensors")
    text = (tmp_path / "explorer.html").read_text()
    assert text.count("</script>") == 3
    assert "<title>&lt;/title&gt;&lt;b&gt;&amp;amp; $tensors</title>" in text


def test_refusals(tmp_path, small, colour):
    machine = pyels.ELS(small)
    of = traced(machine)
    for options, words in ({"sample": 1}, "sample must be one of"), ({"limit": 40_000}, "bytes and more before"):
        with pytest.raises(ValueError, match=words):
            write_page(tmp_path / "explorer.html", of, machine, **options)
    with pytest.raises(ValueError, match="the trace was made with a bank"):
        write_page(tmp_path / "explorer.html", of, colour[0])
    assert list(tmp_path.iterdir()) == []
