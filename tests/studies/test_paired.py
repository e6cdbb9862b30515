"""A blocked run beside an unblocked one, held against the same runs made by hand."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import EXAMPLES
from histories import moved, refused, sequence_on_disk, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import UpdateProjection
from gravlens.cli import app
from gravlens.history.encoding import encode, encode_example
from gravlens.history.prompts import Example
from gravlens.history.sequence import ModelSequence
from gravlens.models.placement import Placement
from gravlens.studies.inputs import vrev_of
from gravlens.studies.paired import Block, Paired, Training, block_beside
from gravlens.training.finetune import Recipe, finetune

TRAINING = Training(Recipe(steps=4, batch=2, learning_rate=3e-3), save_steps=(2, 9), seed=3)
HELD = (1, 2)  # inner_of(3)


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> ModelSequence:
    folder = tmp_path_factory.mktemp("history")
    anchor = tiny.llama(0)
    models = {"anchor": anchor, "witness": moved(anchor, seed=1), "ft/checkpoint-1": anchor}
    return ModelSequence.from_toml(sequence_on_disk(folder, models) / "SEQUENCE.toml")


@pytest.fixture(scope="module")
def pair(sequence: ModelSequence, tmp_path_factory: pytest.TempPathFactory) -> tuple[Paired, Path]:
    out = tmp_path_factory.mktemp("pair") / "new"
    return block_beside(sequence, EXAMPLES, out=out, block=Block("clamp", 300.0), training=TRAINING), out


def row(pair: Paired, run: str) -> Any:
    (found,) = pair.table[pair.table["run"] == run].to_dict("records")
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.long
def test_both_runs_are_those_of_finetune_on_all_but_the_last_eighth(
    pair: tuple[Paired, Path], sequence: ModelSequence, tmp_path: Path
) -> None:
    found, out = pair
    assert (found.n_trained, found.n_task, len(EXAMPLES)) == (11, 1, 12)
    clamp = Penalty(vrev_of(sequence).at(HELD), sequence.require_probes(), side="both", strength=300.0)
    for name, blocker in {"unblocked": None, "blocked": clamp}.items():
        finetune(
            sequence.anchor,
            EXAMPLES[:11],
            out=tmp_path / name,
            recipe=TRAINING.recipe,
            save_steps=(2, 4),
            blocker=blocker,
            seed=3,
        )
        for step in (2, 4):
            made, wanted = (weights(at / name / f"checkpoint-{step}") for at in (out, tmp_path))
            assert all(torch.equal(made[key], wanted[key]) for key in wanted), (name, step)
    assert sorted(path.name for path in (out / "blocked").glob("*")) == [
        "checkpoint-2", "checkpoint-4", "finetune.json", "log.csv", "run.json",
    ]  # fmt: skip
    assert set(found.trajectory.table["step"]) == {2, 4}


def test_the_figures_are_those_of_the_checkpoints(pair: tuple[Paired, Path], sequence: ModelSequence) -> None:
    found, out = pair
    folders = {name: out / name / "checkpoint-4" for name in ("unblocked", "blocked")}
    folders |= {name: Path(str(getattr(sequence, name).source)) for name in ("anchor", "witness")}
    models: dict[str, Any] = {name: AutoModelForCausalLM.from_pretrained(at).eval() for name, at in folders.items()}

    def mean_states(name: str, prompts: Any) -> np.ndarray:
        """[layer, d_model] of Hugging Face alone, of layer 1 (below the last, which is post-norm there)."""
        ids = encode(tiny.TOKENIZER, prompts)
        with torch.no_grad():
            hidden = [models[name](torch.tensor([one]), output_hidden_states=True).hidden_states for one in ids]
        return np.mean([states[2][0, -1].double().numpy() for states in hidden], axis=0)

    way = mean_states("witness", sequence.probes) - mean_states("anchor", sequence.probes)
    for name in ("unblocked", "blocked"):
        drift = mean_states(name, sequence.held_out) - mean_states("anchor", sequence.held_out)
        table = found.trajectory.table
        at = table[(table.run == name) & (table.step == 4) & (table.layer == 1) & (table.prompts == "held_out")]
        assert at["fraction"].item() == pytest.approx(drift @ way / (way @ way), rel=1e-3, abs=1e-6)
        mean = found.trajectory.layer_mean
        mean = mean[(mean.run == name) & (mean.step == 4)].set_index("prompts")
        assert row(found, name)["fraction"] == mean.loc["held_out", "fraction"]
        assert row(found, name)["alignment"] == mean.loc["held_out", "alignment"]
        assert row(found, name)["fraction_probes"] == mean.loc["given", "fraction"]
    for name in ("anchor", "unblocked", "blocked"):
        ids, labels = encode_example(tiny.TOKENIZER, EXAMPLES[-1])
        with torch.no_grad():
            loss = models[name](torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert row(found, name)["task_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_block_holds(pair: tuple[Paired, Path]) -> None:
    found, out = pair
    free, held = row(found, "unblocked"), row(found, "blocked")
    assert abs(held["fraction_probes"]) < 0.5 * abs(free["fraction_probes"])
    assert free["task_loss"] < row(found, "anchor")["task_loss"] and row(found, "anchor")["fraction"] == 0
    assert held["folder"] == str(out / "blocked" / "checkpoint-4") and held["seconds_per_step"] > 0


def test_what_is_complete_is_not_made_again_and_nothing_is_written_over(
    pair: tuple[Paired, Path], sequence: ModelSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, out = pair
    monkeypatch.setattr(
        import_module("gravlens.studies.paired"), "finetune", lambda *_, **__: pytest.fail("trained again")
    )
    again = block_beside(sequence, EXAMPLES, out=out, block=Block("clamp", 300.0), training=TRAINING)
    assert again.table.equals(found.table)
    for block, training, named in [
        (Block("clamp", 30.0), TRAINING, "blocked"),
        (Block("clamp", 300.0), replace(TRAINING, seed=4), "unblocked"),
    ]:
        with refused(named, "holds another run"):
            block_beside(sequence, EXAMPLES, out=out, block=block, training=training)
    with refused("unblocked", "holds another run"):
        other = [Example(EXAMPLES[0].prompt, EXAMPLES[1].answer), *EXAMPLES[1:]]
        block_beside(sequence, other, out=out, block=Block("clamp", 300.0), training=TRAINING)


def test_a_stopped_pair_goes_on(sequence: ModelSequence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unblocked run is complete, the blocked one was stopped before it wrote anything whole."""
    module, trained = import_module("gravlens.studies.paired"), []

    def stop_at_the_second(start: Any, examples: Any, *, out: Path, **rest: Any) -> Any:
        trained.append(out.name)
        if trained == ["unblocked", "blocked"]:
            raise KeyboardInterrupt
        return finetune(start, examples, out=out, **rest)

    monkeypatch.setattr(module, "finetune", stop_at_the_second)
    short = Training(Recipe(steps=1, batch=2), save_steps=())
    with pytest.raises(KeyboardInterrupt):
        block_beside(sequence, EXAMPLES, out=tmp_path, training=short)
    block_beside(sequence, EXAMPLES, out=tmp_path, training=short)
    assert trained == ["unblocked", "blocked", "blocked"]


