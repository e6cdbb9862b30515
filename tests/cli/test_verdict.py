"""A verdict on the terminal: what the first screen holds, and that it fits 80 columns and 24 lines."""

from typing import Any

import pytest
from rich.console import Console

from gravlens.claims.claim import LEVELS
from gravlens.cli import output, verdict

SENTENCE = "The drift is aligned with v_rev beyond weight noise of the same size, " + "and so on, " * 30 + "at the end."
# level, name, holds
DEMANDS = [
    (1, "the runs agree", True),
    (2, "above weight noise", True),
    (3, "the witness ranks before strangers", False),
    (3, "closure ranks before strangers'", None),
    (4, "harm returns in the unblocked runs", True),
    (4, "a push goes further, harm no lower", None),
    (5, "half the harm is held after release", None),
]
EFFECTS = [
    ("alignment", 0.5, 0.25, 0.75, 6, "anchor"),
    ("fraction", 0.125, None, None, 1, "anchor"),
    ("harm of the anchor", 0.0625, None, None, 1, "anchor"),
    ("harm", 0.75, 0.4, 1.1, 6, "anchor"),
    ("harm, random", 0.7, 0.5, 0.9, 4, "direction"),
]


def results(**changes: Any) -> dict[str, Any]:
    """A results.json with a long sentence; the clamp was not run, and every control is missing."""
    demands = [
        {"level": level, "name": name, "holds": holds, "figures": f"figures of {name}"}
        for level, name, holds in DEMANDS
    ]
    said = {"statement": SENTENCE, "setting": "α = 0.05, " + "mean over the layers, " * 8 + "preregistered."}
    claim = {"organism": "together", "level": 2, **said, "sentence": SENTENCE, "capped_by": "", "demands": demands}
    alone = {**claim, "organism": "organism4", "level": 1, "sentence": "Of this anchor alone."}
    columns = ("effect", "mean", "low", "high", "n", "unit")
    effects = [{"organism": "together", **dict(zip(columns, row, strict=True))} for row in EFFECTS]
    others = [{**row, "organism": "organism4", "mean": 0.0} for row in effects]
    lacking = [
        {"organism": "o", "control": f"control{n}", "level": 3, "what": f"what{n}", "how": f"--make control{n}"}
        for n in range(12)
    ]
    found = {"setting": "refusal", "n_anchors": 6, "claims": [claim, alone], "effects": [*others, *effects]}
    return {**found, "missing": lacking, **changes}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Lines that `print_verdict` prints on a terminal of 80 columns."""
    for module in (output, verdict):
        monkeypatch.setattr(module, "console", Console(width=80, emoji=False))

    def lines(found: dict[str, Any], **options: Any) -> list[str]:
        verdict.print_verdict(found, **options)
        return capsys.readouterr().out.rstrip("\n").split("\n")

    return lines


def test_the_first_screen_fits_a_terminal(screen: Any) -> None:
    shown = screen(results())
    assert len(shown) <= 24 and max(map(len, shown)) <= 80, "\n".join(shown)
    assert shown[0].startswith("Level 2 of 5. The drift is aligned")
    assert SENTENCE in " ".join(shown), "the sentence is told to its end"


def test_harm_without_that_of_the_anchor_is_told_alone(screen: Any) -> None:
    """As an audit does where the anchor's answers are not there: the row is missing, or has no value."""
    found = results()
    for row in found["effects"]:
        row["mean"] = None if row["effect"] == "harm of the anchor" else row["mean"]
    without = {**found, "effects": [row for row in found["effects"] if row["effect"] != "harm of the anchor"]}
    for one in (found, without):
        (line,) = [line for line in screen(one) if line.startswith("  harm  ")]
        assert "75.0 %" in line and "anchor)" not in line and "(anchor" not in line
    (line,) = [line for line in screen(results()) if line.startswith("  harm  ")]
    assert line.endswith("(anchor 6.2 %)")


