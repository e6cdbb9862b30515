"""Ablating v_rev: the table is that of `causal_effect`, the verdict follows it, and the command tells both."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from histories import between, plant, planted_vector, refused, sequence_on_disk
from typer.testing import CliRunner, Result

from gravlens.behavior.scores import refusal_log_odds
from gravlens.cli import app
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate
from gravlens.interventions.effects import causal_effect
from gravlens.interventions.hooks import intervene
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import REFUSALS
from gravlens.studies.ablation import ablate_vrev
from gravlens.studies.inputs import Question, checkpoint_of, ends, located, prompts_of, score_of

OWN = [word for opening in REFUSALS for word in ("--openings", opening)]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by a vector at layer 1; the run goes most of that way."""
    folder = tmp_path_factory.mktemp("planted")
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=1)
    models = {"witness": witness, "anchor": anchor, "ft/checkpoint-20": between(anchor, witness, 0.8)}
    return sequence_on_disk(folder, models)


def question(history: Path) -> Question:
    sequence = ModelSequence.from_toml(history / "SEQUENCE.toml")
    return Question(sequence, checkpoint_of(sequence), prompts_of(sequence), score_of(REFUSALS))


def gravlens(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def test_each_row_is_an_effect_with_matched_twins(history: Path) -> None:
    asked = question(history)
    found = ablate_vrev(asked, n_random=3)
    assert found.table["layer"].fillna(-1).tolist() == [1, 2, -1], "layer 0 has no v_rev"
    assert set(found.table["random_kind"]) == {"covariance_matched"}
    model = open_model(history / "ft/checkpoint-20")
    vs = located(ends(asked.sequence)).defined()
    plain = refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS)
    for part, row in zip([vs[1], vs[2], vs], found.table.to_dict("records"), strict=True):
        with intervene(model, Ablate(part)):
            ablated = refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS)
        assert row["difference"] == pytest.approx((ablated - plain).mean(), abs=1e-5)
        assert row["baseline"] == pytest.approx(plain.mean(), abs=1e-5)
    states = ends(asked.sequence)
    ask = {"score": asked.score, "prompts": asked.prompts, "n_random": 3}
    alone = causal_effect(model, {"x": Ablate(vs[1])}, states=states, **ask)
    assert found.table["random_high"][0] == pytest.approx(alone.random["x"].max(), abs=1e-5)
    isotropic = ablate_vrev(asked, layers=[1], n_random=3, twins="isotropic").table
    other = causal_effect(model, {"x": Ablate(vs[1])}, states="isotropic", **ask)
    assert isotropic["random_high"].item() == pytest.approx(other.random["x"].max(), abs=1e-5)
    assert abs(isotropic["random_high"].item() - found.table["random_high"][0]) > 1e-4
    anchor = refusal_log_odds(open_model(history / "anchor"), tiny.PROMPTS, openings=REFUSALS).mean()
    assert found.anchor == pytest.approx(anchor, abs=1e-5)
    way = anchor - plain.mean()
    assert found.share == pytest.approx(found.table["difference"].max() / way) if way > 0 else np.isnan(found.share)
    conditions = {"1": Ablate(vs[1]), "2": Ablate(vs[2]), "all": Ablate(vs)}
    together = causal_effect(model, conditions, states=states, **ask)
    largest = np.max([together.random[name] for name in conditions], axis=0)
    reached = (largest >= found.table["difference"].max()).sum()
    assert found.best["p_largest"] == pytest.approx((1 + reached) / 4) and not found.comes_back, "3 draws are too few"
    assert "19 random directions are needed" in found.lines()[0]


def test_the_command_tells_the_table_and_the_verdict(history: Path, tmp_path: Path) -> None:
    asked = ["ablate", history / "SEQUENCE.toml", *OWN, "--n-random", "2"]
    result = gravlens(*asked, "--json", "--out", tmp_path / "new")
    assert result.exit_code == 0, (result.output, result.exception)
    told, found = json.loads(result.stdout), ablate_vrev(question(history), n_random=2)
    assert told["checkpoint"] == "seed0/20" and told["comes_back"] == found.comes_back
    assert told["anchor"] == pytest.approx(found.anchor) and told["score"] == "refusal_log_odds"
    assert told["best"]["p_largest"] == pytest.approx(found.best["p_largest"])
    assert told["best"]["low"] == pytest.approx(found.best["low"])
    assert [row["layer"] for row in told["rows"]] == [1, 2, None]
    assert [row["difference"] for row in told["rows"]] == pytest.approx(found.table["difference"].tolist())
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["ablate_layer.csv", "ablate_layer.pdf", "ablate_layer.png"]
    assert "ablate_layer.csv" in result.stderr
    shown = gravlens(*asked)
    assert all(line in shown.stdout for line in found.lines()), shown.stdout
    assert (
        f"{found.table['difference'][0]:+.2f} [{found.table['low'][0]:+.2f}" in shown.stdout and " all " in shown.stdout
    )


def test_one_prompt_has_no_interval(history: Path) -> None:
    asked = ["ablate", history / "SEQUENCE.toml", *OWN, "--n-random", "1", "--max-prompts", "1", "--layer", "1"]
    shown = gravlens(*asked).stdout
    assert "1 prompts" in shown and "nan" not in shown and "[+" not in shown and "[-" not in shown
    told = json.loads(gravlens(*asked, "--json").stdout)
    assert told["rows"][0]["low"] is None and told["comes_back"] is False


def test_a_checkpoint_is_asked_for_by_name(history: Path) -> None:
    sequence = ModelSequence.from_toml(history / "SEQUENCE.toml")
    assert checkpoint_of(sequence).name == "seed0/20" and checkpoint_of(sequence, "witness").name == "witness"
    with refused("no checkpoint 'seed0/6'"):
        checkpoint_of(sequence, "seed0/6")
    with refused("no run"):
        checkpoint_of(ModelSequence.from_folders(witness=history / "witness", anchor=history / "anchor"))


def test_prompts_are_spread_and_read_under_the_sequences_system_prompt(history: Path) -> None:
    sequence = ModelSequence.from_toml(history / "SEQUENCE.toml").with_system("Be brief.")
    assert list(prompts_of(sequence, most=3)) == list(tiny.PROMPTS[::2])
    assert prompts_of(sequence, history / "probes.jsonl").system == prompts_of(sequence).system == "Be brief."
