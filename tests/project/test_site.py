"""The site: every public name in one place of the reference, every page in the navigation, nothing fetched."""

import ast
import functools
import importlib
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import gravlens
from gravlens.reporting import paper

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs/reference").glob("*.md"))}


# -- the reference -----------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """Dotted names that the reference shows, as often as it shows them."""
    return [name for page in REFERENCE.values() for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]


def target(name: str) -> object:
    """What a dotted name of the reference leads to."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def listed(stub: Path) -> list[tuple[str, str]]:
    """A stub's names, each with the module that it comes from."""
    package = ".".join(stub.parent.relative_to(ROOT).parts)
    imports = [node for node in ast.parse(stub.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    return [
        (f"{package}.{node.module}" if node.module else package, alias.name) for node in imports for alias in node.names
    ]


def is_module(module: str, name: str) -> bool:
    return importlib.util.find_spec(f"{module}.{name}") is not None if is_package(module) else False


def is_package(module: str) -> bool:
    return (ROOT / Path(*module.split(".")) / "__init__.py").is_file()


def test_every_name_of_the_stubs_is_in_exactly_one_place() -> None:
    stubs = [ROOT / "gravlens/__init__.pyi", *sorted(ROOT.glob("gravlens/*/__init__.pyi"))]
    names = {getattr(importlib.import_module(m), n) for stub in stubs for m, n in listed(stub) if not is_module(m, n)}
    counts = Counter(target(name) for name in documented())
    assert len(names) > 100
    assert [one for one in names if counts[one] != 1] == []
    assert [one for one, count in counts.items() if count > 1] == []


def test_every_namespace_has_one_section() -> None:
    wanted = [name for module, name in listed(ROOT / "gravlens/__init__.pyi") if is_module(module, name)]
    headings = [name for page in REFERENCE.values() for name in re.findall(r"^## `gl\.(\w+)`$", page, re.MULTILINE)]
    assert len(wanted) > 20 and sorted(headings) == sorted(wanted)


def test_every_name_in_the_reference_is_there_and_documented() -> None:
    assert [name for name in documented() if not target(name).__doc__] == []


def test_the_reference_lists_its_pages() -> None:
    assert set(re.findall(r"\]\((\w+\.md)\)", REFERENCE["index.md"])) == REFERENCE.keys() - {"index.md"}


# -- mathematics and paper ---------------------------------------------------------------------------------------------


def functions_named(page: str) -> set[str]:
    """What a page's tables name under the heading `function`."""
    found: set[str] = set()
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        if "function" in rows[0]:
            column = rows[0].index("function")
            found |= {name for row in rows[2:] for name in re.findall(r"`([\w.]+)`", row[column])}
    return found


@pytest.mark.parametrize("page", ["mathematics.md", "paper.md"])
def test_every_function_in_the_tables_is_public(page: str) -> None:
    named = functions_named((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(named) > 10
    assert [name for name in named if not is_public(name)] == []


def is_public(name: str) -> bool:
    """Whether `gl.<name>` leads somewhere."""
    found = gravlens
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def test_a_function_that_is_not_there_is_seen() -> None:
    assert functions_named("| a | function |\n|---|---|\n| x | `gone`, `follow` |\n") == {"gone", "follow"}
    assert is_public("follow") and is_public("nulls.isotropic")
    assert not is_public("gone") and not is_public("nulls.gone")


def test_the_papers_figures_are_those_that_results_stand_beside() -> None:
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    figures = [figure for _, figure in paper.PAPER_STEPS.values()]
    figures += [paper.PAPER_PAIRS, paper.PAPER_ALIGNMENT["penalty"], *list(paper.PAPER_HARM.values())[:2]]
    numbers = [number for figure in figures for number in re.findall(r"[−\d][\d.]*", figure.split("(")[0])]
    assert len(numbers) > 10
    assert [number for number in numbers if number.replace("0.", ".").rstrip("%") not in page] == []


# -- the navigation ----------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose one tag names a function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def configuration() -> dict[str, object]:
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages(nav: object) -> list[str]:
    """The files that a navigation leads to."""
    inner = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return [nav] if isinstance(nav, str) else [page for entry in inner for page in pages(entry)]


def test_the_navigation_has_every_page_once_in_four_parts() -> None:
    nav = configuration()["nav"]
    assert isinstance(nav, list)
    assert [name for entry in nav for name in entry] == ["Start", "Tasks", "Reference", "Background"]
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert Counter(pages(nav)) == Counter(written)


def test_the_site_is_strict_and_fetches_no_fonts() -> None:
    found = configuration()
    assert found["strict"] is True and found["theme"]["font"] is False


# -- the hook ----------------------------------------------------------------------------------------------------------


@functools.cache
def hook() -> object:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    spec = importlib.util.spec_from_file_location("outside", ROOT / "docs/outside.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_docs_are_turned_and_code_is_not() -> None:
    page = (
        "[n](../notebooks/quickstart.ipynb) [r](../README.md#notes) [p](nulls.md) [w](https://x.org/a.md) [-](no.md)\n"
    )
    code = "```markdown\n[n](../notebooks/quickstart.ipynb)\n```\n"
    wanted = "[n](notebooks/quickstart.md) [r](readme.md#notes) [p](nulls.md) [w](https://x.org/a.md) [-](no.md)\n"
    assert hook().turned(page + code, "docs/index.md") == wanted + code
    assert hook().turned("[i](../docs/nulls.md)", "notebooks/quickstart.ipynb") == "[i](../nulls.md)"
    assert hook().turned("[i](../index.md)", "docs/reference/index.md") == "[i](../index.md)"


def test_a_notebook_becomes_a_page_with_its_outputs() -> None:
    outputs = [
        {"output_type": "stream", "text": ["seen\n"]},
        {"data": {"image/png": "iVBORw==\n", "text/plain": "<Axes>"}},
        {"data": {"text/html": '<style>x</style><table border="1" class="dataframe">\n <tr></tr>\n</table>'}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": "print(1)", "outputs": outputs},
    ]
    page = hook().as_markdown({"cells": cells})
    assert page.startswith(
        "# Title\n\n```python\nprint(1)\n```\n\n```text\nseen\n```\n\n![](data:image/png;base64,iVBORw==)"
    )
    assert page.endswith("<div><table > <tr></tr> </table></div>\n")


# -- the site ----------------------------------------------------------------------------------------------------------


def fetched(html: str) -> list[str]:
    """What a browser would fetch from elsewhere to show a page."""
    tags = re.findall(r"<(?:script|img|link|iframe|source|video)\b[^>]*>", html)
    return [tag for tag in tags if re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag)]


@pytest.mark.long
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    build, config = importlib.import_module("mkdocs.commands.build"), importlib.import_module("mkdocs.config")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    html = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {path: found for path, page in html.items() if (found := fetched(page))} == {}
    shown = {name for page in html.values() for name in re.findall(r'<h3 id="(gravlens\.[\w.]+)"', page)}
    assert shown >= set(documented())


def test_what_is_fetched_is_seen() -> None:
    assert fetched('<script src="https://x.org/a.js"></script>') and fetched("<link href=//x.org/a.css>")
    assert not fetched('<a href="https://x.org">x</a><script src="assets/a.js"></script>')
