"""The scripts of analyses/ on a history with a planted direction, held against figures made without them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import between, plant, planted_vector, sequence_on_disk
from typer.testing import CliRunner, Result

from gravlens.behavior.scores import refusal_log_odds, two_sided_log_odds
from gravlens.history.encoding import encode
from gravlens.interventions.effects import Effect
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import OPENINGS, REFUSALS
from gravlens.studies.ablation import Ablation

ANALYSES = Path(__file__).resolve().parents[2] / "analyses"
sys.path.append(str(ANALYSES))

import ablate_layer  # noqa: E402
import steer_sweep  # noqa: E402

pytestmark = pytest.mark.long

LAYER, SHARE = 1, 0.4
OWN = [word for opening in REFUSALS for word in ("--openings", opening)]
FEW = ["--n-random", "2"]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SEQUENCE.toml: the witness is the anchor moved by a vector at layer 1, the run goes a share of that way."""
    folder = tmp_path_factory.mktemp("planted")
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=LAYER)
    models = {"witness": witness, "anchor": anchor}
    models |= {f"ft/checkpoint-{step}": between(anchor, witness, SHARE * step / 20) for step in (5, 20)}
    return sequence_on_disk(folder, models)


def ran(script: object, history: Path, *options: str) -> Result:
    return CliRunner().invoke(script.app, [str(history / "SEQUENCE.toml"), *options], env={"COLUMNS": "400"})  # type: ignore[attr-defined]


def score(model: OpenModel) -> np.ndarray:
    return refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS)


def opened(history: Path, name: str) -> OpenModel:
    return open_model(history / name)


def ablated_by_hand(model: OpenModel) -> float:
    """Mean refusal log-odds with the planted vector removed at its layer by a hook of the test's own."""
    v = planted_vector(4, length=1.0)
    first = sorted({tiny.TOKENIZER(opening)["input_ids"][0] for opening in REFUSALS})
    hook = model.blocks[LAYER].register_forward_hook(
        lambda _m, _i, out: (
            (out[0] - torch.outer(out[0][0] @ v, v), *out[1:])
            if isinstance(out, tuple)
            else out - (out @ v)[..., None] * v
        )
    )
    p = torch.cat([final_logits(model, [ids]) for ids in encode(tiny.TOKENIZER, tiny.PROMPTS)]).double().softmax(-1)
    hook.remove()
    refusing = p[:, first].sum(1)
    return float((refusing.log() - (1 - refusing).log()).mean())


# --- ablate_layer -----------------------------------------------------------------------------------------------


def test_ablating_one_layer_of_the_last_checkpoint(history: Path, tmp_path: Path) -> None:
    result = ran(ablate_layer, history, "--layer", "1", "--out", str(tmp_path / "new"), *OWN, *FEW)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "new" / "ablate_layer.csv")
    assert (table["condition"].item(), table["layer"].item(), table["n_random"].item()) == ("ablate", 1, 2)
    tuned = opened(history, "ft/checkpoint-20")
    assert table["baseline"].item() == pytest.approx(score(tuned).mean(), abs=1e-4)
    assert table["with_intervention"].item() == pytest.approx(ablated_by_hand(tuned), abs=1e-4)
    assert (tmp_path / "new" / "ablate_layer.png").read_bytes().startswith(b"\x89PNG")
    assert f"seed0/20, {len(tiny.PROMPTS)} prompts; refusal_log_odds of the anchor: " in result.stdout
    anchor = score(opened(history, "anchor")).mean()
    assert f"of the anchor: {anchor:+.2f}" in result.output


def test_ablating_every_defined_layer_and_all_at_once(history: Path, tmp_path: Path) -> None:
    result = ran(ablate_layer, history, "--checkpoint", "seed0/5", "--out", str(tmp_path), *OWN, *FEW)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "ablate_layer.csv")
    assert (
        table["layer"].tolist()[:2] == [1, 2] and np.isnan(table["layer"].iloc[2]) and len(table) == 3
    )  # 0 is undefined
    assert table["baseline"].to_numpy() == pytest.approx(score(opened(history, "ft/checkpoint-5")).mean(), abs=1e-4)
    assert table["difference"].nunique() == 3
    assert "seed0/5, " in result.stdout and "largest rise of 3" in result.output


