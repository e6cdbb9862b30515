"""The report and the view of the plane in a headless browser: what a reader meets on any screen and on paper."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from planes import plane
from test_report import MAIN, made_up, spread

from gravlens.plot.lines import plot_arms
from gravlens.plot.plane import explore_residual_plane
from gravlens.plot.style import save_figure
from gravlens.reporting.page import PRINTED_ROWS, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PROGRAM = next(filter(None, map(shutil.which, BROWSERS)), None)
if PROGRAM is None:
    pytest.skip(f"no browser on PATH ({', '.join(BROWSERS)}): apt-get install chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `dev`")
Page = Any

PATIENCE = 120_000  # milliseconds: other tests may keep the machine busy
PHONE, DESKTOP, PAPER = (375, 812), (1280, 900), (688, 1000)  # paper: A4 less its margins, in CSS pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of content: long names, wide, long and empty tables, SVG and PNG figures."""
    folder = tmp_path_factory.mktemp("results")
    results = made_up()
    results["nulls"]["a_null_of_a_rather_long_name_that_has_to_break_somewhere"] = {
        "p99": None,
        "n_pairs": 4,
        "n_above": 1,
    }
    results["claims"][0]["sentence"] = (
        "A sentence of very many words, " * 20 + "and_one_word_that_is_too_long_for_a_phone" * 3
    )
    results["arms"]["unblocked"]["task_loss"] = spread(12345.678, 0.25)
    (folder / "results.json").write_text(json.dumps(results))
    rows = pd.DataFrame({"run": ["unblocked-0", "penalty-1"] * 600, "step": range(1200), "layer": None, "x": -1.5e-7})
    rows.assign(**{f"a_wide_column_{i}": i / 3 for i in range(12)}).to_csv(folder / "trajectory.csv", index=False)
    arms = pd.DataFrame({"arm": ["unblocked", "penalty"], "run": [0, 0], "compliance_rate": [0.5, 0.25]})
    arms.assign(**{f"one_more_measure_{i}": 1 / 3 for i in range(7)}).to_csv(folder / "arms.csv", index=False)
    save_figure(plot_arms(arms), folder / "figures" / "compliance_rate", formats=("svg",))
    save_figure(plot_arms(arms), folder / "figures" / "other", formats=("png",))
    return write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


Opened = Callable[..., Page]


def watching(browser: Any) -> Iterator[Opened]:
    """Opens a file; at the end it must have said nothing on the console, and asked for nothing beyond itself."""
    contexts, said, asked = [], [], []

    def open_page(path: Path, size: tuple[int, int] = DESKTOP, *, scheme: str = "light", script: bool = True) -> Page:
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, java_script_enabled=script)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:", "file:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@pytest.fixture
def opened(browser: Any) -> Iterator[Opened]:
    yield from watching(browser)


