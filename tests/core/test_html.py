"""What a notebook shows: every result in one style, escaped, without a colour, cut where it is long."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gravlens.activations.cost import Forecast, Machine
from gravlens.activations.residuals import Residuals
from gravlens.claims.claim import Claim
from gravlens.core import display as html
from gravlens.directions.direction import Direction, Directions, Subspace, Subspaces
from gravlens.directions.trajectory import Trajectory, follow
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.effects import DoseResponse, Effect
from gravlens.stats.nulls import NullDraws
from gravlens.training.thresholds import Threshold

EVIL = "<script>alert('&')</script>"
STATES = np.random.default_rng(0).standard_normal((3, 4, 2, 5)).astype(np.float32)


def direction(name: str, layer: int = 0) -> Direction:
    return Direction(np.eye(5)[layer], layer, 2.0, 0.9, name, "p", {name: name})


def sequence(name: str) -> ModelSequence:
    run = (Checkpoint(f"{name}/1", Path(name), 1),)
    witness, anchor = (Checkpoint(one, Path(name)) for one in ("witness", "anchor"))
    return ModelSequence(witness, anchor, {"run": run}, PromptSet(("a",)), skipped={name: name}, system=name)


def residuals(name: str) -> Residuals:
    return Residuals(STATES, ("anchor", name, "run/1"), (0, 1), name, {name: name})


def trajectory(name: str) -> Trajectory:
    followed = follow(Residuals(STATES, ("witness", "anchor", f"{name}/1"), (0, 1), "p"), directions("mean"))
    return Trajectory(followed.data, followed.layers_in_mean, {7: name})


def directions(name: str) -> Directions:
    return Directions((direction(name), direction(name, 1)))


def effect(name: str, rows: int = 1) -> Effect:
    row = {"condition": name, "layer": pd.NA, "baseline": 1.0, "difference": -0.5, "random_kind": name}
    table = pd.DataFrame([row] * rows).astype({"layer": "Int64"})
    table.attrs["score"] = name
    return Effect(table, {}, {}, np.ones(2))


def dose_response(name: str) -> DoseResponse:
    slope = pd.Series({"difference": 1.0, "low": 0.5, "high": 1.5})
    return DoseResponse(effect(name), slope, 0.5, (0.1, 0.9), np.ones(2), np.ones(1))


def claimed(name: str) -> Claim:
    rows = [{"level": 1, "name": name, "holds": pd.NA, "figures": name}]
    return Claim(0, name, name, (name,), name, pd.DataFrame(rows).astype({"holds": "boolean"}), pd.DataFrame())


def forecast(name: str) -> Forecast:
    return Forecast(2, 3, 4, 6.0, 7, 0, 8, 9, 1, 1, {name: 1.0}, Machine(1e9, 1e9))


def threshold(name: str) -> Threshold:
    return Threshold("fraction", 0.25, source=name)


def null(name: str) -> NullDraws:
    return NullDraws(name, np.full((3, 2, 1), 0.5), (1, 20), (4,), run=name)


def subspaces(name: str) -> Subspaces:
    return Subspaces((Subspace(np.eye(5)[:2], 3, 2.0, name, "p", {name: name}),))


MAKERS: dict[str, Callable[[str], Any]] = {
    "ModelSequence": sequence,
    "Residuals": residuals,
    "Direction": direction,
    "Directions": directions,
    "Trajectory": trajectory,
    "Effect": effect,
    "DoseResponse": dose_response,
    "Claim": claimed,
    "Forecast": forecast,
    "Threshold": threshold,
    "NullDraws": null,
    "Subspace": lambda name: subspaces(name)[3],
    "Subspaces": subspaces,
}
every_result = pytest.mark.parametrize("kind", MAKERS)


class Reader(HTMLParser):
    """The tags, attributes and texts of a page, as a browser takes them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= set(attrs)
        self.open += [] if tag == "br" else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@every_result
