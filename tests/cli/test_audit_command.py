"""gravlens audit: what its options ask for, what it prints, and mistakes as one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from histories import plant, planted_vector, sequence_on_disk, write_rows
from test_cli import gravlens, refused

from gravlens.claims.preregistration import Preregistration
from gravlens.organisms.base import ENGLISH
from gravlens.organisms.recorded import RecordedHistory
from gravlens.organisms.refusal_language import task_examples
from gravlens.studies import audit as studied

CLAIM = {
    "organism": "SEQUENCE",
    "level": 1,
    "statement": "Alignment is observed.",
    "setting": "α = 0.05.",
    "sentence": "Alignment is observed. α = 0.05.",
    "demands": [{"level": 2, "name": "above weight noise", "holds": None, "figures": "not run"}],
}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, anchor = tmp_path_factory.mktemp("history"), tiny.gpt2()
    shares = {"witness": 1.0, "anchor": 0.0, "ft/checkpoint-5": 0.5, "ft/checkpoint-20": 0.6}
    sequence_on_disk(folder, {name: plant(anchor, share * planted_vector(), 1) for name, share in shares.items()})
    write_rows(folder / "data.jsonl", [one._asdict() for one in task_examples()[:20]])
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `studies.audit.audit` was called with; it measures nothing."""
    seen: dict[str, Any] = {}

    def audit(histories: Any, out: Path, **options: Any) -> dict[str, Any]:
        seen.update(histories=histories, out=out, **options)
        lacking = {"organism": "SEQUENCE", "control": "twins", "what": "w", "level": 3, "how": "--make twins"}
        return {"claims": [CLAIM], "missing": [lacking]}

    monkeypatch.setattr(studied, "audit", audit)
    return seen


def only(asked: dict[str, Any]) -> RecordedHistory:
    ((_, found),) = asked["histories"].items()
    return found


def test_the_recorded_runs_are_judged_and_what_is_missing_is_said(history: Path, asked: dict[str, Any]) -> None:
    result = gravlens("audit", history / "SEQUENCE.toml", "--out", history / "results")
    assert result.exit_code == 0, result.output
    assert only(asked).train == () and only(asked).measures == ENGLISH and only(asked).draws == 99
    assert {**asked, "histories": 0} == {
        "histories": 0,
        "out": history / "results",
        "workers": None,
        "preregistration": None,
    }
    assert "Level 1 of 5. Alignment is observed." in result.stdout and "twins (level 3): --make twins" in result.stdout
    assert "then 1 recorded run at steps 5, 20, then 99 draws" in result.stderr


def test_options_say_what_is_trained_and_how(history: Path, asked: dict[str, Any]) -> None:
    options = (
        "--make clamp --make random --directions 3 --learning-rate 0.001 --batch 2 --lora 4 --layer 1 --quick".split()
    )
    said = [
        "--openings",
        "never",
        "--compliances",
        "sure",
        "--data",
        history / "data.jsonl",
        "--json",
        "--workers",
        "2",
        "--threads",
        "3",
    ]
    result = gravlens("audit", history / "SEQUENCE.toml", "--out", history / "results", *options, *said)
    assert result.exit_code == 0, result.output
    found = only(asked)
    assert [arm.name for arm in found.arms] == ["unblocked", "clamp", *(f"clamp_random_{n}" for n in (1, 2, 3))]
    assert (found.recipe.learning_rate, found.recipe.batch, found.recipe.lora, found.recipe.steps) == (0.001, 2, 4, 20)
    assert found.layers_in_mean == (1,) and found.draws == 19 and found.max_prompts == 32
    assert found.threads == 3
    assert found.measures.refusals == found.measures.markers == ("never",) and found.measures.compliances == ("sure",)
    assert json.loads(result.stdout)["missing"][0]["control"] == "twins" and asked["workers"] == 2
    assert "trains 4 (clamp, clamp_random_1, clamp_random_2, clamp_random_3)" in result.stderr


def test_histories_are_named_by_their_files_or_folders(history: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    text = (history / "SEQUENCE.toml").read_text().replace(' = "', f' = "{history}/')
    files = [tmp_path / name for name in ("one/S.toml", "two/S.toml", "other.toml")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    for chosen, names in ((files[:2], ["one", "two"]), (files[1:], ["S", "other"])):
        assert gravlens("audit", *chosen, "--out", tmp_path / "results").exit_code == 0
        assert [*asked["histories"]] == names


def test_a_preregistration_is_written_and_held_against(history: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "preregistration.toml"
    result = gravlens("audit", history / "SEQUENCE.toml", "--preregister", file, "--layer", "2")
    assert result.exit_code == 0 and asked == {}, "nothing is measured"
    assert Preregistration.from_toml(file).layers == (2,)
    result = gravlens("audit", history / "SEQUENCE.toml", "--out", tmp_path / "out", "--preregistration", file)
    assert result.exit_code == 0 and asked["preregistration"] == Preregistration.from_toml(file)
    assert only(asked).layers_in_mean == (2,)


def test_a_plan_measures_nothing(history: Path, asked: dict[str, Any]) -> None:
    result = gravlens("audit", history / "SEQUENCE.toml", "--plan", "--json")
    assert result.exit_code == 0 and asked == {}, result.output
    found = json.loads(result.stdout)
    assert found["now"]["runs"] == 1 and {row["level"] for row in found["plans"]} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--make", "twins"], "--data FILE"),
        (["--make", "strangers"], "several SEQUENCE files"),
        (["--make", "stranger_twins", "--data", "SEQUENCE.toml"], "names no strangers"),
        (["--make", "everything"], "'everything' cannot be trained"),
        (["--preregistration", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_mistakes_are_one_line(history: Path, asked: dict[str, Any], options: list[str], said: str) -> None:
    refused(gravlens("audit", history / "SEQUENCE.toml", "--out", history / "results", *options), said)
    assert asked == {}


@pytest.mark.parametrize(("lost", "said"), [("[runs]\nseed0", "[runs]"), ("held_out", "held_out")])
def test_a_history_that_cannot_be_judged_is_one_line(history: Path, lost: str, said: str) -> None:
    text = (history / "SEQUENCE.toml").read_text()
    file = history / "less.toml"
    file.write_text("".join(line + "\n" for line in text.splitlines() if not line.startswith(lost.split("\n")[-1])))
    refused(gravlens("audit", file, "--out", history / "results"), said)


def test_prompts_below_the_runs_are_told_apart_from_a_run(history: Path) -> None:
    lines = (history / "SEQUENCE.toml").read_text().splitlines()
    moved = [line for line in lines if line.startswith("held_out")]
    file = history / "below.toml"
    file.write_text("\n".join([*(line for line in lines if line not in moved), *moved]))
    refused(gravlens("audit", file, "--out", history / "results"), "below [runs]")
