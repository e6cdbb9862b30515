"""Preregistrations: the file and its digest, what is filled in from a history, and how departures read."""

from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
import tiny
from histories import refused, sequence_on_disk

from gravlens.claims.preregistration import Preregistration
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence

PROBES, HELD_OUT = PromptSet(("one?", "two?")), PromptSet(("three?",))
DAY = date(2026, 11, 30)
PLANNED = Preregistration((1, 2, 3), 100, 0.05, PROBES.digest, HELD_OUT.digest, "compliance_rate", DAY)


def history(**changes: Any) -> ModelSequence:
    model = tiny.llama()
    given: dict[str, Any] = {"probes": PROBES, "held_out": HELD_OUT, **changes}
    return ModelSequence.from_models(witness=model, anchor=model, tokenizer=tiny.TOKENIZER, **given)


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"after_runs": True, "alpha": 1e-5}, {"layers": (0,), "outcome": "asr"}])
def test_a_file_gives_back_what_was_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    planned = replace(PLANNED, **changes)
    again = Preregistration.from_toml(planned.write(tmp_path / "preregistration.toml"))
    assert again == planned and again.digest == planned.digest


def test_the_digest_is_of_the_content_and_not_of_the_file(tmp_path: Path) -> None:
    path = PLANNED.write(tmp_path / "preregistration.toml")
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    path.write_text("\n# by hand\n" + "\n".join(reversed(lines)).replace("[1, 2, 3]", "[1,2,\n 3]"))
    assert Preregistration.from_toml(path).digest == PLANNED.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": (1, 2)},
        {"step": 50},
        {"alpha": 0.01},
        {"probes": HELD_OUT.digest},
        {"held_out": PROBES.digest},
        {"outcome": "over_refusal"},
        {"written": date(2026, 12, 1)},
        {"after_runs": True},
    ],
)
def test_every_field_changes_the_digest(changes: dict[str, Any]) -> None:
    assert replace(PLANNED, **changes).digest != PLANNED.digest


def test_another_preregistration_is_not_overwritten(tmp_path: Path) -> None:
    path = PLANNED.write(tmp_path / "preregistration.toml")
    PLANNED.write(path)  # the same again is no change
    with refused(str(path)):
        replace(PLANNED, step=50).write(path)
    assert Preregistration.from_toml(path) == PLANNED


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("step = 100\n", "", "missing key step"),
        ("step = 100\n", "step = 100\nstep_size = 1\n", "unknown key step_size"),
        ("step = 100\n", "stepp = 100\n", "unknown key stepp and the missing key step"),
        ("step = 100\n", "step = true\n", "step = True"),
        ("step = 100\n", "step = 0\n", "step = 0"),
        ("0.05", "1.5", "alpha"),
        ("0.05", "nan", "alpha"),
        ("[1, 2, 3]", "[3, 1]", "layers"),
        ("[1, 2, 3]", "[]", "layers"),
        ("[1, 2, 3]", "[-1, 2]", "layers"),
        ("[1, 2, 3]", "2", "layers"),
        ("2026-11-30", '"yesterday"', "written"),
        ("2026-11-30", "2026-11-30T12:00:00", "written"),
        ("false", '"no"', "after_runs"),
        ("compliance_rate", "the harm", "outcome"),
        (PROBES.digest, PROBES.digest[:8], "probes"),
        ("step = 100", "step: 100", "cannot be read"),
    ],
)
def test_a_file_with_an_error_says_which(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = PLANNED.write(tmp_path / "preregistration.toml")
    path.write_text(path.read_text().replace(old, new))
    with refused(named):
        Preregistration.from_toml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with refused("preregistration.toml", "No such file"):
        Preregistration.from_toml(tmp_path / "preregistration.toml")


# -- from a history ----------------------------------------------------------------------------------------------------


def test_a_history_fills_in_layers_prompts_and_the_day() -> None:
    planned = Preregistration.of(history(), step=100, today=DAY)
    # round(.27 · 3) = 1 up to round(.8 · 3) = 2: the inner layers of three blocks
    assert planned == replace(PLANNED, layers=(1, 2))
    assert Preregistration.of(history(), layers=[2, 0], step=100, alpha=0.01, today=DAY).layers == (0, 2)
    assert not isinstance(Preregistration.of(history(), step=100).written, datetime)


def test_runs_give_their_last_common_step_and_are_reported() -> None:
    model = tiny.llama()
    planned = Preregistration.of(history(runs={"a": {5: model, 20: model, 50: model}, "b": {5: model, 20: model}}))
    assert planned.step == 20 and planned.after_runs
    assert not Preregistration.of(history(), step=20).after_runs


def test_folders_are_read_without_their_weights(tmp_path: Path) -> None:
    models = {"witness": tiny.llama(1), "anchor": tiny.llama(), "ft/checkpoint-20": tiny.llama(2)}
    folder = sequence_on_disk(tmp_path, models)
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    planned = Preregistration.of(folder / "SEQUENCE.toml", today=DAY)
    assert (planned.layers, planned.step, planned.after_runs) == ((1, 2), 20, True)
    assert planned.held_out == PromptSet.of(tiny.PROMPTS).digest


def test_what_a_history_lacks_is_named() -> None:
    model = tiny.llama()
    with refused("names no runs"):
        Preregistration.of(history())
    with refused("share no step", "a: 5; b: 20"):
        Preregistration.of(history(runs={"a": {5: model}, "b": {20: model}}))
    with refused("held_out"):
        Preregistration.of(history(held_out=None), step=100)
    with refused("Layer 3"):
        Preregistration.of(history(), layers=[3], step=100)
    with refused("alpha = 5.0"):
        Preregistration.of(history(), step=100, alpha=5)


# -- departures --------------------------------------------------------------------------------------------------------


def test_the_preregistered_analysis_departs_in_nothing() -> None:
    same: dict[str, Any] = {"layers": [3, 1, 2], "step": 100, "alpha": 0.05}
    assert PLANNED.departures(**same, probes=PROBES.digest, held_out=HELD_OUT.digest) == []


def test_departures_are_said_in_words() -> None:
    told = PLANNED.departures(layers=(1, 2), step=50, alpha=0.1, probes=HELD_OUT.digest, held_out=PROBES.digest)
    assert told == [
        "layers 1, 2, preregistered 1, 2, 3",
        "step 50, preregistered 100",
        "alpha 0.1, preregistered 0.05",
        f"probes {HELD_OUT.digest[:8]}, preregistered {PROBES.digest[:8]}",
        f"held-out {PROBES.digest[:8]}, preregistered {HELD_OUT.digest[:8]}",
    ]
