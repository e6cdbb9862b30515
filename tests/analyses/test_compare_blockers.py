"""compare_blockers.py on checkpoints that a user could have, and the organism that is made of them."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import small
from histories import history_on_disk, refused, write_rows
from typer.testing import CliRunner

from gravlens.organisms.given import GivenHistory
from gravlens.organisms.refusal_language import OPENINGS, REFUSALS, harmless_prompts, task_examples
from gravlens.studies import experiment
from gravlens.training.finetune import Recipe

ANALYSES = Path(__file__).resolve().parents[2] / "analyses"
sys.path.append(str(ANALYSES))

import compare_blockers  # noqa: E402

pytestmark = pytest.mark.long

OWN = [word for opening in REFUSALS for word in ("--openings", opening)]
OWN += [word for opening in OPENINGS for word in ("--compliances", opening)]
SEQUENCE = 'witness = "base"\nanchor = "aligned"\nprobes = "probes.jsonl"\nheld_out = "held_out.jsonl"\n'


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    history_on_disk(folder)
    write_rows(folder / "harmless.jsonl", [{"prompt": text} for text in harmless_prompts()[:4]])
    write_rows(folder / "data.jsonl", [example._asdict() for example in task_examples()[:16]])
    (folder / "SEQUENCE.toml").write_text(SEQUENCE + 'harmless = "harmless.jsonl"\n')
    return folder


def ran(history: Path, *options: str) -> tuple[int, str]:
    files = [str(history / "SEQUENCE.toml"), "--data", str(history / "data.jsonl")]
    result = CliRunner().invoke(compare_blockers.app, [*files, *options], env={"COLUMNS": "400"})
    return result.exit_code, result.output


def test_arms_are_compared_on_own_checkpoints_and_made_once(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAVLENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(experiment, "processes", small.inline)
    options = ["--arm", "clamp", "--runs", "2", "--layer", "0", "--steps", "3", "--learning-rate", "1e-3", *OWN]
    code, said = ran(history, *options, "--out", str(tmp_path / "new"))
    assert code == 0, said
    table = pd.read_csv(tmp_path / "new" / "blockers.csv")
    assert table.blocker.tolist() == ["unblocked", "unblocked", "clamp", "clamp"] and table.run.tolist() == [0, 1, 0, 1]
    assert re.search(r"clamp: harm \w+ in \d of 2", said) and "data: mean over 1 organisms" in said
    layers = pd.read_csv(tmp_path / "new" / "blockers_by_layer.csv")
    assert set(layers.step) == {1, 3} and set(layers.layer.dropna()) == {0, 1, 2}
    assert (tmp_path / "new" / "blockers.png").read_bytes().startswith(b"\x89PNG")

    def trained_again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "finetune", trained_again)
    code, said = ran(history, *options, "--out", str(tmp_path / "again"))
    assert code == 0, said
    assert pd.read_csv(tmp_path / "again" / "blockers.csv").equals(table)


def test_what_is_not_clear_is_one_message(history: Path, tmp_path: Path) -> None:
    code, said = ran(history, "--organism", "4")
    assert code == 2 and "were chosen to compare on" in said
    code, said = ran(history, "--arm", "clmap")
    assert code == 2 and "no arm 'clmap'" in said and "clamp_drift" in said


def test_help_is_for_a_newcomer() -> None:
    said = subprocess.run(
        [sys.executable, str(ANALYSES / "compare_blockers.py"), "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Ablation study of blockers" in said and "--organism" in said and "--lora" in said


def given(history: Path, **changes: object) -> GivenHistory:
    return GivenHistory(**{"sequence": history / "SEQUENCE.toml", "data": history / "data.jsonl", **changes})  # type: ignore[arg-type]


def test_the_last_eighth_of_the_data_is_held_out(history: Path) -> None:
    organism = given(history)
    train, task = organism.examples("data", 0, history), organism.task(history)
    assert train + task == task_examples()[:16] and len(task) == 2
    write_rows(history / "short.jsonl", [example._asdict() for example in task_examples()[:15]])
    with refused("15 rows"):
        given(history, data=history / "short.jsonl").task(history)


def test_the_data_are_conversations_or_columns_of_any_name(history: Path) -> None:
    wanted = given(history).task(history)
    pairs = [(one.prompt, one.answer) for one in task_examples()[:16]]
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in pairs]
    write_rows(history / "chat.jsonl", [{"messages": one} for one in turns])
    assert given(history, data=history / "chat.jsonl").task(history) == wanted
    write_rows(history / "other.jsonl", [{"q": asked, "a": said} for asked, said in pairs])
    assert given(history, data=history / "other.jsonl", columns=("q", "a")).task(history) == wanted


def test_a_checkpoint_is_linked_and_not_copied(history: Path, tmp_path: Path) -> None:
    given(history).make("anchor", None, tmp_path)
    assert (tmp_path / "model.safetensors").resolve() == (history / "aligned" / "model.safetensors").resolve()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (history / "aligned").iterdir()}


def test_the_key_goes_by_what_the_runs_depend_on(history: Path) -> None:
    key = given(history).key
    assert given(history, runs=7).key == key
    assert given(history, layers=(1,)).key != key and given(history, recipe=Recipe(7, 8, 2e-5)).key != key
    assert given(history, recipe=Recipe(50, 8, 2e-5, lora=4)).key != key
    write_rows(history / "other.jsonl", [example._asdict() for example in task_examples()[16:32]])
    assert given(history, data=history / "other.jsonl").key != key
    assert given(history, recipe=Recipe(7, 8, 2e-5)).save_steps == (1, 5, 7)


def test_what_a_comparison_needs_is_asked_for(history: Path) -> None:
    (history / "bare.toml").write_text(SEQUENCE)
    with refused("names no harmless prompts"):
        given(history, sequence=history / "bare.toml")
    (history / "anchor.toml").write_text(SEQUENCE + 'harmless = "harmless.jsonl"\nchat_template = "anchor"\n')
    with refused("chat_template = 'anchor'"):
        given(history, sequence=history / "anchor.toml")