def test_some_layers_by_themselves_and_together(history: Path, tmp_path: Path) -> None:
    result = ran(ablate_layer, history, "--layer", "2", "--layer", "1", "--out", str(tmp_path), *OWN, *FEW)
    assert result.exit_code == 0, result.output
    assert pd.read_csv(tmp_path / "ablate_layer.csv")["layer"].fillna(-1).tolist() == [1, 2, -1]


# --- steer_sweep ------------------------------------------------------------------------------------------------


def test_the_anchor_steered_by_the_whole_distance_is_the_witness(history: Path, tmp_path: Path) -> None:
    """Where they differ by one layer's bias, strength 1 there gives the witness's score and SHARE the run's."""
    strengths = [f"--strength={strength}" for strength in (SHARE, 1.0)]
    result = ran(steer_sweep, history, "--all-layers", *strengths, "--out", str(tmp_path), *OWN, *FEW)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "steer_sweep.csv").set_index(["condition", "layer"])
    assert list(table.index) == [(f"strength {s}", layer) for s in ("0.4", "1") for layer in (1, 2)]
    witness, tuned = (score(opened(history, name)).mean() for name in ("witness", "ft/checkpoint-20"))
    assert table.loc[("strength 1", 1), "with_intervention"] == pytest.approx(witness, abs=1e-3)
    assert table.loc[("strength 0.4", 1), "with_intervention"] == pytest.approx(tuned, abs=1e-3)
    assert table["baseline"].to_numpy() == pytest.approx(score(opened(history, "anchor")).mean(), abs=1e-4)
    assert abs(witness - table["baseline"].iloc[0]) > 0.05
    assert (tmp_path / "steer_sweep.png").read_bytes().startswith(b"\x89PNG")
    assert f"anchor, {len(tiny.PROMPTS)} prompts; refusal_log_odds of the witness: {witness:+.2f}" in result.output
    assert "largest fall of 4" in result.output


def test_the_usual_strengths(history: Path, tmp_path: Path) -> None:
    assert ran(steer_sweep, history, "--layer", "1", "--out", str(tmp_path), *OWN, *FEW).exit_code == 0
    conditions = pd.read_csv(tmp_path / "steer_sweep.csv")["condition"]
    assert conditions.tolist() == ["strength 0.25", "strength 0.5", "strength 1", "strength 2"]


# --- options of both --------------------------------------------------------------------------------------------


def test_two_sided_where_compliances_are_given_on_prompts_of_a_file(history: Path, tmp_path: Path) -> None:
    sides = [*OWN, *(word for opening in OPENINGS for word in ("--compliances", opening))]
    prompts = ["--prompts", str(history / "probes.jsonl"), "--max-prompts", "3"]
    result = ran(ablate_layer, history, "--layer", "1", *sides, *prompts, "--out", str(tmp_path), *FEW)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "ablate_layer.csv")
    asked = [json.loads(line)["prompt"] for line in (history / "probes.jsonl").read_text().splitlines()][::2]
    tuned = opened(history, "ft/checkpoint-20")
    wanted = two_sided_log_odds(tuned, asked, refusals=REFUSALS, compliances=OPENINGS).mean()
    assert table["n_prompts"].item() == 3 and table["baseline"].item() == pytest.approx(wanted, abs=1e-4)
    assert "two_sided_log_odds" in result.output


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--layer", "1", "--all-layers"], "Both --layer and --all-layers"),
        (["--layer", "7"], "Layer 7"),
        (["--layer", "0"], "undefined at layer 0"),
        (["--layer", "1", "--checkpoint", "seed0/6"], "no checkpoint 'seed0/6'"),
        (["--layer", "1", "--prompts", "absent.txt"], "absent.txt does not exist"),
        (["--layer", "1", "--openings", "I'm sorry"], "cannot write"),
    ],
)
@pytest.mark.parametrize("script", [ablate_layer, steer_sweep])
def test_bad_input_is_one_message_and_writes_nothing(
    script: object, options: list[str], named: str, history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    openings = [] if "--openings" in options else OWN
    result = ran(script, history, *options, *openings)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)
    assert list(tmp_path.iterdir()) == []


