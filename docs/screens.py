"""Look at every page of the built site: nothing wider than the screen, no picture cut, nothing fetched.

python docs/screens.py [SITE] [OUT] [VIEW …]

SITE (default site/) is opened from the disk in Chromium, as wide as a desktop and as a telephone, light and dark.
Pictures and contact sheets go into OUT (default site-pictures/). Exit code 1 where something is wrong. Needs playwright
and Chromium on PATH.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, sync_playwright

VIEWS = {"desktop": (1400, "light"), "phone": (390, "light"), "dark": (1400, "dark")}
TALLEST = 3200  # of a picture on a contact sheet, in pixels of the page
THUMB = 460  # its width there
# What is wider than its page and cannot be scrolled by itself, and pictures that are not there.
FAULTS = """() => {
  const wide = document.scrollingElement.scrollWidth - window.innerWidth;
  const body = document.querySelector('.md-content');
  const box = body.getBoundingClientRect();
  const scrolls = e => { for (; e && e !== body; e = e.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const out = [...body.querySelectorAll('article *')].filter(e => {
    const r = e.getBoundingClientRect();
    return r.width && r.right > box.right + 1 && !scrolls(e) && getComputedStyle(e).visibility !== 'hidden'; });
  const broken = [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80));
  return [...(wide > 0 ? [`the page is ${wide} px too wide`] : []), ...broken.map(s => `no picture: ${s}`),
    ...out.slice(0, 3).map(e => `sticks out: <${e.tagName.toLowerCase()}> ${e.textContent.trim().slice(0, 60)}`)];
}"""


def opened(browser: Browser, width: int, scheme: str, *, search: bool = False) -> Page:
    """A page of this width and colour scheme that may not fetch anything."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    page.route("http*://**", lambda route: route.abort())
    if not search:  # megabytes that each page would read
        page.route("**/search_index.js", lambda route: route.abort())
    return page


def looked_at(page: Page, path: Path, picture: Path, width: int) -> list[str]:
    """What is wrong with a page; its picture is taken."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    height = min(TALLEST, int(page.evaluate("document.scrollingElement.scrollHeight")))
    page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": height})
    return [*page.evaluate(FAULTS), *(f"asks for {url}" for url in asked)]


def searched(browser: Browser, site: Path, words: str = "shared anchor") -> list[str]:
    """Titles that the search of a page opened from the disk finds."""
    page = opened(browser, 1400, "light", search=True)
    page.goto((site / "index.html").as_uri())
    page.locator("input.md-search__input").click()
    page.keyboard.type(words)
    page.wait_for_selector(".md-search-result__item", timeout=30_000)
    return page.locator(".md-search-result__item h1").all_inner_texts()


def sheets(pictures: list[Path], out: Path, view: str, columns: int = 5) -> None:
    """Contact sheets of pictures, ten to a sheet."""
    for number in range(0, len(pictures), 2 * columns):
        some = pictures[number : number + 2 * columns]
        sheet = Image.new("RGB", (columns * THUMB, 2 * 1000), "white")
        for i, path in enumerate(some):
            with Image.open(path) as picture:
                scale = THUMB / picture.width
                cut = picture.crop((0, 0, picture.width, min(picture.height, round(970 / scale), TALLEST)))
                small = cut.resize((THUMB - 8, round(cut.height * scale))).convert("RGB")
            place = (i % columns * THUMB, i // columns * 1000 + 24)
            sheet.paste(small, place)
            ImageDraw.Draw(sheet).text((place[0] + 4, place[1] - 18), path.stem, fill="black")
        sheet.save(out / f"sheet-{view}-{number // (2 * columns)}.png")


def main(site: str = "site", out: str = "site-pictures", *views: str) -> int:
    """Look at all pages; print what is wrong."""
    root, folder, faults = Path(site).resolve(), Path(out), 0
    pages = sorted(path for path in root.rglob("*.html") if path.name != "404.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        for view, (width, scheme) in VIEWS.items():
            if views and view not in views:
                continue
            (folder / view).mkdir(parents=True, exist_ok=True)
            page, taken = opened(browser, width, scheme), []
            for path in pages:
                taken.append(folder / view / f"{'-'.join(path.relative_to(root).with_suffix('').parts)}.png")
                for fault in looked_at(page, path, taken[-1], width):
                    faults += 1
                    print(f"{view}: {path.relative_to(root)}: {fault}", flush=True)
            sheets(taken, folder, view)
        found = searched(browser, root)
        print(f"search finds: {', '.join(found[:5])}")
        browser.close()
    print(f"{len(pages)} pages, {', '.join(views or VIEWS)}: {faults} faults")
    return int(bool(faults) or not found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
