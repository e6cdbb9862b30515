"""Mistakes in SEQUENCE.toml: a misspelt or misplaced key is told with the nearest one, or where it belongs."""

from pathlib import Path

import pytest
from histories import refused

from gravlens.core.errors import GravlensError
from gravlens.history.sequence import ModelSequence

ENDS = 'witness = "base"\nanchor = "aligned"\n'
RUNS = '[runs]\nseed0 = "ft/checkpoint-*"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("base", "aligned", "ft/checkpoint-5", "ft/checkpoint-20"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "probes.jsonl").write_text('{"prompt": "who?"}\n')
    return tmp_path


def read(folder: Path, text: str) -> ModelSequence:
    path = folder / "SEQUENCE.toml"
    path.write_text(text)
    return ModelSequence.from_toml(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RUNS.replace("runs", "run"), "unknown key [run]: did you mean [runs]?"),
        (f"{RUNS.replace('runs', 'control')}", "unknown key [control]: did you mean [controls]?"),
        ('held_ou = "h.jsonl"\n', "unknown key held_ou: did you mean held_out?"),
        ('run = "ft/*"\n', "unknown key run: did you mean runs?"),
        ('xyz = "h.jsonl"\n', "unknown key xyz."),
        ('[runs]\nseed0 = {folder = "ft/*"}\n', "the run seed0 has the unknown key folder: did you mean folders?"),
        ('[runs.seed0]\nfolders = "ft/*"\nmising = "skip"\n', "seed0 has the unknown key mising: did you mean missing"),
        ('[controls]\nsibling = ["s"]\n', "controls has the unknown key sibling: did you mean siblings?"),
        ('probes = {fil = "probes.jsonl"}\n', "probes has the unknown key fil: did you mean file?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_told_with_the_nearest_one(text: str, said: str, folder: Path) -> None:
    with refused(f"{folder / 'SEQUENCE.toml'}", said):
        read(folder, ENDS + text)


@pytest.mark.parametrize(
    ("text", "key", "header"),
    [
        (ENDS + RUNS + 'probes = "probes.jsonl"\n', "probes", "runs"),
        (ENDS + RUNS + 'held_out = "not_there.jsonl"\n', "held_out", "runs"),
        (ENDS + RUNS + 'harmless = {file = "probes.jsonl", column = "prompt"}\n', "harmless", "runs"),
        (ENDS + RUNS + 'chat_template = "anchor"\n', "chat_template", "runs"),
        (ENDS + RUNS + 'tokenizer = "base"\n', "tokenizer", "runs"),
        (RUNS + ENDS, "witness", "runs"),
        (ENDS + '[runs.seed0]\nfolders = "ft/*"\nprobes = "probes.jsonl"\n', "probes", "runs.seed0"),
        (ENDS + '[controls]\nsiblings = ["base"]\nprobes = "probes.jsonl"\n', "probes", "controls"),
        (ENDS + '[controls.twins]\nseed0 = "ft/*"\nprobes = "probes.jsonl"\n', "probes", "controls.twins"),
        (ENDS + '[chat_template_kwargs]\nthink = false\nprobes = "probes.jsonl"\n', "probes", "chat_template_kwargs"),
    ],
)
def test_a_key_below_a_table_is_to_be_moved_above_it(text: str, key: str, header: str, folder: Path) -> None:
    with pytest.raises(GravlensError) as caught:
        read(folder, text)
    assert f"{key} is below [{header}], so it is read as a key of that table" in caught.value.given
    assert caught.value.remedy.startswith(f"move the line {key} = … above [{header}]")


@pytest.mark.parametrize(
    ("text", "said", "remedy"),
    [
        ('[witness]\npath = "base"\n', "witness is a table", 'witness = "…", above every [table].'),
        (ENDS + '[tokenizer]\npath = "base"\n', "tokenizer is a table", 'tokenizer = "…"'),
        (ENDS + '[runs]\nseed0 = {missing = "skip"}\n', "the run seed0 is a table without folders", "seed0 = "),
        (ENDS + '[runs]\nruns.seed0 = "ft/*"\n', "below [runs], runs.seed0 is runs.runs", "seed0 = …, without runs."),
        (ENDS + '[[runs]]\nseed0 = "ft/*"\n', "runs is not a table", "[runs]"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_form(text: str, said: str, remedy: str, folder: Path) -> None:
    with pytest.raises(GravlensError) as caught:
        read(folder, text)
    assert said in caught.value.given and remedy in caught.value.remedy, str(caught.value)


@pytest.mark.parametrize(
    "runs",
    [
        'runs.harmless = "ft/checkpoint-*"\n',
        'runs.harmless = {folders = "ft/checkpoint-*", missing = "refuse"}\n',
        '[runs]\nharmless = ["ft/checkpoint-5", "ft/checkpoint-20"]\n',
        '[runs.harmless]\nfolders = "ft/checkpoint-*"\n',
    ],
)
def test_a_run_may_be_named_as_a_set_of_prompts(runs: str, folder: Path) -> None:
    found = read(folder, f'{ENDS}probes = "probes.jsonl"\n{runs}')
    assert [one.step for one in found.runs["harmless"]] == [5, 20] and found.harmless is None