def test_a_folder_of_someone_elses_checkpoints_is_left_alone(sequence: ModelSequence, tmp_path: Path) -> None:
    (tmp_path / "unblocked" / "checkpoint-7").mkdir(parents=True)
    with refused("holds another run"):
        block_beside(sequence, EXAMPLES, out=tmp_path, training=TRAINING)
    assert [path.name for path in tmp_path.rglob("*")] == ["unblocked", "checkpoint-7"]


def test_what_a_block_is_made_of(sequence: ModelSequence) -> None:
    probes, place = sequence.require_probes(), Placement()
    vs = Block().directions(sequence, place)
    assert vs.layers == HELD
    assert Block(layers=(2, 0)).directions(sequence, place).layers == (0, 2)
    default = Block().along(vs, probes)
    assert isinstance(default, Penalty) and (default.side, default.strength, default.margin) == ("one", 30.0, 0.0)
    pushed = Block("penalty", 3.0, 0.1).along(vs, probes)
    assert isinstance(pushed, Penalty) and (pushed.strength, pushed.margin) == (3.0, 0.1)
    assert isinstance(Block("projection").along(vs, probes), UpdateProjection)
    with refused("strength was given for a projection"):
        Block("projection", strength=1.0)
    with refused("margin was given for a clamp"):
        Block("clamp", margin=0.0)
    with refused("1 example"):
        block_beside(sequence, EXAMPLES[:1], out=Path("nowhere"))


@pytest.mark.long
def test_gravlens_block_prints_and_saves_both(sequence: ModelSequence, tmp_path: Path) -> None:
    home = Path(str(sequence.anchor.source)).parent
    write_rows(tmp_path / "data.jsonl", [example._asdict() for example in EXAMPLES])
    options = "--kind projection --layer 1 --steps 2 --batch 2 --lr 0.003 --save-step 1 --seed 3 --json".split()
    asked = ["block", home / "SEQUENCE.toml", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "ft"]
    arguments = [str(word) for word in [*asked, *options]]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    told = json.loads(result.stdout)
    assert {key: told[key] for key in ("layers", "prompts", "n_trained", "n_task")} == {
        "layers": [1],
        "prompts": "held_out",
        "n_trained": 11,
        "n_task": 1,
    }
    runs = {run["run"]: run for run in told["runs"]}
    assert list(runs) == ["anchor", "unblocked", "blocked"] and runs["anchor"]["alignment"] is None
    assert abs(runs["blocked"]["fraction_probes"]) < 1e-3 < abs(runs["unblocked"]["fraction_probes"])
    assert all(
        (tmp_path / "ft" / name / f"checkpoint-{n}").is_dir() for name in ("blocked", "unblocked") for n in (1, 2)
    )
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments[:-1])
    assert f"{runs['unblocked']['fraction']:.3f}" in shown.stdout and "…" not in shown.stdout
    assert f'blocked = "{tmp_path / "ft" / "blocked"}/checkpoint-*"' in shown.stdout
    only = [
        *arguments[:5],
        str(tmp_path / "alone"),
        *arguments[6:],
        "--only-blocked",
        "--prompts",
        str(home / "probes.jsonl"),
    ]
    alone = json.loads(CliRunner().invoke(app, only).stdout)
    assert [run["run"] for run in alone["runs"]] == ["anchor", "blocked"] and alone["prompts"] == "given"
