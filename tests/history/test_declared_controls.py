"""Controls of a history: what [controls] says is what Python says, paths are the file's, mistakes are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import adapter
from histories import moved, refused, write_rows

from gravlens.history.controls import NO_CONTROLS, PAIRED, Controls, RandomClamp
from gravlens.history.sequence import Checkpoint, ModelSequence, Run
from gravlens.history.sources import resolve

HEAD = 'witness = "base"\nanchor = "aligned"\nprobes = "probes.jsonl"\n[runs]\nrun0 = "ft/run0/checkpoint-*"\n'
EVERY = """
[controls]
siblings = ["sibling"]
strangers = ["stranger"]
[controls.twins]
run0 = "twins/run0"
[controls.stranger_twins.stranger]
run0 = ["stranger_twin/checkpoint-5"]
[controls.continued]
more = "ft/run0/checkpoint-*"
[controls.clamp]
run0 = {folders = ["ft/run0/checkpoint-5", "ft/run0/checkpoint-9"], missing = "skip"}
[controls.random.1]
directions = "random1.safetensors"
run0 = "ft/run0/checkpoint-*"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an aligned model, a stranger, and adapters over each; prompts."""
    home = tmp_path_factory.mktemp("history")
    base = tiny.llama(0)
    models = {"base": base, "aligned": moved(base, seed=1), "sibling": moved(base, seed=2), "stranger": tiny.llama(5)}
    for name, model in models.items():
        tiny.save(model, home / name)
    for step in (5, 20):
        adapter(home / "aligned", home / f"ft/run0/checkpoint-{step}", step)
        adapter(home / "base", home / f"twins/run0/checkpoint-{step}", step)
    adapter(home / "stranger", home / "stranger_twin/checkpoint-5")
    write_rows(home / "probes.jsonl", [{"prompt": text} for text in tiny.PROMPTS])
    return home


def read(folder: Path, controls: str, head: str = HEAD) -> ModelSequence:
    path = folder / "controls.toml"
    path.write_text(head + controls)
    return ModelSequence.from_toml(path)


def every(controls: Controls) -> dict[str, Checkpoint]:
    """All checkpoints of controls by their names."""
    found: dict[str, Checkpoint] = {}

    def one(name: str, source: Any) -> Any:
        found[name] = source
        return source

    def run(name: str, checkpoints: Any, _start: Any) -> Any:
        found.update({f"{name}/{c.step}": c for c in checkpoints})
        return checkpoints

    controls.mapped(one, run)
    return found


def test_paths_are_relative_to_the_file_and_steps_are_those_of_the_folders(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sequence = read(folder, EVERY)
    found = {
        name: Path(str(one.source)).relative_to(folder).as_posix() for name, one in every(sequence.controls).items()
    }
    assert found == {
        "controls.siblings.1": "sibling",
        "controls.strangers.stranger": "stranger",
        "twins.run0/5": "twins/run0/checkpoint-5",
        "twins.run0/20": "twins/run0/checkpoint-20",
        "stranger_twins.stranger.run0/5": "stranger_twin/checkpoint-5",
        "continued.more/5": "ft/run0/checkpoint-5",
        "continued.more/20": "ft/run0/checkpoint-20",
        "clamp.run0/5": "ft/run0/checkpoint-5",
        "random.1.run0/5": "ft/run0/checkpoint-5",
        "random.1.run0/20": "ft/run0/checkpoint-20",
    }
    assert sequence.controls.random["1"].directions == folder / "random1.safetensors"
    assert list(sequence.skipped) == [f"controls.clamp.run0: {folder / 'ft/run0/checkpoint-9'}"]
    assert "strangers: 1" in sequence.controls.described()


def test_an_adapter_is_added_to_what_its_run_starts_from(folder: Path) -> None:
    starts = {"twins": "base", "stranger_twins": "stranger", "continued": "aligned", "clamp": "aligned"}
    found = every(read(folder, EVERY).controls)
    for table, start in starts.items():
        (first, *_) = [one for name, one in found.items() if name.startswith(table)]
        assert resolve(first).base.path.resolve() == (folder / start).resolve()
    wrong = '[controls.twins]\nrun0 = "ft/run0/checkpoint-*"\n'  # trained over the anchor
    (first, *_) = every(read(folder, wrong).controls).values()
    with refused("checkpoint-5", "aligned"):
        resolve(first)


def test_python_says_the_same_as_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    made = Controls(
        siblings=["sibling"],
        strangers={"stranger": "stranger"},
        twins={"run0": "twins/run0"},
        stranger_twins={"stranger": {"run0": ["stranger_twin/checkpoint-5"]}},
        continued={"more": "ft/run0/checkpoint-*"},
        clamp={"run0": Run(["ft/run0/checkpoint-5", "ft/run0/checkpoint-9"], missing="skip")},
        random={"1": RandomClamp("random1.safetensors", {"run0": "ft/run0/checkpoint-*"})},
    )
    sequence = ModelSequence.from_folders(
        witness="base", anchor="aligned", runs={"run0": "ft/run0/checkpoint-*"}, controls=made
    )

    def told(found: ModelSequence) -> dict[str, Any]:
        return {name: (one.name, Path(str(one.source)).resolve()) for name, one in every(found.controls).items()}

    assert told(sequence) == told(read(folder, EVERY))
    later = replace(sequence, controls=NO_CONTROLS)
    assert every(later.controls) == {} and told(replace(later, controls=made)) == told(sequence)
    assert told(replace(sequence, runs={})) == told(sequence)  # a part of a history keeps its controls


def test_models_in_memory_may_be_controls(folder: Path) -> None:
    model, twin = tiny.llama(0), (Checkpoint("t/5", folder / "base", 5),)
    made = Controls(strangers={"s": model}, twins={"r": twin})
    sequence = ModelSequence.from_models(
        witness=tiny.llama(1), anchor=tiny.llama(2), runs={"r": [model]}, controls=made
    )
    assert sequence.controls.strangers["s"].source is model  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert [one.step for one in sequence.controls.twins["r"]] == [5]


def test_controls_are_read_with_the_chat_template_of_the_history(folder: Path) -> None:
    found = every(read(folder, EVERY, 'chat_template = "anchor"\n' + HEAD).controls)
    assert {getattr(one.template, "name", one.template) for one in found.values()} == {"anchor"}


def test_every_paired_table_is_a_field_and_a_key(folder: Path) -> None:
    for table in PAIRED:
        start = "twins/run0" if table == "twins" else "ft/run0/checkpoint-*"
        found = read(folder, f'[controls.{table}]\nrun0 = "{start}"\n').controls
        assert [one.step for one in getattr(found, table)["run0"]] == [5, 20]


@pytest.mark.parametrize(
    ("controls", "named"),
    [
        ('[controls]\nsibling = ["sibling"]', ["unknown key sibling"]),
        ('[controls]\nsiblings = "sibling"', ["controls.siblings"]),
        ("[controls]\nstrangers = [1]", ["controls.strangers"]),
        ('[controls]\ntwins = "twins/run0"', ["controls.twins"]),
        ("[controls.clamp]\nrun0 = 3", ["controls.clamp.run0"]),
        ('[controls.clamp]\nrun0 = {folder = "ft"}', ["controls.clamp.run0"]),
        ('[controls.clamp]\nrun9 = "ft/run0/checkpoint-*"', ["controls.clamp", "run9"]),
        ('[controls.stranger_twins.other]\nrun0 = "stranger_twin"', ["stranger_twins", "other"]),
        ('[controls.random.1]\nrun0 = "ft/run0/checkpoint-*"', ["controls.random.1"]),
        ('[controls.clamp]\nrun0 = "nowhere/checkpoint-*"', ["controls.clamp.run0", "no folder"]),
        ('[controls]\nsiblings = ["nowhere"]', ["nowhere does not exist"]),
        ('[controls.continued]\n"../more" = "ft/run0"', ["../more"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(folder: Path, controls: str, named: list[str]) -> None:
    with refused(*named):
        read(folder, controls + "\n")


def test_an_unknown_key_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(ValueError, match="siblings, strangers, twins, stranger_twins, continued, clamp"):
        read(folder, "[controls]\ntwin = 1\n")


def test_two_strangers_of_one_name_need_names(folder: Path) -> None:
    with refused("one name", "a/witness", "b/witness"):
        read(folder, '[controls]\nstrangers = ["a/witness", "b/witness"]\n')
    named = read(folder, '[controls.strangers]\na = "stranger"\nb = "sibling"\n').controls
    assert [one.name for one in every(named).values()] == ["controls.strangers.a", "controls.strangers.b"]
