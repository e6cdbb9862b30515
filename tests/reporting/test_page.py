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
from test_report import MAIN, made_up, spread, trajectory_rows, write_explored

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


HOSTILE = """'"></script><script>document.title = "run"</script><img src=x onerror="document.title = 'run'">"""


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with heat maps of many steps and a plane, and an arm of a hostile name."""
    folder = tmp_path_factory.mktemp("explored")
    (folder / "results.json").write_text(json.dumps(made_up()))
    write_explored(folder, HOSTILE)
    rows = [trajectory_rows().assign(step=lambda table, by=by: table.step + by) for by in range(0, 800, 40)]
    pd.concat([trajectory_rows(HOSTILE), *rows]).to_csv(folder / "trajectory.csv", index=False)
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


@pytest.mark.parametrize("size", [PHONE, (390, 844), (320, 640), DESKTOP, (1400, 1000)])
@pytest.mark.parametrize("name", ["report", "explored"])
def test_nothing_scrolls_sideways(
    opened: Opened, request: pytest.FixtureRequest, name: str, size: tuple[int, int]
) -> None:
    page = opened(request.getfixturevalue(name), size)
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
    heads = ["Figures", "Layer by step", "Residual plane", MAIN]
    assert [text for text in page.locator("h2").all_inner_texts() if text in heads] == heads
    assert page.locator("#main tbody tr").count() > 10


@pytest.mark.parametrize("size", [(390, 844), (1400, 1000)])
def test_the_verdict_and_the_ladder_come_before_any_table(
    opened: Opened, explored: Path, size: tuple[int, int]
) -> None:
    page = opened(explored, size)
    tops = [
        page.locator(one).first.bounding_box()["y"]
        for one in (".verdict", ".ladder", "#layers", "#plane", "#main table", "#cite")
    ]
    assert tops == sorted(tops) and len(set(tops)) == len(tops)
    first = page.locator("table").first.bounding_box()["y"]
    assert tops[0] < size[1] / 2 and first > tops[1], "the sentence is on the first screen"


# -- explorers ---------------------------------------------------------------------------------------------------------


def told(page: Page, section: str) -> str:
    return page.locator(f"#{section} output").inner_text()


def test_pointing_at_a_cell_tells_its_values(opened: Opened, explored: Path) -> None:
    page = opened(explored)
    page.locator("[data-measure=alignment] [data-i]").nth(1).hover()
    assert told(page, "layers") == "layer 2, step 20: alignment 0.720, fraction −0.500; long enough to judge"
    page.locator("[data-measure=fraction] [data-i]").nth(0).hover()
    assert told(page, "layers") == "layer 2, step 1: alignment 0.701, fraction −0.500; too short to judge"
    steps = page.locator("[data-measure=alignment] tfoot th").count() - 1
    page.locator("[data-measure=alignment] [data-i]").nth(2 * steps).hover()
    assert told(page, "layers").endswith("p99 of isotropic 0.250")
    page.locator("#plane circle").last.hover()
    assert re.fullmatch(r"[ab], step \d+: along v_rev −?\d\.\d{3}, across −?\d\.\d{3}", told(page, "plane"))


def test_a_tap_and_the_arrow_keys_tell_them_too(opened: Opened, explored: Path) -> None:
    page = opened(explored, (390, 844))
    cell = page.locator("[data-measure=alignment] [data-i]").nth(1)
    cell.dispatch_event("pointerdown", {"clientX": (box := cell.bounding_box())["x"] + 5, "clientY": box["y"] + 5})
    assert told(page, "layers").startswith("layer 2, step 20:")
    page.locator("#maps").focus()
    for key, says in (
        ("ArrowDown", "layer 1, step 20:"),
        ("ArrowLeft", "layer 1, step 1:"),
        ("ArrowUp", "layer 2, step 1:"),
    ):
        page.keyboard.press(key)
        assert told(page, "layers").startswith(says)
    page.locator("#planes").focus()
    page.keyboard.press("ArrowRight")
    assert "along v_rev" in told(page, "plane")


CELLS = """[...document.querySelectorAll("#maps [data-i]")].map(one =>
    [one.textContent, one.title, [...one.classList].sort().join(" "), one.style.getPropertyValue("--x")])"""


def test_a_choice_of_runs_changes_the_maps_and_back(opened: Opened, explored: Path) -> None:
    """What the script writes for the first choice is what stands there without scripts."""
    page = opened(explored)
    before = page.evaluate(CELLS)
    page.locator("#run").select_option("unblocked-1")
    assert page.locator("[data-measure=alignment] [data-i]").nth(1).inner_text() == "1.22"
    assert "alignment 1.220" in page.evaluate(CELLS)[1][1]
    page.locator("#run").select_option("unblocked: mean of 2 runs")
    assert page.evaluate(CELLS) == before
    assert opened(explored, script=False).evaluate(CELLS) == before


def test_the_colour_scale_is_symmetric_about_0(opened: Opened, explored: Path) -> None:
    page = opened(explored)
    ends = (
        page.locator("[data-measure=fraction]")
        .locator("xpath=ancestor::figure")
        .locator(".ends span")
        .all_inner_texts()
    )
    assert ends == ["−0.50", "0", "0.50"]
    look = """[...document.querySelectorAll("[data-measure=fraction] [data-i]:not(.short)")].map(one => [
        one.textContent, getComputedStyle(one).backgroundColor.match(/[\\d.]+/g).slice(-3).map(Number)])"""
    for text, (red, _, blue) in page.evaluate(look):
        assert blue - red > 0.1 if text.startswith("−") else red == blue, text


def test_a_highlighted_arm_is_told(opened: Opened, explored: Path) -> None:
    page = opened(explored)
    hot = "[...new Set([...document.querySelectorAll('#planes .hot')].map(one => one.dataset.arm))]"
    assert page.evaluate(hot) == ["unblocked"]
    page.locator("#arm").select_option(HOSTILE)
    assert page.evaluate(hot) == [HOSTILE] and page.locator("#hot").inner_text() == HOSTILE


def test_a_hostile_name_does_not_run(opened: Opened, explored: Path) -> None:
    page = opened(explored)
    page.locator("#run").select_option(f"{HOSTILE}: mean of 2 runs")
    page.locator("#planes").focus()
    page.keyboard.press("ArrowRight")
    open_all(page)
    page.wait_for_timeout(200)
    assert page.title() == "gravlens · made up" and page.locator("img").count() == 0


def hostile(value: Any) -> Any:
    """A result, every text of which tries to break out of where it stands."""
    if isinstance(value, dict):
        return {key: value[key] if key == "prompts" else hostile(value[key]) for key in value}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_results_folder_runs(opened: Opened, tmp_path: Path) -> None:
    """Names of runs, layers, histories, arms, nulls, columns and figures, and the command."""
    results = hostile(made_up())
    for part in ("arms", "nulls", "controls", "environment"):
        results[part][HOSTILE] = next(iter(results[part].values()))
    results["layers"] = [HOSTILE]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_explored(tmp_path, HOSTILE)
    rows = pd.read_csv(tmp_path / "plane.csv").assign(organism=HOSTILE, run=HOSTILE, checkpoint=HOSTILE)
    rows.to_csv(tmp_path / "plane.csv", index=False)
    pd.DataFrame({"layer": [HOSTILE], HOSTILE: [HOSTILE]}).to_csv(tmp_path / "effects.csv", index=False)
    figures = tmp_path / "figures"
    figures.mkdir(exist_ok=True)
    # no slash in the name of a file
    save_figure(plot_arms(pd.DataFrame({"arm": ["a"], "compliance_rate": [0.5]})), figures / "x", formats=("png",))
    (figures / "x.png").rename(figures / """'"><img src=x onerror="document.title = 'run'">.png""")
    page = opened(write_report(tmp_path))
    open_all(page)
    page.locator("#maps").hover()
    page.wait_for_timeout(200)
    assert HOSTILE in page.title() and page.locator("h1").inner_text().endswith(HOSTILE), "told, not run"
    assert page.locator("img").count() == 1 and page.locator("script").count() == 1
    assert page.locator("[onerror]").count() == 0


