"""The page in a real browser: pointing, clicking, sorting, keyboard, schemes, phone, print, axe.

``make test-browser`` installs what it needs. Elsewhere the tests are skipped with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.one_env, pytest.mark.slow]

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
AXE = os.environ.get("AXE", "")
"""Path to axe.min.js, of the npm package axe-core."""
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium on the path: make test-browser")
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, since tests in containers run as root; the page is our own.
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny):
    from gainlens.report.build import Plan, build_report

    given = os.environ.get("REPORT")  # a page that is there already
    if given:
        return Path(given).resolve().as_uri()
    folder = tmp_path_factory.mktemp("browser") / "report"
    plan = Plan("tiny", "sotu,stdlib", n_docs=4, length=48, seeds=(0,), damage_docs=2,
                damage_length=32, context=96, across_docs=2, task_prompts=2, task_length=200,
                evidence_docs=2)  # fmt: skip
    build_report(tiny, plan, folder)
    return (folder / "index.html").as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the page; afterwards nothing was asked of the network and nothing was complained of."""
    contexts, asked, said = [], [], []

    def opened(viewport=DESK, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []


def value_of(words: str) -> float:
    """The number that a reading gives."""
    return float(re.search(r": ([-+−]?[\d.,e−-]+)", words)[1].replace("−", "-").replace(",", ""))


def test_the_first_screen_has_the_claims_where_and_what_next(visit):
    page = visit()
    for found in [*page.locator(".claim").all()[:4], page.locator(".next")]:
        box = found.bounding_box()
        assert box["y"] + box["height"] <= DESK["height"]
    assert "positions 0–" in page.locator("main p").first.inner_text()
    assert page.locator(".next code").inner_text().startswith("gainlens ")


def test_pointing_at_a_cell_says_its_value(visit):
    page = visit()
    figure = page.locator("#figure-damage_by_head")
    ground = figure.locator(".ground")
    ground.scroll_into_view_if_needed()
    box = ground.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.9)
    tip = figure.locator(".tip")
    tip.wait_for(state="visible")
    words = tip.inner_text()
    assert words.startswith("layer 3, key head 1: ")
    rows = figure.evaluate("""f => decodeURIComponent(f.querySelector('a.data').href)
        .split('\\r\\n').map(line => line.split(','))""")
    assert value_of(words) == pytest.approx(float(rows[4][2]), rel=6e-3)
    assert figure.locator(".reading").inner_text() == words, "for a screen reader"
    page.mouse.move(0, 0)
    tip.wait_for(state="hidden")


def test_pointing_at_a_bar_says_its_value(visit):
    page = visit()
    figure = page.locator("#figure-damage_by_layer")
    mark = figure.locator(".mark.fill").nth(2)
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert figure.locator(".tip").inner_text().startswith("one layer cut, 2: ")


def test_the_keyboard_reads_values_and_opens_a_layer(visit):
    page = visit()
    figure = page.locator("#figure-key_gains")
    plot = figure.locator(".view")
    plot.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    words = figure.locator(".reading").inner_text()
    # The first arrow shows the first cell if focus alone has not.
    assert re.match(r"layer [12], key dimension 2 \(turns with 18\): ", words)
    layer = re.match(r"layer (\d)", words)[1]
    page.keyboard.press("Enter")
    part = figure.locator(".part")
    assert part.locator("select").input_value() == layer
    assert part.locator(".cells .ground").get_attribute("height") == "2", "two key heads"
    part.get_by_role("button", name="Close").press("Enter")
    assert not part.is_visible()


def test_a_click_on_a_layer_shows_its_heads(visit):
    page = visit()
    figure = page.locator("#figure-change_by_distance")
    box = figure.locator(".ground").bounding_box()
    figure.locator(".ground").scroll_into_view_if_needed()
    box = figure.locator(".ground").bounding_box()
    page.mouse.click(box["x"] + 5, box["y"] + box["height"] * 0.6)
    part = figure.locator(".part")
    assert part.locator("select").input_value() == "2"
    assert part.locator(".ground").get_attribute("height") == "4", "four query heads"
    part.locator("select").select_option("0")
    assert part.locator("svg").get_attribute("aria-label").endswith("of layer 0.")


def test_the_script_draws_what_the_page_came_with(visit):
    page = visit()
    plain = visit(java_script_enabled=False)
    for name in ("key_gains", "layer_correlation", "damage_by_head", "red_line"):
        cells = f"#figure-{name} .view .cells path"

        def drawn(where, cells=cells):
            found = where.locator(cells).all()
            return {(p.get_attribute("class"), p.get_attribute("d")) for p in found}

        assert drawn(page) == drawn(plain) != set()
        words = f"#figure-{name} .view text"
        assert page.locator(words).all_inner_texts() == plain.locator(words).all_inner_texts()


def choose(figure, name):
    return figure.locator("label", has_text=name).locator("select")


def test_choices_change_what_is_drawn(visit):
    page = visit()
    figure = page.locator("#figure-key_gains")
    before = figure.locator(".cells").inner_html()
    choose(figure, "score").select_option("std")
    choose(figure, "stage").select_option("projected")
    assert figure.locator(".cells").inner_html() != before
    lead = page.locator("#figure-rise_by_position")
    assert lead.locator(".view:visible").get_attribute("data-choice") == "all|all"
    choose(lead, "text").select_option("stdlib")
    assert lead.locator(".view:visible").get_attribute("data-choice") == "stdlib|all"
    positions = choose(lead, "positions")
    positions.select_option(index=1)
    chosen = lead.locator(".view:visible").get_attribute("data-choice")
    assert chosen == f"all|{positions.input_value()}", "one position shows all texts"
    assert choose(lead, "text").input_value() == "all"
    choose(page.locator("#figure-surgery_impact"), "text").select_option("sotu")
    assert page.locator("#figure-surgery_impact .view:visible").count() == 1


