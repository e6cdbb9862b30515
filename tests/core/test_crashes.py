"""Every writing system call fails or kills once: the call ends right or in one clear error, the next one ends right."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import reliability
from crash import shim
from crash.careless import careless
from crash.harness import cases

if not shim.USABLE:
    pytest.skip("the library that is preloaded needs Linux and a C compiler", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ("store damaged", "finetune resumed", "residuals.safetensors", "save_folder over another")
RIGHT = ("right result", "clear error")


def broken(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"{one['operation']}, {one['case']}: {one['outcome']}, {one['text']}"
        for one in rows
        if one["outcome"] not in RIGHT
    ]


def check(rows: Sequence[dict[str, Any]]) -> None:
    """All is well, and the calls did fail: without a fault every case would be right."""
    assert broken(rows) == []
    outcomes = Counter((one["kind"], one["outcome"]) for one in rows)
    assert all(outcomes[kind, "clear error"] for kind in ("fail", "full")), outcomes
    assert all(outcomes[kind, "right result"] for kind in ("kill", "short")), outcomes


def test_a_sample_of_calls(tmp_path: Path) -> None:
    rows = cases(tmp_path, "--at-most", "1", "--only", *SAMPLE, timeout=280)
    assert {one["operation"] for one in rows} == {*SAMPLE}
    check(rows)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_calls_of_every_operation(tmp_path: Path) -> None:
    check(cases(tmp_path, "--at-most", "2", timeout=880))


@pytest.mark.long
def test_killed_at_random_instants(tmp_path: Path) -> None:
    rows = cases(tmp_path, "--modes", "", "--at-random", "6", "--only", "store cold", "finetune resumed", timeout=280)
    assert broken(rows) == [] and len(rows) == 12


@pytest.fixture(scope="module")
def controls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    home = tmp_path_factory.mktemp("careless")
    return cases(home, "--at-most", "4", "--only", *(one.name for one in careless()), timeout=120)


@pytest.mark.parametrize(
    ("writer", "kind", "outcome"),
    [
        ("in_place", "kill", "wrong"),  # half of the new content
        ("in_place", "fail", "traceback"),  # a bare OSError
        ("silent", "full", "wrong"),  # no error, and the old content
        ("greedy", "kill", "lost"),  # a neighbour's file
        ("locked", "kill", "lost"),  # the next call fails
    ],
)
def test_a_careless_writer_is_caught(controls: list[dict[str, Any]], writer: str, kind: str, outcome: str) -> None:
    found = Counter(one["outcome"] for one in controls if (one["operation"], one["kind"]) == (writer, kind))
    assert found[outcome], found


def test_the_page_shows_the_table_that_was_made() -> None:
    table = pd.read_csv(ROOT / "docs/data/reliability.csv", keep_default_na=False)
    shown = reliability.markdown(
        [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    )
    assert shown in (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    parts, total = table[:-1], table.iloc[-1]
    outcomes = ["right result", "clear error", "traceback", "wrong", "lost"]
    assert (parts[outcomes].sum(axis=1) == parts["cases"]).all()
    assert all(parts[name].sum() == total[name] for name in ("cases", *outcomes))
    assert total["cases"] >= 1000 and parts[parts["disturbance"].str.startswith("killed")]["cases"].sum() >= 50
    assert total["wrong"] == total["lost"] == 0
