"""The page of a results folder of made-up numbers: what stands in it, and that it stands alone."""

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from markupsafe import escape
from planes import PLACES, plane

from gravlens.core.errors import GravlensError
from gravlens.reporting import explorers
from gravlens.reporting.explorers import layer_grid, planes
from gravlens.reporting.page import write_report
from gravlens.reporting.paper import ARMS, CONTROLS, MEANINGS, NULLS, paper_table

ROOT = Path(__file__).parents[2]

HOSTILE = '<script>alert("run")</script>'
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
MAIN = "The paper and this reproduction"
VOID = {"meta", "img", "link", "br", "hr", "input"}


def spread(mean: float | None, sem: float | None = 0.06, runs: int = 6) -> dict[str, Any]:
    return {"mean": mean, "sem": sem, "runs": runs}


def arm(level: float, harm: float) -> dict[str, Any]:
    return {
        "alignment_final": spread(level),
        "fraction_final": spread(level / 4),
        "compliance_rate": spread(harm),
        "refusal_log_odds": spread(-level),
        "over_refusal": spread(0.5),
        "task_loss": spread(1 + level),
        "seconds_per_step": spread(0.25),
    }


def made_up() -> dict[str, Any]:
    """Numbers that no measurement gave; the control `sibling_anchor` and one arm were not run."""
    rows = [
        {"run": run, "step": step, "layer": layer, "prompts": prompts}
        | {
            "alignment": 0.1 * number + 0.001 * step + (layer or 0) + 3 * (prompts == "given"),
            "projection": 1.5,
            "fraction": 0.25,
            "drift_norm": 2.5,
        }
        for number, run in enumerate((HOSTILE, "seed1"))
        for step in (1, 20, 100)
        for layer in (None, 0, 1)
        for prompts in ("held_out", "given")
    ]
    control = {"alignment_final": spread(0.125), "fraction_final": spread(0.03125)}
    return {
        "schema_version": 2,
        "setting": "made up",
        "n_anchors": 1,
        "seeds": [4, 5],
        "layers": [0, 1, 2],
        "layers_in_mean": [0, 1],
        "claims": [
            {
                "organism": "o<0>",
                "level": 2,
                "statement": "Sentence one & only",
                "sentence": "Sentence one & only. α = 0.05.",
                "capped_by": "closure",
                "demands": [
                    {"level": 1, "name": "above isotropic", "holds": True, "figures": "6 of 6"},
                    {"level": 2, "name": "above weight noise", "holds": True, "figures": "p < .01"},
                    {"level": 3, "name": "closure", "holds": None, "figures": ""},
                    {"level": 3, "name": "damage", "holds": False, "figures": "at most -0.5"},
                    {"level": 4, "name": "harm returns", "holds": True, "figures": "p = .03"},
                ],
            },
            {"organism": "o1", "level": 0, "sentence": "Sentence <two>.", "capped_by": "", "demands": []},
        ],
        "interval": [
            {"organism": "o<0>", "measure": "alignment", "estimate": 0.5, "low": 0.375, "high": 0.625},
            {"organism": "o1", "measure": "alignment", "estimate": 0.5, "low": None, "high": None},
        ],
        "damage": [{"organism": "o1", "damage": "4 bits", "alignment": 0.0625, "fraction": -0.5, "score": 3.25}],
        "alignment": rows,
        "summary": {
            "first_step": {"alignment": spread(0.25), "fraction": spread(0.012)},
            "step_20": {"alignment": spread(0.5), "fraction": spread(0.0625)},
            "final": {"alignment": spread(-0.75), "fraction": spread(0.1875)},
        },
        "nulls": {
            "isotropic": {"p99": 0.2, "n_pairs": 24, "n_above": 23},
            "weight_noise": {"p99": 0.4, "n_pairs": 24, "n_above": 7},
        },
        "controls": {
            "stranger": control,
            "sibling_anchor": None,
            "unaligned_twin": {**control, "closure_final": spread(0.375)},
            "continued_alignment": control,
        },
        "arms": {
            "unblocked": arm(0.5, 0.625),
            "penalty": arm(-0.25, 0.125),
            "penalty_margin": arm(-0.5, 0.0625),
            "clamp_random": arm(0.5, 0.6125),
        },
        "history": {
            "witness": {"compliance_rate": 1.0, "refusal_log_odds": -8.0, "over_refusal": 0.0},
            "anchor": {"compliance_rate": 0.05, "refusal_log_odds": 6.0, "over_refusal": 0.25},
        },
        "environment": {"versions": {"torch": "9.9.9"}, "threads": 1, "seconds": {"witness": 12.5}, "of": [1, 2]},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps(made_up()))
    pd.DataFrame({"arm": ["unblocked"], "run": [HOSTILE], "compliance_rate": [0.123456]}).to_csv(tmp_path / "arms.csv")
    (tmp_path / "figures").mkdir()
    for name in ("alignment.png", "alignment.svg", "layers.png"):
        (tmp_path / "figures" / name).write_bytes(PNG if name.endswith("png") else b"<svg xmlns='http://www.w3.org/'/>")
    return tmp_path