def test_a_name_that_is_html_is_shown_as_text(kind: str) -> None:
    page = Reader(MAKERS[kind](EVIL)._repr_html_())
    assert page.tags <= {"table", "caption", "b", "br", "thead", "tbody", "tr", "th", "td"} and page.open == []
    assert EVIL in "".join(page.texts)


@every_result
def test_all_are_of_one_style_and_leave_colours_to_the_theme(kind: str) -> None:
    shown = MAKERS[kind]("plain")
    page = Reader(shown._repr_html_())
    assert page.texts[0].startswith(type(shown).__name__) and {"caption", "tbody"} <= page.tags
    assert {name for name, _ in page.attributes} <= {"style"}
    styles = " ".join(str(value) for _, value in page.attributes)
    assert not re.search("color|background|#|font", styles)


def test_a_page_that_is_not_escaped_would_be_seen() -> None:
    assert "script" in Reader(f"<table><caption>{EVIL}</caption></table>").tags


# -- what is in the tables ---------------------------------------------------------------------------------------------


def cells(page: str) -> list[list[str]]:
    """The rows of a table's body."""
    rows = re.findall("<tr>(.*?)</tr>", page.split("<tbody>")[1])
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_figures_stand_in_their_rows() -> None:
    assert cells(directions("mean")._repr_html_())[1] == ["1", "2.000", "0.900", "mean", "mean: mean"]
    assert cells(null("noise")._repr_html_()) == [["1", "0.500", "0.500", "0.500"], ["20", "0.500", "0.500", "0.500"]]
    assert cells(subspaces("drift")._repr_html_()) == [["3", "2", "2.000", "drift", "drift: drift"]]
    assert cells(effect("cut")._repr_html_())[0][:4] == ["cut", "several", "1.000", "-0.500"]
    assert ["value", "0.250"] in cells(threshold("mine")._repr_html_())
    assert ["checkpoints × prompts", "2 × 3"] in cells(forecast("passes")._repr_html_())
    assert ["run run", "steps 1"] in cells(sequence("here")._repr_html_())
    assert ["layers", "0, 1"] in cells(residuals("digest")._repr_html_())


def test_a_demand_that_was_not_run_is_called_so() -> None:
    table = pd.DataFrame({"name": list("abc"), "holds": [True, False, pd.NA]}).astype({"holds": "boolean"})
    assert [row[1] for row in cells(Claim(0, "", "", (), "b", table, pd.DataFrame())._repr_html_())] == [
        "yes",
        "no",
        "not run",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"), (0, "0"), (0.0, "0.000"), (1e-5, "1e-05"), (12345.6, "12346"), (1234567.0, "1.23e+06"),
        (np.float32(0.5), "0.500"),
        (np.int64(1234), "1234"), (float("nan"), ""), (None, ""), (pd.NA, ""), (True, "True"), (-0.5, "-0.500"),
    ],
)  # fmt: skip
def test_a_number_is_shown_with_as_many_digits_as_it_is_worth(value: Any, shown: str) -> None:
    assert html.cell(value) == shown


# -- long ones ---------------------------------------------------------------------------------------------------------


def test_a_long_table_is_cut_and_says_so() -> None:
    page = effect("cut", rows=50)._repr_html_()
    assert len(cells(page)) == html.MAX_ROWS and "30 of 50 rows are left out: see .table" in page
    exact = effect("cut", rows=html.MAX_ROWS)._repr_html_()
    assert len(cells(exact)) == html.MAX_ROWS and "left out" not in exact


def test_a_long_list_and_a_long_text_are_cut_and_say_so() -> None:
    assert html.listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert html.listed(range(2000)) == "0, 1, 2, 3, 4, 5, 6, 7, …, 1999 (2,000 in all)"
    assert html.cell("x" * 1000) == "x" * html.MAX_LETTERS + " … (1,000 letters in all)"