def test_a_sequence_without_runs_has_nothing_to_ablate_in(history: Path, tmp_path: Path) -> None:
    text = (history / "SEQUENCE.toml").read_text().split("[runs]")[0]
    for name in ("witness", "anchor"):
        text = text.replace(f'"{name}"', json.dumps(str(history / name)))
    text = text.replace('= "probes', f'= "{history}/probes').replace('= "held_out', f'= "{history}/held_out')
    (tmp_path / "SEQUENCE.toml").write_text(text)
    result = ran(ablate_layer, tmp_path, "--layer", "1", *OWN)
    assert result.exit_code == 2 and "no run" in result.output


# --- the lines on the screen ------------------------------------------------------------------------------------


def effects(**columns: list[float]) -> pd.DataFrame:
    given = {
        "difference": [1.0, 2.0],
        "low": [0.5, 1.5],
        "high": [1.5, 2.5],
        "random_low": [-1.0, -1.0],
        "random_high": [1.0, 1.0],
    }
    fixed = {
        "condition": "ablate",
        "layer": [3, 4],
        "baseline": -3.0,
        "with_intervention": -1.0,
        "p_random": 0.048,
        "p_largest": 0.05,
        "n_random": 19,
        "n_prompts": 6,
    }
    return pd.DataFrame({**fixed, **given, **columns})


def test_the_verdict_follows_the_numbers() -> None:
    best = effects().iloc[1]
    verdict, largest, _ = Ablation(effects(), best, "seed0/20", anchor=1.0).lines()
    assert "layer 4" in largest and verdict == (
        "refusal comes back beyond random directions: p = 0.050 for the largest rise of 2 against that of each of 19 "
        "random directions (50% of the way to the anchor)"
    )
    assert Ablation(effects(), best, "seed0/20", anchor=-4.0).lines()[0].endswith("19 random directions")
    for nothing in (effects(p_largest=[0.05, 0.06]), effects(low=[0.5, -0.1])):
        assert "does not come back" in Ablation(nothing, nothing.iloc[1], "seed0/20", anchor=1.0).lines()[0]


@pytest.mark.parametrize(("random", "verdict"), [(-1.5, "falls beyond"), (-2.5, "does not fall beyond")])
def test_a_fall_is_compared_with_the_largest_fall_of_each_draw(random: float, verdict: str) -> None:
    moved = {"a": np.full(6, -1.0), "b": np.full(6, -2.0)}
    draws = {"a": np.r_[random, np.zeros(18)], "b": np.zeros(19)}  # in another row than the one that is named
    table = effects(difference=[-1.0, -2.0]).drop(columns="p_largest")
    line = steer_sweep.summary(Effect(table, draws, moved, np.zeros(6)))
    assert "layer 4" in line and f"refusal {verdict} random directions" in line


@pytest.mark.parametrize("script", ["ablate_layer.py", "steer_sweep.py"])
def test_help_says_what_a_newcomer_needs(script: str) -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(ANALYSES / script), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("--layer", "--all-layers", "--openings", "RUN/STEP", "docs/sequence.md"))
    first = (ANALYSES / script).read_text().splitlines()[0]
    assert first.startswith(f'"""python analyses/{script} SEQUENCE.toml --')


def test_json_and_placement_are_options_of_the_scripts_too(history: Path, tmp_path: Path) -> None:
    asked = ["--layer", "1", "--strength", "1", "--out", str(tmp_path), *OWN, *FEW]
    full, half = (
        json.loads(ran(steer_sweep, history, *asked, "--json", "--device", "cpu", "--dtype", dtype).stdout)
        for dtype in ("float32", "bf16")
    )
    assert full["summary"][0].startswith("refusal ") and full["rows"][0]["condition"] == "strength 1"
    written = pd.read_csv(tmp_path / "steer_sweep.csv")  # of the second call
    assert half["rows"][0]["difference"] == pytest.approx(written["difference"].item(), abs=1e-5)
    assert 0 < abs(full["rows"][0]["baseline"] - half["rows"][0]["baseline"]) < 0.2, "opened in another precision"
    wrong = ran(steer_sweep, history, *asked, "--device", "abacus")
    assert wrong.exit_code == 2 and "abacus" in wrong.output