def test_tables_sort_by_number_and_copy(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    table = page.locator("table.sorts", has_text="Every cut")
    column = table.locator("td:nth-child(4)")

    def rises():
        return [value_of(f": {words}") for words in column.all_inner_texts()]

    before = rises()
    button = table.get_by_role("button", name="rise (nats)")
    button.click()
    assert rises() == sorted(before)
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert rises() == sorted(before, reverse=True)
    table.get_by_role("button", name="order").click()
    names = table.locator("tbody th").all_inner_texts()
    assert names == sorted(names, key=str.lower)
    table.get_by_role("button", name="Copy").click()
    page.wait_for_function("document.body.innerText.includes('Copied')")
    copied = page.evaluate("navigator.clipboard.readText()").split("\n")
    assert copied[0].split("\t") == ["order", "cut", "loss (nats)", "rise (nats)", "95% interval"]
    assert len(copied) == 1 + len(before)


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark_by_system_and_by_switch(visit):
    light, dark = visit(color_scheme="light"), visit(color_scheme="dark")
    white, black = ground(light), ground(dark)
    assert white == "rgb(255, 255, 255)" != black
    cell = "getComputedStyle(document.querySelector('#figure-key_gains .d12')).fill"
    assert light.evaluate(cell) != dark.evaluate(cell), "zero has the colour of the ground"
    switch = light.get_by_role("button", name="Colours")
    switch.click()
    assert ground(light) == white and "light" in switch.inner_text()
    switch.click()
    assert ground(light) == black
    dark.get_by_role("button", name="Colours").click()
    assert ground(dark) == white
    dark.emulate_media(media="print")
    assert ground(dark) == white


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(visit, scheme):
    page = visit(PHONE, color_scheme=scheme, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    figure = page.locator("#figure-key_gains")
    figure.locator(".ground").tap(force=True)
    assert figure.locator(".reading").inner_text().startswith("layer ")
    assert figure.locator(".part").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_without_a_script_it_can_be_read(visit):
    page = visit(java_script_enabled=False)
    assert page.locator(".claim").count() == 5
    assert page.locator("button:visible, select:visible").count() == 0
    for figure in page.locator("figure").all():
        assert figure.locator(".view:visible svg").first.bounding_box()["width"] > 200


def test_print_has_all_tables_and_no_controls(visit):
    page = visit()
    page.emulate_media(media="print")
    assert page.locator("button:visible, select:visible, nav:visible").count() == 0
    assert page.locator("table:visible").count() == page.locator("table").count()
    assert page.pdf()[:4] == b"%PDF"


@pytest.mark.skipif(not Path(AXE).is_file(), reason="no axe-core: make test-browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(visit, scheme, viewport):
    page = visit(viewport, color_scheme=scheme)
    page.locator("#figure-key_gains .view").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    for summary in page.locator("summary").all():
        summary.click()
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found = page.evaluate("""axe.run({ runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa",
        "wcag22aa", "best-practice"] })""")
    assert len(found["passes"]) > 20
    assert [(v["id"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found["violations"]] == []


@pytest.fixture
def notebook(browser, tiny_gains):
    """A page that a notebook made of outputs, with the theme that it says it has."""
    import gainlens as gl

    shown = [tiny_gains, gl.coordinate_map(tiny_gains, n_permutations=99)]
    contexts = []

    def opened(theme):
        # No script runs: a notebook that is not trusted runs none either.
        contexts.append(browser.new_context(viewport=DESK, java_script_enabled=False))
        page = contexts[-1].new_page()
        outputs = "".join(f"<div class='output'>{one._repr_html_()}</div>" for one in shown)
        head = "<!doctype html><html lang='en'><title>notebook</title>"
        page.set_content(f"{head}<body data-jp-theme-light='{theme}'><main>{outputs}</main>")
        return page

    yield opened
    for context in contexts:
        context.close()


def test_a_figure_in_a_notebook_says_its_values_without_a_script(notebook, tiny_gains):
    page = notebook("true")
    figure = page.locator("figure").first
    box = figure.locator(".values").first.bounding_box()
    layers, _, dims = tiny_gains.shape
    cell = figure.locator(".values g").nth(2).locator("rect").nth(5)
    found = cell.bounding_box()
    assert found["width"] == pytest.approx(box["width"] / dims, rel=0.05)
    assert found["height"] == pytest.approx(box["height"] / layers, rel=0.05)
    cell.hover()  # fails if anything lies above it
    assert cell.locator("title").text_content().startswith("layer 2, key dimension 5: ")
    for svg in page.locator("figure svg[role=img]").all():
        assert svg.bounding_box()["width"] > 200


def test_a_figure_in_a_notebook_is_dark_where_the_notebook_is(notebook):
    def colours(theme):
        page, seen = notebook(theme), []
        for what in ("figure", "figure .d12"):
            element = page.locator(what).first
            seen.append(
                element.evaluate(
                    "e => getComputedStyle(e).backgroundColor + getComputedStyle(e).fill"
                )
            )
        return seen

    light, dark = colours("true"), colours("false")
    assert "rgb(255, 255, 255)" in light[0] and light[0] != dark[0]
    assert light[1] != dark[1], "zero has the colour of the ground"