def test_the_ladder_names_the_first_cap_of_each_level(screen: Any) -> None:
    rungs = {line[1]: line for line in screen(results()) if line[1:2].isdigit() and line[2:3] == " "}
    assert [*rungs] == list("12345")
    assert [LEVELS[int(level)] in line for level, line in rungs.items()] == [True] * 5
    assert [level for level, line in rungs.items() if line.startswith(">")] == ["2"]
    assert rungs["1"].split()[-1] == rungs["2"].split()[-1] == "yes"
    # what failed decides the word, though the other demand was not run
    assert rungs["3"].endswith("NO      the witness ranks before strangers (+1)")
    assert rungs["4"].endswith("not run a push goes further, harm no lower")
    assert rungs["5"].endswith("not run half the harm is held after release")


def test_a_failed_demand_is_named_before_one_that_was_not_run(screen: Any) -> None:
    turned = results()
    turned["claims"][0]["demands"][2:4] = turned["claims"][0]["demands"][3:1:-1]
    (line,) = (line for line in screen(turned) if line[1:].startswith("3 "))
    assert "NO " in line and "the witness ranks before strangers (+1)" in line


def test_five_effects_with_intervals_or_not_run(screen: Any) -> None:
    shown = screen(results())
    at = next(i for i, line in enumerate(shown) if line.startswith("  alignment"))
    rows = [line.split(maxsplit=1) for line in shown[at : at + 5]]
    assert [" ".join(shown[at].split()), " ".join(shown[at + 1].split())] == [
        "alignment 0.500 95 %: 0.250 to 0.750 6 anchors",
        "fraction of the way 0.125 1 anchor",
    ]
    harm, blocked, random = (" ".join(line.split()) for line in shown[at + 2 : at + 5])
    # a rate ends at 0 and 1, though Student's interval does not
    assert harm == "harm 75.0 % 95 %: 40.0 to 100.0 6 anchors (anchor 6.2 %)"
    assert blocked == "harm, blocked not run"
    assert random == "harm, random blocks 70.0 % 95 %: 50.0 to 90.0 4 directions"
    assert len(rows) == 5 and not shown[at + 5].startswith("  ")


def test_without_effects_every_row_is_not_run(screen: Any) -> None:
    shown = screen({"claims": results()["claims"]})
    assert sum(line.endswith("not run") and line.startswith("  ") for line in shown) == 5


def test_what_is_missing_is_one_line_with_the_way_to_more(screen: Any) -> None:
    (line,) = (line for line in screen(results()) if line.startswith("missing"))
    assert line.startswith("missing: control0 (level 3), control1 (level 3)") and line.endswith("; --full")
    assert not any(line.startswith("missing:") for line in screen(results(missing=[])))


def test_the_first_control_above_the_level_is_told_with_its_way(screen: Any) -> None:
    lacking = [
        {"organism": "o", "control": name, "level": level, "what": "w", "how": f"--make {name}"}
        for name, level in (("runs", 1), ("data", 4), ("twins", 3), ("clamp", 4))
    ]
    found = results(missing=lacking)
    assert screen(found)[-1] == "twins (level 3): --make twins"
    found["claims"][0]["level"] = 3
    assert screen(found)[-1] == "data (level 4): --make data"
    found["claims"][0]["level"] = 4
    assert screen(found)[-1].startswith("missing: runs (level 1)")


def test_full_holds_every_table(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (output, verdict):
        monkeypatch.setattr(module, "console", Console(width=200, emoji=False))
    brief, shown = ("\n".join(screen(results(), full=full)) for full in (False, True))
    wanted = [
        "0.429 ± 0.052",
        *(f"figures of {name}" for _, name, _ in DEMANDS),
        *(f"--make control{n}" for n in range(12)),
    ]
    wanted += ["organism4, claim level 1 of 5: Of this anchor alone.", "together, claim level 2 of 5: "]
    assert [text for text in wanted if text not in shown] == []
    assert [text for text in wanted if text in brief] == ["--make control0"], "the first of what is missing"


def test_a_history_of_the_user_is_not_shown_next_to_the_paper(screen: Any) -> None:
    shown = "\n".join(screen(results(setting="recorded"), full=True))
    assert "paper" not in shown and "0.429 ± 0.052" not in shown