def test_a_fetch_and_an_error_would_be_seen(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<img src='http://127.0.0.1:9/x.png'><script>missing()</script>")
    watched = watching(browser)
    next(watched)(tmp_path / "bad.html").wait_for_timeout(300)
    with pytest.raises(AssertionError):
        next(watched)


# -- any screen --------------------------------------------------------------------------------------------------------


def open_all(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")


@pytest.mark.parametrize("size", [PHONE, (320, 640), DESKTOP])
def test_nothing_scrolls_sideways(opened: Opened, report: Path, size: tuple[int, int]) -> None:
    page = opened(report, size)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    beyond = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.box')
        && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond) == []


def test_figures_are_there_at_a_readable_size(opened: Opened, report: Path) -> None:
    sizes = opened(report, PHONE).evaluate(
        "[...document.images].map(one => [one.complete, one.naturalWidth, one.clientWidth])"
    )
    assert len(sizes) == 2
    assert all(complete and natural > 0 and shown > 300 for complete, natural, shown in sizes)


def test_without_scripts_the_page_reads_the_same(opened: Opened, report: Path) -> None:
    page = opened(report, script=False)
    assert page.locator("h2").all_inner_texts()[:2] == [MAIN, "Figures"]
    assert page.locator("#main tbody tr").count() > 10


CONTRASTS = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => [r, g, b].map(c => linear(c / 255))
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const ground = one => {
    for (; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")].filter(one => one.tagName !== "SCRIPT" && one.checkVisibility()
      && !(one.closest("tr")?.rowIndex > 50)
      && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(one => {
    const [a, b] = [luminance(channels(getComputedStyle(one).color)), luminance(ground(one))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), b, one.tagName];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(opened: Opened, report: Path, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1."""
    page = opened(report, scheme=scheme)
    open_all(page)
    found = page.evaluate(CONTRASTS)
    assert {tag for _, _, tag in found} >= {"H1", "H2", "TD", "BUTTON", "A", "P", "B", "SUMMARY", "FIGCAPTION", "DD"}
    assert min(found)[0] >= 4.5, min(found)
    grounds = [ground for _, ground, _ in found]
    assert max(grounds) < 0.1 if scheme == "dark" else min(grounds) > 0.8


def test_a_figure_lies_on_a_light_card_in_the_dark(opened: Opened, report: Path) -> None:
    page = opened(report, scheme="dark")
    grounds = page.evaluate("[...document.images].map(one => getComputedStyle(one).backgroundColor)")
    assert set(grounds) == {"rgb(255, 255, 255)"}


# -- sorting -----------------------------------------------------------------------------------------------------------


def column(page: Page, table: str, index: int) -> list[str]:
    return [text.strip() for text in page.locator(f"{table} tbody td:nth-child({index + 1})").all_inner_texts()]


def numbers(texts: list[str]) -> list[float]:
    return [float(match[0].replace("−", "-")) for text in texts if (match := re.match(r"−?[\d.]+", text))]


def table_of(page: Page, title: str) -> str:
    return "#" + page.locator(f"section:has(> h2:text-is('{title}'))").get_attribute("id")


@pytest.mark.parametrize("press", ["click", "Enter", "Space"])
def test_a_heading_sorts_by_click_and_by_keyboard(opened: Opened, report: Path, press: str) -> None:
    page = opened(report)
    table = table_of(page, "Arms at the last step")
    before, heading = column(page, table, 0), page.locator(f"{table} th button").nth(1)

    def sort() -> None:
        if press == "click":
            heading.click()
        else:
            page.locator(f"{table} th button").nth(0).focus()
            page.keyboard.press("Tab")
            page.keyboard.press(press)

    sort()
    assert page.locator(f"{table} th").nth(1).get_attribute("aria-sort") == "ascending"
    up = column(page, table, 1)
    assert numbers(up) == sorted(numbers(up)) == [-0.5, -0.25, 0.5, 0.5]
    assert up[-1] == "not run"
    sort()
    assert page.locator(f"{table} th").nth(1).get_attribute("aria-sort") == "descending"
    down = column(page, table, 1)
    assert numbers(down) == [0.5, 0.5, -0.25, -0.5] and down[-1] == "not run"
    assert sorted(column(page, table, 0)) == sorted(before)


def test_one_column_sorts_at_a_time_and_text_by_its_letters(opened: Opened, report: Path) -> None:
    page = opened(report)
    table = table_of(page, "Arms at the last step")
    page.locator(f"{table} th button").nth(2).click()
    page.locator(f"{table} th button").nth(0).click()
    sorts = [one.get_attribute("aria-sort") for one in page.locator(f"{table} th").all()]
    assert sorts[0] == "ascending" and set(sorts[1:]) == {"none"}
    names = column(page, table, 0)
    assert names == sorted(names, key=str.lower)


def test_a_long_table_of_ten_and_two_sorts_by_number(opened: Opened, report: Path) -> None:
    page = opened(report)
    open_all(page)
    long = "details:has(summary:text('Trajectory'))"
    heading = page.locator(f"{long} th button").nth(1)
    heading.click()
    heading.click()
    assert [int(step) for step in column(page, long, 1)] == list(range(999, -1, -1))


# -- paper -------------------------------------------------------------------------------------------------------------


def test_paper_has_no_controls_and_no_clipped_table(opened: Opened, report: Path) -> None:
    page = opened(report, PAPER, scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("nav").is_visible()
    marks = "[...document.querySelectorAll('th button')].map(one => getComputedStyle(one, '::after').content)"
    assert set(page.evaluate(marks)) == {"none"}
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER[0]
    assert (
        page.evaluate(
            "[...document.querySelectorAll('.box')].filter(one => one.scrollWidth > one.clientWidth + 1).length"
        )
        == 0
    )
    assert min(page.evaluate(CONTRASTS))[0] >= 4.5
    assert {ground for _, ground, _ in page.evaluate(CONTRASTS)} > {1.0}


def test_paper_shows_short_folded_tables_and_names_the_long_ones(opened: Opened, report: Path) -> None:
    page = opened(report, PAPER)
    page.emulate_media(media="print")
    short, long = (page.locator(f"details:has(summary:text('{name}'))") for name in ("Arms: every run", "Trajectory"))
    assert long.locator("tbody tr").count() > PRINTED_ROWS >= short.locator("tbody tr").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert short.locator("td").first.is_visible() and not long.is_visible()
    assert page.locator("text=Long and wide ones are not printed").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_it_prints_on_few_pages(opened: Opened, report: Path) -> None:
    pdf = opened(report).pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12


# -- the residual-space view -------------------------------------------------------------------------------------------


def test_the_view_of_the_plane_opens_without_a_network(opened: Opened, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is in the extra `plots`")
    explore_residual_plane(plane()).write_html(tmp_path / "plane.html")
    page = opened(tmp_path / "plane.html")
    page.wait_for_selector(".scatterlayer .trace")
    legend = page.locator(".legendtext").all_text_contents()
    assert legend == ["witness", "anchor", "other", "a", "b"]
    run = page.locator(".scatterlayer .trace").nth(3).locator(".point")
    assert run.count() == 3
    box = run.last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hoverlayer .hovertext")
    said = page.locator(".hoverlayer .hovertext").first.text_content()
    assert "a, step 10" in said and "0.250" in said
