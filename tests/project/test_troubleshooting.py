"""Troubleshooting quotes messages that gravlens makes, and the glossary has the terms of a verdict."""

import ast
import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from histories import history_on_disk
from safetensors.torch import load_file, save_file

import gravlens as gl

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^```text\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
LETTERS = 10  # that a text of the source must have: f"{given} {wanted}" would match anything
SHARE = 0.25  # of a message's part that must be the source's own text, not filled in
VALUE = r".{0,160}"


@functools.cache
def templates() -> list[tuple[re.Pattern[str], int]]:
    """Every text in the source as a pattern, values left open, and how many characters of it are fixed."""
    found: set[tuple[str, int]] = set()
    for path in (ROOT / "gravlens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(p.value) if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
            fixed = "".join(text for text in texts if text)
            if isinstance(node, ast.JoinedStr | ast.Constant) and sum(map(str.isalpha, fixed)) >= LETTERS:
                found.add(("".join(VALUE if text is None else re.escape(text) for text in texts), len(fixed)))
    return [(re.compile(pattern, re.DOTALL), fixed) for pattern, fixed in sorted(found)]


def made_by_the_source(message: str) -> bool:
    """Whether a message is a row of the source's texts, as `GravlensError` joins them."""
    ends = [match.end() for match in re.finditer(r"\S(?=\s|$)", message)]
    reached, todo = {0}, [0]
    while todo:
        start = todo.pop()
        gap = re.compile(r"(?: Try:)? ?").match(message, start)
        begin = gap.end() if gap and start else start
        for end in ends:
            if end > begin and end not in reached:
                one = (p.fullmatch(message, begin, end) and fixed >= SHARE * (end - begin) for p, fixed in templates())
                if any(one):
                    reached.add(end)
                    todo.append(end)
    return len(message) in reached


def attempts() -> list[Callable[[], object]]:
    """Mistakes in a history of the docs that end in messages of the page; some are put together of too many parts."""
    folders: dict[str, Any] = {"witness": "base", "anchor": "aligned", "probes": "probes.jsonl"}
    of = gl.ModelSequence.from_folders
    tuned = Path("ft/seed0/checkpoint-20/model.safetensors")
    for name in ("nowt", "nan", "pickled"):
        shutil.copytree(tuned.parent, Path(name) / "checkpoint-20")
        Path(name, "checkpoint-20", tuned.name).unlink()
    weights = load_file(tuned)
    weights["model.layers.0.mlp.down_proj.weight"][0] = float("nan")
    save_file(weights, "nan/checkpoint-20/model.safetensors", metadata={"format": "pt"})
    Path("nowt/checkpoint-20").replace("nowt/checkpoint-5")
    Path("pickled/checkpoint-20/pytorch_model.bin").touch()
    return [
        lambda: gl.locate_vrev(of(**folders), layer=12),
        lambda: of(**folders, runs={"seed0": "ft/seed9/checkpoint-*"}),
        lambda: gl.locate_vrev(of(witness="base", anchor="aligned")),
        lambda: gl.cache_residuals(of(**folders, runs={"seed0": "nowt/checkpoint-*"})),
        lambda: gl.cache_residuals(of(**folders, runs={"seed0": "pickled/checkpoint-*"})),
        lambda: gl.cache_residuals(of(**folders, runs={"seed0": "nan/checkpoint-*"})),
        lambda: gl.locate_vrev(of(**folders), placement=gl.Placement("cuda:99")),
    ]


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The messages of `attempts`."""
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("mistakes"))
        history_on_disk(Path())
        for attempt in attempts():
            with pytest.raises(gl.GravlensError) as caught:
                attempt()
            messages.append(str(caught.value).replace("cuda:99", "cuda"))
    return messages


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_made_by_the_source_or_raised(message: str, raised: list[str]) -> None:
    assert any(one.startswith(message) for one in raised) or made_by_the_source(message)


def test_mistakes_raise_what_the_page_quotes(raised: list[str]) -> None:
    assert [one for one in raised if not any(one.startswith(quote) for quote in QUOTED)] == []


def test_a_message_that_the_source_does_not_make_is_seen() -> None:
    layer = QUOTED[0]
    assert len(QUOTED) > 25 and made_by_the_source(layer)
    assert not made_by_the_source(layer.replace("is out of range", "is not in range"))
    assert not made_by_the_source("Layer 12 is out of range. Give another layer, please.")


def test_every_term_of_the_verdict_is_in_the_glossary() -> None:
    glossary = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = "witness anchor run v_rev drift alignment fraction control stranger level demand unit".split()
    assert [term for term in terms if f"*{term}*" not in glossary] == []
