"""Histories from folders, models and TOML, and what is said of bad ones."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from histories import refused
from torch import nn

from gravlens.core.errors import GravlensError
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import KEYS, Checkpoint, ModelSequence

TOML = """
witness = "base"
anchor = "aligned"
probes = "probes.txt"
held_out = ["c"]
harmless = "probes.txt"
chat_template = "anchor"
[runs]
seed0 = "ft/checkpoint-*"
seed1 = ["ft/checkpoint-20"]
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Empty checkpoint folders: a sequence opens nothing before it is read."""
    for name in ("base", "aligned", "ft/checkpoint-5", "ft/checkpoint-100", "ft/checkpoint-20"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "probes.txt").write_text("a\nb\n")
    (tmp_path / "ft/checkpoint-notes-7.txt").write_text("a file is no checkpoint")
    return tmp_path


def steps_of(sequence: ModelSequence, run: str) -> list[int | None]:
    return [checkpoint.step for checkpoint in sequence.runs[run]]


# -- from folders ------------------------------------------------------------------------------------------------------


def test_folders_make_a_history_ordered_by_the_steps_value(here: Path) -> None:
    runs = {"seed0": str(here / "ft/checkpoint-*")}
    sequence = ModelSequence.from_folders(witness=here / "base", anchor=str(here / "aligned"), runs=runs, probes=["a"])
    assert steps_of(sequence, "seed0") == [5, 20, 100]
    assert [c.name for c in sequence] == ["witness", "anchor", "seed0/5", "seed0/20", "seed0/100"]
    assert sequence.require_probes().texts == ("a",)
    assert sequence.runs["seed0"][0].source == here / "ft/checkpoint-5"


def test_runs_may_be_empty_or_lists(here: Path) -> None:
    pair: dict[str, Any] = {"witness": here / "base", "anchor": here / "aligned"}
    assert len(list(ModelSequence.from_folders(**pair))) == 2
    folders = [here / "ft/checkpoint-100", here / "ft/checkpoint-5"]
    assert steps_of(ModelSequence.from_folders(**pair, runs={"r": folders}), "r") == [5, 100]


def test_a_hub_id_is_kept_as_it_is(here: Path) -> None:
    assert ModelSequence.from_folders(witness="hf://owner/some-model-1.7B", anchor=here / "aligned").witness.source == (
        "hf://owner/some-model-1.7B"
    )


@pytest.mark.parametrize(
    "missing", ["nowhere", "./base/nowhere", "../nowhere/at/all", "base/nowhere", "/nowhere/anchor"]
)
def test_a_missing_folder_is_named(here: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.chdir(here)
    with refused(missing):
        ModelSequence.from_folders(witness="base", anchor=missing)
    with refused(str(Path(missing))):
        ModelSequence.from_folders(witness=Path(missing), anchor="aligned")


@pytest.mark.parametrize(
    ("run", "named"),
    [
        ("ft/nothing-*", "ft/nothing-*"),
        ([], "seed0"),
        (["ft/checkpoint-5", "ft/checkpoint-6"], "ft/checkpoint-6"),
        ("al*", "aligned"),  # no step in the name
        (["ft/checkpoint-5", "other/checkpoint-5"], "[5, 5]"),
        ({5: "ft/checkpoint-5"}, "A dict was given"),
    ],
)
def test_a_bad_run_is_named(here: Path, monkeypatch: pytest.MonkeyPatch, run: Any, named: str) -> None:
    monkeypatch.chdir(here)
    (here / "other/checkpoint-5").mkdir(parents=True)
    with refused(named):
        ModelSequence.from_folders(witness="base", anchor="aligned", runs={"seed0": run})


def test_a_sequence_without_probes_says_how_to_give_them(here: Path) -> None:
    sequence = ModelSequence.from_folders(witness=here / "base", anchor=here / "aligned")
    with pytest.raises(GravlensError, match="probes="):
        sequence.require_probes()


def test_a_chat_template_is_chosen_among_three(here: Path) -> None:
    template: Any = "witness"
    with refused("chat_template='witness'"):
        ModelSequence.from_folders(witness=here / "base", anchor=here / "aligned", chat_template=template)


# -- from models -------------------------------------------------------------------------------------------------------


def test_models_make_a_history_by_step_or_in_order() -> None:
    a, b, c, d = (nn.Linear(1, 1) for _ in range(4))
    sequence = ModelSequence.from_models(witness=a, anchor=b, runs={"given": {20: d, 1: c}, "counted": [c, d]})
    assert steps_of(sequence, "given") == [1, 20] and steps_of(sequence, "counted") == [1, 2]
    assert [checkpoint.source for checkpoint in sequence] == [a, b, c, d, c, d]
    assert sequence.witness.described == "a Linear in memory"


def test_both_constructors_and_the_file_take_the_same_things() -> None:
    doors = (ModelSequence.from_folders, ModelSequence.from_models)
    accepted = [set(inspect.signature(door).parameters) for door in doors]
    assert accepted[0] == accepted[1] == KEYS
    fields = {field.name for field in dataclasses.fields(ModelSequence)}
    assert fields - {"skipped"} == KEYS  # what is skipped is found, not given


@pytest.mark.parametrize("door", ["folders", "models"])
def test_a_tokenizer_a_system_prompt_and_harmless_prompts_come_through_every_door(here: Path, door: str) -> None:
    tokenizer = object()
    rest: dict[str, Any] = {"harmless": ["h"], "tokenizer": tokenizer, "system": "be kind", "chat_template": "anchor"}
    if door == "folders":
        runs = {"r": [here / "ft/checkpoint-5"]}
        sequence = ModelSequence.from_folders(witness=here / "base", anchor=here / "aligned", runs=runs, **rest)
    else:
        a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        sequence = ModelSequence.from_models(witness=a, anchor=b, runs={"r": [a]}, **rest)
    assert sequence.harmless == PromptSet(("h",), "harmless", "be kind") and sequence.system == "be kind"
    assert sequence.chat_template == "anchor"
    assert all(checkpoint.tokenizer is tokenizer for checkpoint in sequence)


def test_the_html_is_escaped() -> None:
    sequence = ModelSequence(Checkpoint("witness", "<i>w</i>"), Checkpoint("anchor", "a"), {"<b>run</b>": ()})
    html = sequence._repr_html_()
    assert "<i>" not in html and "<b>run" not in html and "&lt;b&gt;run" in html


# -- SEQUENCE.toml -----------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "SEQUENCE.toml"
    path.write_text(text)
    return path


def test_toml_says_everything_relative_to_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoy = here / "elsewhere"
    (decoy / "base").mkdir(parents=True)
    monkeypatch.chdir(decoy)
    sequence = ModelSequence.from_toml(os.path.relpath(write(here, TOML)))
    found = [Path(str(checkpoint.source)).resolve() for checkpoint in sequence]
    names = ("base", "aligned", "ft/checkpoint-5", "ft/checkpoint-20", "ft/checkpoint-100", "ft/checkpoint-20")
    assert found == [here / name for name in names]
    assert sequence.probes == PromptSet(("a", "b"), "harmful") and sequence.held_out == PromptSet(("c",), "harmful")
    assert sequence.harmless == PromptSet(("a", "b"), "harmless") and sequence.chat_template == "anchor"
    assert sequence.tokenizer is None
    whole = ModelSequence.from_toml(write(here, 'tokenizer = "aligned"\nsystem = "be kind"\n' + TOML))
    assert Path(str(whole.tokenizer)).resolve() == here / "aligned"
    assert whole.held_out == PromptSet(("c",), "harmful", "be kind")


def test_toml_is_found_in_a_folder_whose_name_looks_like_a_pattern(here: Path) -> None:
    odd = here.rename(here.parent / "runs [v2]")
    assert steps_of(ModelSequence.from_toml(write(odd, TOML)), "seed0") == [5, 20, 100]


def test_toml_never_takes_a_folder_from_where_python_happens_to_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "elsewhere/other").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    with refused("other"):
        ModelSequence.from_toml(write(here, 'witness = "base"\nanchor = "other"'))


PAIR = 'witness = "base"\nanchor = "aligned"\n'


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("witness = ", "not valid TOML"),
        ("", "names no witness and no anchor"),
        ("# nothing\n[runs]\n", "names no witness and no anchor"),
        ('witness = "base"\n', "names no anchor"),
        ('witness = ""\nanchor = "aligned"', "names no witness"),
        ('witness = ["base"]\nanchor = "aligned"', "names no witness"),
        (PAIR + 'prompts = "probes.txt"', "prompts"),
        (PAIR + 'runs = "ft/*"', "runs"),
        (PAIR + "[runs]\nseed0 = 5", "seed0"),
        (PAIR + "[runs]\nseed0 = [5]", "seed0"),
        (PAIR + "probes = 5", "probes"),
        (PAIR + "tokenizer = 5", "tokenizer"),
    ],
)
def test_bad_toml_is_named(here: Path, text: str, named: str) -> None:
    with refused("SEQUENCE.toml", named):
        ModelSequence.from_toml(write(here, text))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('witness = "base"\nanchor = "nowhere"', "nowhere"),
        (PAIR + 'probes = "nowhere.txt"', "nowhere.txt"),
        (PAIR + 'tokenizer = "nowhere"', "nowhere"),
        (PAIR + "probes = []", "probes"),
        (PAIR + '[runs]\nseed0 = "nothing-*"', "nothing-*"),
        (PAIR + 'chat_template = "mine"', "mine"),
    ],
)
def test_what_toml_names_and_is_not_there_is_named(here: Path, text: str, named: str) -> None:
    with refused(named):
        ModelSequence.from_toml(write(here, text))


def test_toml_that_is_no_readable_file_is_named(here: Path) -> None:
    with refused("nowhere.toml"):
        ModelSequence.from_toml(here / "nowhere.toml")
    (here / "binary.toml").write_bytes(b"\xff\xfe")
    with refused("binary.toml"):
        ModelSequence.from_toml(here / "binary.toml")


# -- links, and names that look like patterns --------------------------------------------------------------------------


@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_to_another_checkpoint_of_the_run_is_no_step_of_its_own(here: Path, absolute: bool) -> None:
    for name in ("checkpoint-last", "checkpoint-best"):
        (here / "ft" / name).symlink_to(here / "ft/checkpoint-20" if absolute else "checkpoint-20")
    pair: dict[str, Any] = {"witness": here / "base", "anchor": here / "aligned"}
    listed = [here / "ft/checkpoint-5", str(here / "ft/checkpoint-20"), here / "ft/checkpoint-last"]
    for run, steps in ((here / "ft", [5, 20, 100]), (str(here / "ft/checkpoint-*"), [5, 20, 100]), (listed, [5, 20])):
        assert steps_of(ModelSequence.from_folders(**pair, runs={"r": run}), "r") == steps
    (only,) = ModelSequence.from_folders(**pair, runs={"r": here / "ft/checkpoint-best"}).runs["r"]
    assert only.step == 20
    (here / "ft/checkpoint-lost").symlink_to("checkpoint-7")
    assert steps_of(ModelSequence.from_folders(**pair, runs={"r": here / "ft"}), "r") == [5, 20, 100]


def test_brackets_in_a_folders_name_are_no_pattern(here: Path) -> None:
    for name in ("my[run]/checkpoint-1", "my[run]/checkpoint-2", "myr/checkpoint-9", "a*b/seed[0]/checkpoint-3"):
        (here / name).mkdir(parents=True)
    pair: dict[str, Any] = {"witness": here / "base", "anchor": here / "aligned"}

    def found(run: Any) -> dict[str, list[int | None]]:
        sequence = ModelSequence.from_folders(**pair, runs=run)
        return {name: steps_of(sequence, name) for name in sequence.runs}

    assert found(str(here / "my[run]/checkpoint-*")) == found(str(here / "my[run]")) == {"my[run]": [1, 2]}
    assert found(str(here / "my[run]/checkpoint-[2-9]")) == {"my[run]": [2]}
    assert found(str(here / "my[rR]/checkpoint-*")) == {here.name: [9]}
    assert found({"r": str(here / "a*b/seed[0]/checkpoint-*")}) == {"r": [3]}
    (here / "my[run]/s.toml").write_text('witness = "../base"\nanchor = "../aligned"\n[runs]\nr = "checkpoint-*"\n')
    assert steps_of(ModelSequence.from_toml(here / "my[run]/s.toml"), "r") == [1, 2]
    with refused("matches no folder"):
        found({"r": str(here / "no[run]/checkpoint-*")})
