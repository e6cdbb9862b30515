"""The script that looks at the site sees what it is for; and search works in a page opened from the disk."""

import importlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `dev`")
PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if PROGRAM is None:
    pytest.skip("no browser on PATH: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180_000  # ms; other tests keep the cores busy


@pytest.fixture(scope="module")
def screens() -> object:
    spec = importlib.util.spec_from_file_location("screens", ROOT / "docs/screens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


def faults(screens: object, browser: object, folder: Path, body: str) -> list[str]:
    """What the script says of a page of the telephone's width."""
    path = folder / "page.html"
    html = f"<!doctype html><body style='margin:0'><div class='md-content'><article>{body}</article></div></body>"
    path.write_text(html, encoding="utf-8")
    page = screens.opened(browser, 390, "light")
    page.set_default_timeout(PATIENCE)
    try:
        return screens.looked_at(page, path, folder / "page.png", 390)
    finally:
        page.context.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("<p>short</p>", ""),
        ("<div style='overflow-x:auto'><table style='width:900px'><tr><td>a</td></tr></table></div>", ""),
        ("<div style='width:900px'>wide</div>", "px too wide"),
        ("<div style='overflow:hidden'><p style='width:900px'>cut</p></div>", "sticks out: <p> cut"),
        ("<img src='gone.png' alt='x'>", "no picture"),
        ("<img src='https://x.invalid/a.png' alt='x'>", "asks for https://x.invalid/a.png"),
    ],
)
def test_a_fault_of_a_page_is_seen(screens: object, browser: object, tmp_path: Path, body: str, said: str) -> None:
    found = faults(screens, browser, tmp_path, body)
    assert found == [] if not said else any(said in one for one in found), found


@pytest.mark.long
def test_search_works_in_a_page_opened_from_the_disk(screens: object, browser: object, tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra docs is not installed")
    build, config = importlib.import_module("mkdocs.commands.build"), importlib.import_module("mkdocs.config")
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs/search_iframe-worker.js", docs)
    (docs / "index.md").write_text("# One\n\nNothing here.\n")
    (docs / "two.md").write_text("# Two\n\nThe excursion of the anchor.\n")
    (tmp_path / "mkdocs.yml").write_text(
        "site_name: x\nuse_directory_urls: false\ntheme: {name: material, font: false}\n"
        "plugins: [search, offline]\nextra: {polyfills: [search_iframe-worker.js]}\n"
    )
    build.build(config.load_config(str(tmp_path / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    index = (tmp_path / "site/index.html").read_text()
    fetched = re.findall(r"""<script[^>]* src="(http[^"]+)""", index)
    assert fetched == [], "the plugin puts in its own script, from a server, unless it knows ours by its name"
    assert screens.searched(browser, tmp_path / "site", "excursion") == ["Two"]