@pytest.mark.parametrize("allowed", [True, False])
def test_a_click_copies_or_else_selects(opened: Opened, explored: Path, allowed: bool) -> None:
    page = opened(explored)
    write = "async text => { window.copied = text; }" if allowed else "async () => { throw new Error('denied'); }"
    page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {{value: {{writeText: {write}}}}})")
    button, text = page.locator("[data-copy=bibtex]"), page.locator("#bibtex").inner_text()
    button.click()
    page.wait_for_function("document.querySelector('[data-copy=bibtex]').textContent !== 'Copy'")
    assert page.evaluate("getSelection().toString()").strip() == text.strip()
    assert (page.evaluate("window.copied") == text) is allowed
    assert button.inner_text() == ("Copied" if allowed else "Selected: press Ctrl+C")


def test_without_scripts_the_maps_and_the_plane_stand_there_and_no_idle_button(opened: Opened, explored: Path) -> None:
    page = opened(explored, script=False)
    assert page.locator("[data-measure=alignment] [data-i]").nth(1).inner_text() == "0.72"
    assert page.locator("#plane svg circle").count() == 3
    for idle in (".pick", "[data-copy]"):
        assert not any(one.is_visible() for one in page.locator(idle).all())


def test_maps_and_planes_are_printed_whole(opened: Opened, explored: Path) -> None:
    page = opened(explored, PAPER, scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#plane svg").is_visible() and not page.locator("#run").is_visible()
    kept = "[...document.querySelectorAll('.heat, .plane, figure')].map(one => getComputedStyle(one).breakInside)"
    assert set(page.evaluate(kept)) == {"avoid"}
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER[0]


def test_what_a_finger_hits_is_large(opened: Opened, explored: Path) -> None:
    """44 CSS pixels, as the platforms' guidelines ask for."""
    page = opened(explored, (390, 844))
    heights = [one.bounding_box()["height"] for one in page.locator("select, [data-copy]").all()]
    assert len(heights) == 4 and min(heights) >= 44


CONTRASTS = """() => {
  // color-mix is computed to color(srgb …), from 0 to 1
  const channels = text => text.match(/[\\d.]+/g).map(one => Number(one) * (text.startsWith("color(srgb") ? 255 : 1));
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
def test_the_maps_are_legible(opened: Opened, explored: Path, scheme: str) -> None:
    page = opened(explored, scheme=scheme)
    found = [contrast for contrast in page.evaluate(CONTRASTS) if contrast[2] == "TD"]
    assert len(found) > 100 and min(found)[0] >= 4.5, min(found)


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
    return [
        text.split("\n")[0].strip()
        for text in page.locator(f"{table} tbody td:nth-child({index + 1})").all_inner_texts()
    ]


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


def test_paper_breaks_only_long_tables_and_repeats_their_headings(opened: Opened, report: Path) -> None:
    page = opened(report, PAPER)
    page.emulate_media(media="print")
    look = """[...document.querySelectorAll("section:not(.full) .box")].map(one => [
        one.querySelectorAll("tbody tr").length, getComputedStyle(one).breakInside,
        getComputedStyle(one.querySelector("thead")).display])"""
    looks = page.evaluate(look)
    assert {rows > 12 for rows, _, _ in looks} == {True, False}
    assert [one for one in looks if one[1] != ("auto" if one[0] > 12 else "avoid")] == []
    assert {display for _, _, display in looks} == {"table-header-group"}
    buttons = "[...document.querySelectorAll('th button')].map(one => getComputedStyle(one).display)"
    assert set(page.evaluate(buttons)) == {"contents"}, "Chromium paints no button in a repeated heading"
    wide = page.locator(table_of(page, "Arms at the last step"))
    assert not wide.locator("small").first.is_visible(), "a narrow column of many lines"
    assert page.locator(".meanings dd").first.inner_text(), "it stands under the figures"


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
