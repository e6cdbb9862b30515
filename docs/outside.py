"""A hook of MkDocs: what docs/ links to outside itself is part of the site, and notebooks are pages of it.

The pages keep the relative paths that lead to the files in a checkout; here these are turned to where the files stand
in the site. A notebook is shown with the outputs that are stored in it, and nothing is executed.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FURTHER_WORD = re.compile(r"^(```\w+) [\w-]+$", re.MULTILINE)  # as in `python no-run`
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^(```.*?^```\n?)", re.MULTILINE | re.DOTALL)
SECTION = "Start"  # where notebooks stand in the navigation
# In teaching order; each takes for granted what the ones before it show. What is missing here comes last.
ORDER = """quickstart your_own_checkpoints layerwise_ablation which_null blocking_a_finetune transformer_lens
a_real_model""".split()

Cell = dict[str, Any]


# -- links -------------------------------------------------------------------------------------------------------------


def site_uri(path: str) -> str:
    """Where a file of the repository stands in the site; README.md would be taken for a folder's index."""
    uri = path.removeprefix("docs/")
    return f"{uri.removesuffix('.ipynb')}.md" if uri.endswith(".ipynb") else uri.replace("README.md", "readme.md")


def repository_path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    outside = [uri.removesuffix(".md") + ".ipynb", uri.replace("readme.md", "README.md")]
    return next((path for path in outside if (ROOT / path).is_file()), f"docs/{uri}")


def targets(text: str, path: str) -> Iterator[tuple[re.Match[str], str]]:
    """Links of a page at `path`, and the repository's files that they lead to."""
    for match in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))
        if ":" not in match[2] and (ROOT / target).is_file():
            yield match, target


def turned(text: str, path: str) -> str:
    """A page whose links lead to the same files in the site; code blocks stay as they are."""
    here = posixpath.dirname(site_uri(path)) or "."
    parts = FENCE.split(text)
    for i in range(0, len(parts), 2):
        for match, target in reversed(list(targets(parts[i], path))):
            link = posixpath.relpath(site_uri(target), here)
            parts[i] = f"{parts[i][: match.start()]}{match[1]}{link}{match[3] or ''}{match[4]}{parts[i][match.end() :]}"
    return "".join(parts)


# -- notebooks ---------------------------------------------------------------------------------------------------------


def joined(text: str | list[str]) -> str:
    """A text that may stand in a notebook line by line."""
    return text if isinstance(text, str) else "".join(text)


def output(found: Cell) -> str:
    """One output of a cell as Markdown: a picture, a table or text."""
    data = found.get("data", {})
    if "image/png" in data:
        return f"![](data:image/png;base64,{joined(data['image/png']).strip()})"
    if "text/html" in data:
        html = re.sub(r"<(style|script)\b.*?</\1>", "", joined(data["text/html"]), flags=re.DOTALL)
        one_line = re.sub(r"\s*\n\s*", " ", html.replace('border="1" class="dataframe"', ""))
        return f"<div>{one_line}</div>"
    text = joined(found.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{text}\n```" if text else ""


def as_markdown(notebook: dict[str, Any]) -> str:
    """A notebook's cells and their stored outputs as one page."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = joined(cell["source"]).strip()
        if cell["cell_type"] == "code":
            parts += [f"```python\n{source}\n```", *map(output, cell["outputs"])]
        else:
            parts.append(source)
    return "\n\n".join(part for part in parts if part) + "\n"


# -- the hook ----------------------------------------------------------------------------------------------------------


def notebooks() -> list[str]:
    """The repository's notebooks, in teaching order."""
    places = {name: place for place, name in enumerate(ORDER)}
    found = sorted(
        (ROOT / "notebooks").glob("*.ipynb"), key=lambda path: (places.get(path.stem, len(ORDER)), path.stem)
    )
    return [path.relative_to(ROOT).as_posix() for path in found]


def linked_outside() -> set[str]:
    """Files outside docs/ that a page or a notebook links to."""
    pages = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md")}
    pages |= {path: as_markdown(json.loads((ROOT / path).read_text(encoding="utf-8"))) for path in notebooks()}
    found = {target for path, text in pages.items() for _, target in targets(text, path)}
    return {path for path in found if not path.startswith("docs/")} - set(notebooks())


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks into the navigation, each under its first heading."""
    (section,) = (entry[SECTION] for entry in config.nav or [] if isinstance(entry, dict) and SECTION in entry)
    section.append({"Notebooks": [site_uri(path) for path in notebooks()]})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add notebooks as pages, and other files as they are."""
    for path in notebooks():
        content = as_markdown(json.loads((ROOT / path).read_text(encoding="utf-8")))
        files.append(File.generated(config, site_uri(path), content=content))
    for path in sorted(linked_outside()):
        files.append(File.generated(config, site_uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of each page, and leave a fence's language alone: a further word makes it no fence here."""
    return FURTHER_WORD.sub(r"\1", turned(markdown, repository_path(page.file.src_uri)))