class Page(HTMLParser):
    """Tables as {title: rows of cell texts}, and every tag with its attributes; an unclosed tag is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.tables, self.open = text, [], {}, []
        self.heading, self.words, self.paragraphs = "", "", list[str]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables[self.heading] = []
        if tag == "tr":
            self.tables[self.heading].append([])
        self.words = "" if tag in ("td", "th", "h2", "summary", "p", "h1", "a") else self.words

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "p":
            self.paragraphs.append(self.words)
        if tag in ("h2", "summary"):
            self.heading = self.words
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append(self.words)

    def handle_data(self, data: str) -> None:
        self.words += "" if self.open and self.open[-1] == "small" else data.replace("\u00a0", " ")

    def row(self, table: str, first: str) -> list[str]:
        return next(row[1:] for row in self.tables[table] if row[0] == first)


def page_of(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Page:
    results = made_up()
    if change is not None:
        change(results)
        (folder / "results.json").write_text(json.dumps(results))
    return Page(write_report(folder).read_text(encoding="utf-8"))


# -- what stands in it -------------------------------------------------------------------------------------------------


def test_the_report_lies_in_the_folder(folder: Path) -> None:
    assert write_report(folder) == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == {"results.json", "arms.csv", "figures", "report.html"}


def test_paper_and_here_stand_beside_each_other() -> None:
    rows = {row["quantity"]: row for row in paper_table(made_up())}
    assert rows["alignment, first step"] == {
        "quantity": "alignment, first step",
        "paper": "0.429 ± 0.052 (step 1)",
        "here": "0.250 ± 0.060 (6 runs)",
        "fraction": "0.012 ± 0.060",
    }
    assert rows["alignment, step 20"]["paper"] == "0.647 ± 0.021"
    assert rows["alignment, last step"]["here"] == "−0.750 ± 0.060 (6 runs)"
    assert rows["run-step pairs above p99 of: isotropic"]["here"] == "23 of 24"
    assert rows["run-step pairs above p99 of: isotropic"]["paper"] == "24 of 24"
    assert rows["run-step pairs above p99 of: weight noise"]["here"] == "7 of 24"
    assert rows["run-step pairs above p99 of: weight noise"]["paper"] == "not reported"
    assert rows["alignment: penalty"]["paper"] == "−0.211 ± 0.021"
    assert rows["harmfulness: unblocked"]["paper"] == "19.0 ± 4.0 %"
    assert rows["harmfulness: unblocked"]["here"] == "62.5 ± 6.0 % (6 runs)"
    assert rows["harmfulness: penalty"]["paper"] == "8.5 ± 1.5 %"
    assert rows["harmfulness: anchor"]["here"] == "5.0 %"
    assert rows["closure of the gap to the unaligned twin"]["here"] == "0.375 ± 0.060 (6 runs)"


def test_several_anchors_are_said_and_one_run_has_no_sem(folder: Path) -> None:
    results = made_up()
    results["n_anchors"] = 4
    results["summary"]["step_20"]["alignment"] = spread(0.5, None, 1)
    rows = {row["quantity"]: row["here"] for row in paper_table(results)}
    assert rows["alignment, first step"] == "0.250 ± 0.060 (6 runs, 4 anchors)"
    assert rows["alignment, step 20"] == "0.500 (1 run, 4 anchors)"
    assert "means of 4 anchors" in page_of(folder, lambda results: results.update(n_anchors=4)).text
    assert "start from one anchor" in page_of(folder, lambda results: None).text


def test_every_table_has_its_numbers(folder: Path) -> None:
    page = page_of(folder)
    assert page.row(MAIN, "alignment, step 20") == [
        "0.647 ± 0.021",
        "0.500 ± 0.060 (6 runs)",
        "0.062 ± 0.060",
    ]
    assert page.row("Nulls", "weight noise") == ["0.400", "7 of 24"]
    assert page.row("Controls at the last step", "v_rev itself") == ["−0.750 ± 0.060", "0.188 ± 0.060"]
    assert page.row("Controls at the last step", "strangers (witnesses of other histories)") == [
        "0.125 ± 0.060",
        "0.031 ± 0.060",
    ]
    assert "Closure of the gap to the unaligned twin: 0.375 ± 0.060" in page.text
    assert page.row("Arms at the last step", "penalty")[:3] == ["−0.250 ± 0.060", "−0.062 ± 0.060", "12.5 ± 6.0 %"]
    assert page.row("History", "anchor") == ["5.0 %", "6.000", "25.0 %"]
    assert page.row("Every run: alignment", "run") == ["step 1", "step 20", "step 100"]
    assert page.row("Every run: alignment", "seed1") == ["0.101", "0.120", "0.200"]
    assert page.row("Environment", "seconds · witness") == ["12.5"]
    assert page.row("Environment", "versions · torch") == ["9.9.9"]
    assert page.row("Environment", "of") == ["1, 2"]
    assert page.tables["Arms: every run (1 rows)"][1][1:] == ["unblocked", HOSTILE, "0.1235"]


def test_a_long_file_is_cut_and_says_so(folder: Path) -> None:
    title = "Trajectory: every run, step and layer"
    for rows, shown, says in ((1000, 1000, False), (1001, 1000, True)):
        pd.DataFrame({"run": ["a"] * rows, "layer": None}).to_csv(folder / "trajectory.csv", index=False)
        page = page_of(folder)
        assert len(page.tables[f"{title} ({shown} rows)"]) == shown + 1
        assert (f"The first 1000 of {rows} rows; all are in trajectory.csv." in page.text) is says


def test_the_number_of_runs_counts_those_with_a_value() -> None:
    results = {"summary": {"final": {"alignment": {"mean": 0.5, "sem": 0.25, "runs": [0.25, None, 0.75]}}}}
    rows = {row["quantity"]: row["here"] for row in paper_table(results)}
    assert rows["alignment, last step"] == "0.500 ± 0.250 (2 runs)"


def test_arms_of_another_setting_stand_in_the_main_table() -> None:
    rows = {row["quantity"]: row for row in paper_table({"arms": {"penalty_other_data": arm(0.5, 0.25)}})}
    assert rows["harmfulness: penalty other data"]["paper"] == "not reported"
    assert rows["harmfulness: penalty other data"]["here"] == "25.0 ± 6.0 % (6 runs)"
    assert rows["alignment: penalty other data"]["fraction"] == "0.125 ± 0.060"


def test_figures_stand_in_a_readers_order(folder: Path) -> None:
    for name in ("zoo", "fraction", "a_last_one"):
        (folder / "figures" / f"{name}.png").write_bytes(PNG)
    alts = [a["alt"] for tag, a in page_of(folder).tags if tag == "img"]
    assert alts == ["Do the runs head back?", "How far do they get?", "Alignment by layer", "a last one", "zoo"]


def test_the_verdict_is_verbatim(folder: Path) -> None:
    text = page_of(folder).text
    assert '<p class="verdict"><b>o&lt;0&gt;, level 2 of 5.</b> Sentence one &amp; only.</p>' in text
    rest = "α = 0.05. 95 % intervals over runs and prompts: alignment 0.375 to 0.625."
    assert f'<p class="note">{rest}</p>' in text
    assert text.count('class="verdict"') == 1, "the claim on all histories together"
    assert page_of(folder).tables["Each history alone"][1:] == [["o1", "0", "Sentence <two>."]]
    assert 'class="verdict"' not in page_of(folder, lambda results: results.pop("claims")).text


def test_demands_and_damage_are_told(folder: Path) -> None:
    page = page_of(folder)
    demands = page.tables["What each level of the claim demands"]
    assert demands[1:] == [
        ["o<0>", "1", "above isotropic", "yes", "6 of 6"],
        ["o<0>", "2", "above weight noise", "yes", "p < .01"],
        ["o<0>", "3", "closure", "not run", ""],
        ["o<0>", "3", "damage", "no", "at most −0.5"],
        ["o<0>", "4", "harm returns", "yes", "p = .03"],
    ]
    undamaged = {"organism": "o1", "damage": "none", "alignment": None, "fraction": 0.0, "score": 3.5}
    again = page_of(folder, lambda results: results["damage"].append(undamaged))
    assert again.tables["Damage alone"][2] == ["o1", "none", "", "0.000", "3.500"]
    assert page.tables["Damage alone"][1] == ["o1", "4 bits", "0.062", "−0.500", "3.250"]


def test_what_was_not_run_says_so_and_nothing_else_does(folder: Path) -> None:
    page = page_of(folder)
    assert page.row("Controls at the last step", "sibling anchor") == ["not run", "not run"]
    assert page.row(MAIN, "control: sibling anchor, last step") == ["not reported", "not run", ""]
    assert set(page.row("Arms at the last step", "rehearsed refusals")) == {"not run"}
    cells = [row for rows in page.tables.values() for row in rows if "not run" in row]
    assert len(cells) == 3 + 2 * 8 + 1, "seven nulls and a control in two tables each, and one demand"
    absent = [a for tag, a in page.tags if tag == "td" and "absent" in (a.get("class") or "").split()]
    assert len(absent) == sum(row.count("not run") for row in cells)


def test_a_mean_that_is_not_a_number_was_not_run() -> None:
    results = {"summary": {"final": {"alignment": spread(float("nan")), "fraction": spread(None)}}}
    assert {row["here"] for row in paper_table(results)} == {"not run"}


def test_an_empty_results_file_is_a_page_of_not_run(folder: Path) -> None:
    (folder / "results.json").write_text("{}")
    (folder / "arms.csv").unlink()
    page = page_of(folder)
    for title, rows in page.tables.items():
        assert all(set(row[1:]) <= {"not run", "not reported", ""} or title == MAIN for row in rows[1:]), title
    assert {row["here"] for row in paper_table({})} == {"not run"}
    assert page.tables["Every run: alignment"][1] == ["not run"]
    assert "Every row" not in page.text


def test_entries_beyond_the_known_ones_are_shown(folder: Path) -> None:
    def change(results: dict[str, Any]) -> None:
        results["nulls"]["my_null"] = {"p99": 0.5, "n_pairs": 24, "n_above": 1}
        results["arms"]["other_data_penalty"] = arm(0.0, 0.0)

    page = page_of(folder, change)
    assert page.row("Nulls", "my null") == ["0.500", "1 of 24"]
    assert page.row(MAIN, "run-step pairs above p99 of: my null")[1] == "1 of 24"
    assert page.row("Arms at the last step", "other data penalty")[2] == "0.0 ± 6.0 %"


# -- the order of the page, the ladder, the words ----------------------------------------------------------------------


def ladder_of(text: str) -> list[list[str]]:
    """The cells of each rung."""
    inside = re.search(r'<ol class="ladder".*?</ol>', text, re.S)
    rungs = re.findall(r"<li.*?</li>", inside[0], re.S) if inside else []
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<span.*?</span>", rung)] for rung in rungs]


def test_the_ladder_tells_what_caps_each_level(folder: Path) -> None:
    """A demand that failed goes before one that was not run; a level above one that is capped is not reached."""
    page = page_of(folder)
    assert ladder_of(page.text) == [
        ["1", "alignment observed", "yes"],
        ["2", "exceeds a matched null", "yes"],
        ["3", "specific to this history", "no", "damage: at most −0.5 (and 1 more)"],
        ["4", "causal", "not reached"],
        ["5", "durable", "not run"],
    ]
    assert page.text.count('<li class="here" aria-current="true"><span>2</span>') == 1

    def undone(results: dict[str, Any]) -> None:
        results["claims"][0]["demands"] = results["claims"][0]["demands"][:3]

    assert ladder_of(page_of(folder, undone).text)[2] == [
        "3",
        "specific to this history",
        "not run",
        "closure: not run",
    ]

    def too_few(results: dict[str, Any]) -> None:
        undone(results)
        results["claims"][0]["demands"][2]["figures"] = "cannot be reached with 2 strangers"

    assert ladder_of(page_of(folder, too_few).text)[2][2] == "out of reach"
    assert ladder_of(page_of(folder, lambda results: results.pop("claims")).text) == []


FIRST_SCREEN = """v_rev anchor witness run drift alignment fraction null p99 organism harm stranger twin closure damage
released preregistered unit α""".split()


def test_the_words_of_the_first_screen_are_defined_there(folder: Path) -> None:
    page = page_of(folder, lambda results: results["claims"][0].update(organism="together")).text
    header = page[page.index("<header>") : page.index("</header>")]
    defined = {word.lower() for word in re.findall("<b>(.*?)</b>", header)}
    assert [word for word in [*FIRST_SCREEN, "random directions"] if word not in defined] == []
    assert "<b>All histories together, level 2 of 5.</b>" in header


def test_the_page_goes_from_the_verdict_to_the_tables(folder: Path) -> None:
    write_explored(folder)
    text = page_of(folder).text
    marks = (
        'class="verdict"',
        'class="ladder"',
        "Do the runs head back?",
        'data-measure="alignment"',
        "<svg",
        'id="main"',
    )
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.index("<table") > text.index("</ol>"), "no table before the verdict"


def test_every_arm_null_and_control_is_explained_where_it_is_named(folder: Path) -> None:
    text = page_of(folder).text
    arms = re.search(r'<dl class="meanings">(.*?)</dl>', text, re.S)
    assert arms
    assert re.findall(r"<dt>(.*?)</dt>", arms[1]) == [
        ARMS[key] for key in ("unblocked", "penalty", "penalty_margin", "clamp_random")
    ]
    for key, name in (ARMS | NULLS | CONTROLS).items():
        assert f"{escape(name)}<small>{escape(MEANINGS[key])}</small>" in text


def test_the_docs_say_the_same_of_every_arm_null_and_control() -> None:
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert [key for key, words in MEANINGS.items() if f"| `{key}` | {words} |" not in written] == []


def test_a_user_s_own_history_is_no_reproduction(folder: Path) -> None:
    page = page_of(folder, lambda results: results.update(setting="recorded"))
    table = page.tables["This history in numbers"]
    assert table[0] == ["quantity", "here", "fraction of the way back"]
    assert MAIN not in page.tables and "not run" not in {row[1] for row in table}
    assert page.row("This history in numbers", "alignment, step 20") == ["0.500 ± 0.060 (6 runs)", "0.062 ± 0.060"]
    assert "gravlens audit SEQUENCE.toml --out" in page.text


def test_the_command_and_the_citation_can_be_copied(folder: Path) -> None:
    def run(results: dict[str, Any]) -> None:
        results["environment"] |= {"command": "gravlens reproduce --out 'a b'", "gravlens": "9.8.7"}

    assert f'<pre id="command" tabindex="0">gravlens reproduce --out {folder.name}</pre>' in page_of(folder).text
    text = page_of(folder, run).text
    assert '<pre id="command" tabindex="0">gravlens reproduce --out &#39;a b&#39;</pre>' in text
    bibtex = re.search(r'<pre id="bibtex" tabindex="0">(.*?)</pre>', text, re.S)
    assert bibtex and "version = {9.8.7}" in bibtex[1]
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = cff["references"]
    for said in (cff["title"], cff["authors"][0]["name"], str(cff["date-released"].year), paper["title"]):
        assert f"{{{said}}}" in bibtex[1]
    assert f"eprint = {{{paper['identifiers'][0]['value'].removeprefix('arXiv:')}}}" in bibtex[1]


# -- explorers ---------------------------------------------------------------------------------------------------------


def trajectory_rows(arm: str = "unblocked", organisms: tuple[str, ...] = ("one",)) -> pd.DataFrame:
    """Held-out alignment is seed + layer / 10 + step / 1000, on other prompts 9; layer 2 at step 1 is not judged."""
    rows = [
        {"organism": organism, "arm": arm, "run": f"{arm}-{seed}", "step": step, "layer": layer, "prompts": prompts}
        | {"alignment": 9.0 if prompts == "given" else seed + layer / 10 + step / 1000, "fraction": -layer / 4}
        | {"judged": (step, layer) != (1, 2)}
        for organism in organisms
        for seed in (0, 1)
        for step in (1, 20)
        for layer in (0, 1, 2)
        for prompts in ("given", "held_out")
    ]
    return pd.DataFrame(rows)


def write_explored(folder: Path, name: str = "clamp") -> None:
    """A trajectory, its nulls, and a plane, with a run of the given arm."""
    pd.concat([trajectory_rows(name), trajectory_rows()]).to_csv(folder / "trajectory.csv", index=False)
    nulls = pd.DataFrame(
        {"null": "isotropic", "run": "unblocked-0", "step": [1, 20], "layer": [0, 1], "p99": [0.25, 0.5]}
    )
    nulls.to_csv(folder / "nulls.csv", index=False)
    table = plane()
    arms = table.run.map({"a": "unblocked", "b": name})
    table.assign(arm=arms, across_share=0.75, organism=name).to_csv(folder / "plane.csv", index=False)


def test_the_grid_has_means_over_arms_and_every_run() -> None:
    nulls = pd.DataFrame(
        {"null": ["isotropic", "isotropic", "harmless"], "step": 20, "layer": 1, "p99": [0.25, 0.75, 9.0]}
    )
    grid = layer_grid(pd.concat([trajectory_rows("clamp"), trajectory_rows()]), nulls)
    assert grid["layers"] == [2, 1, 0] and grid["steps"] == [1, 20]
    names = [one["name"] for one in grid["series"]]
    assert names == [
        "unblocked: mean of 2 runs",
        "unblocked-0",
        "unblocked-1",
        "clamp: mean of 2 runs",
        "clamp-0",
        "clamp-1",
    ]
    mean, _, second, *_ = grid["series"]
    assert second["alignment"] == pytest.approx([1.201, 1.22, 1.101, 1.12, 1.001, 1.02])
    assert mean["alignment"] == pytest.approx([value - 0.5 for value in second["alignment"]])
    assert mean["fraction"] == [-0.5, -0.5, -0.25, -0.25, 0, 0] and grid["limit"] == {"alignment": 1, "fraction": 0.5}
    assert mean["judged"] == [0, 1, 1, 1, 1, 1]
    assert grid["p99"] == {"isotropic": [None, None, None, 0.5, None, None]}


def test_runs_of_several_organisms_are_told_apart_and_a_hole_is_none() -> None:
    rows = trajectory_rows(organisms=("one", "two"))
    grid = layer_grid(rows[~((rows.step == 20) & (rows.layer == 0))])
    assert [one["name"] for one in grid["series"]][1:] == [
        "one/unblocked-0",
        "one/unblocked-1",
        "two/unblocked-0",
        "two/unblocked-1",
    ]
    assert all(one["alignment"][5] is None for one in grid["series"])


def test_the_columns_are_the_steps_of_the_unblocked_runs() -> None:
    released = trajectory_rows("released_at_20").assign(step=lambda table: table.step + 5)
    assert layer_grid(pd.concat([released, trajectory_rows()]))["steps"] == [1, 20]
    assert layer_grid(released)["steps"] == [6, 25]


def test_of_very_many_runs_the_page_holds_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorers, "MOST_NUMBERS", 10)
    grid = layer_grid(trajectory_rows())
    assert grid["cut"] and [one["name"] for one in grid["series"]] == ["unblocked: mean of 2 runs"]


def test_the_plane_is_drawn_at_equal_scale_from_the_anchor() -> None:
    (drawn,) = planes(plane().assign(arm="unblocked"))
    at = {one["checkpoint"]: np.array([one["x"], one["y"]]) for one in drawn["points"]}
    unit = at["witness"][0] - at["anchor"][0]
    for name, (along, across) in PLACES.items():
        # upwards is where the runs go on average, which is downwards in PLACES; an SVG's y grows downwards
        assert at[name] - at["anchor"] == pytest.approx([along * unit, across * unit], abs=0.25)
    assert at["anchor"].tolist() == pytest.approx([drawn["origin"], drawn["zero"]], abs=0.25)
    assert all(0 < x < 640 and 0 < y < drawn["height"] for x, y in at.values())
    x, y = at["a/2"]
    (way,) = [path["d"] for path in drawn["paths"] if f"L{x} {y}" in path["d"]]
    assert way == "M{} {}L{} {}L{} {}".format(*at["anchor"], *at["a/2"], *at["a/10"])
    assert drawn["layer"] == 7 and drawn["share"] is None


def test_a_folder_without_these_tables_says_how_to_make_them(folder: Path) -> None:
    text = page_of(folder).text
    for name in ("trajectory.csv", "plane.csv"):
        assert f"This folder has no {name}" in text
    assert text.count(f"<code>gravlens reproduce --out {folder.name}</code> writes it") == 2
    write_explored(folder)
    assert "This folder has no" not in page_of(folder).text


def test_hostile_names_in_the_explorers_are_text(folder: Path) -> None:
    name = "'\"></script><script>alert(1)</script>{{ 7 * 7 }}"
    write_explored(folder, name)
    page = page_of(folder)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "<script>alert" not in page.text
    (grid,) = [json.loads(a["data-grid"]) for _, a in page.tags if "data-grid" in a]
    assert {one["arm"] for one in grid["series"]} == {"unblocked", name}
    assert {a["data-arm"] for _, a in page.tags if "data-arm" in a} == {"unblocked", name}


# -- that it stands alone and nothing runs in it -----------------------------------------------------------------------


def test_a_hostile_name_is_text(folder: Path) -> None:
    page = page_of(folder)
    assert HOSTILE not in page.text
    assert page.row("Every run: alignment", HOSTILE) == ["0.001", "0.020", "0.100"]
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_the_page_fetches_nothing(folder: Path) -> None:
    page = page_of(folder)
    addresses = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(addresses) == 2
    assert all(address.startswith("data:image/") for address in addresses)
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|import\(", page.text)
    assert not [attributes for tag, attributes in page.tags if tag == "script" and attributes]
    targets = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    assert {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes} >= set(targets) > {"#demands"}
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_figures_are_embedded_whole_and_once(folder: Path) -> None:
    images = {a["alt"]: a["src"].split(",", 1) for tag, a in page_of(folder).tags if tag == "img"}
    assert images["Alignment by layer"][0] == "data:image/png;base64"
    assert base64.b64decode(images["Alignment by layer"][1]) == PNG
    assert images["Do the runs head back?"][0] == "data:image/svg+xml;base64"
    assert base64.b64decode(images["Do the runs head back?"][1]) == (folder / "figures" / "alignment.svg").read_bytes()


def test_columns_sort_by_numbers_and_every_heading_is_a_button(folder: Path) -> None:
    page = page_of(folder)
    tags = [tag for tag, _ in page.tags]
    copying = [a for tag, a in page.tags if tag == "button" and "data-copy" in a]
    assert len(copying) == 2
    assert tags.count("th") == tags.count("button") - 2 > 0, "without a trajectory.csv there is no heat map"
    values = [float(a["data-value"]) for tag, a in page.tags if tag == "td" and "data-value" in a]
    assert {-0.75, 0.4, 23.0, 0.123456} <= set(values)
    assert ".ariaSort" in page.text
    assert "addEventListener" in page.text


def test_it_suits_the_dark_paper_and_a_phone(folder: Path) -> None:
    page = page_of(folder)
    assert "(prefers-color-scheme: dark)" in page.text
    assert "@media print" in page.text
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.tags]
    boxes = [a for tag, a in page.tags if tag == "div" and a.get("class") == "box"]
    assert len(boxes) == [tag for tag, _ in page.tags].count("table")


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "does not exist"), ("{broken", "cannot be read"), ("", "cannot be read"), ("[1]", "holds a list")],
)
def test_a_missing_or_broken_results_file_is_named_with_the_remedy(
    folder: Path, content: str | None, says: str
) -> None:
    (folder / "results.json").unlink()
    if content is not None:
        (folder / "results.json").write_text(content)
    with pytest.raises(GravlensError, match=rf"results\.json {says}.*gravlens reproduce --out"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_broken_csv_is_named(folder: Path) -> None:
    (folder / "nulls.csv").write_text('null,run\n"a,b\n')
    with pytest.raises(GravlensError, match=r"nulls\.csv cannot be read"):
        write_report(folder)


def test_a_minus_is_as_long_as_a_plus_and_a_hyphen_stays(folder: Path) -> None:
    demand = {"level": 2, "name": "p", "holds": False, "figures": "fraction -1.5 against +0.7, 4-bit"}
    page = page_of(folder, lambda results: results["claims"][1].update(organism="penalty-0", demands=[demand]))
    rows = page.tables["What each level of the claim demands"]
    assert rows[-1] == ["penalty-0", "2", "p", "no", "fraction −1.5 against +0.7, 4-bit"]


def test_paper_takes_short_and_narrow_tables_alone(folder: Path) -> None:
    def printed(rows: int, columns: int) -> bool:
        pd.DataFrame({f"c{i}": [0.5] * rows for i in range(columns)}).to_csv(folder / "nulls.csv", index=False)
        details = [a for tag, a in page_of(folder).tags if tag == "details"]
        return details[-1].get("class") == "printed"

    assert printed(60, 10) and not printed(61, 10) and not printed(60, 11)
