"""The examples in the docstrings of public names run, and every name of the top level has one."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import docstring_examples as examples
import pytest

FOUND = examples.with_examples()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("history")


@pytest.fixture(scope="module")
def known(folder: Path) -> dict[str, Any]:
    return examples.names(folder)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in examples.LONG else ()) for name in FOUND]
)
def test_the_example_of_a_docstring_runs(name: str, known: dict[str, Any], folder: Path) -> None:
    if (needed := examples.NEEDS.get(name)) and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    outcome = examples.run(name, FOUND[name], known, folder)
    assert outcome.passed, outcome.report


def test_every_name_of_the_top_level_has_an_example() -> None:
    assert set(examples.top()) - set(FOUND) == set(examples.WITHOUT)


def test_a_namespace_has_examples() -> None:
    spaces = {name.partition(".")[0] for name in FOUND if "." in name}
    assert spaces >= set(examples.NAMESPACES)


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Examples:\n    >>> 1 + 1\n    3\n", "Expected:"),
        ("Examples:\n    >>> vs.laters\n", "AttributeError"),
        ("Says nothing.", ""),
    ],
)
def test_an_example_that_fails_is_seen(docstring: str, said: str, known: dict[str, Any], folder: Path) -> None:
    def documented() -> None: ...

    documented.__doc__ = docstring
    outcome = examples.run("documented", documented, known, folder)
    assert not outcome.passed and said in outcome.report
