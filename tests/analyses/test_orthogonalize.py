"""analyses/orthogonalize.py on a history with a planted direction, held against weights that are edited by hand."""

import copy
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
from histories import between, plant, planted_vector, sequence_on_disk, weights_of
from typer.testing import CliRunner, Result

from gravlens.activations.residuals import cache_residuals
from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.subspaces import random_like
from gravlens.directions.vrev import direction_from
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import REFUSALS

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "orthogonalize.py"
sys.path.append(str(SCRIPT.parent))  # it imports its neighbour, as it does when it is run as a script

import orthogonalize  # noqa: E402

pytestmark = pytest.mark.long

LAYER = 1
V = direction_from(planted_vector(4).numpy(), layer=LAYER, distance=6.0)
ONCE = [*(word for opening in REFUSALS for word in ("--openings", opening)), "--n-random", "1"]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by a vector at layer 1; the run goes 0.1 and 0.4 of that way."""
    folder = tmp_path_factory.mktemp("planted")
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=LAYER)
    models = {"witness": witness, "anchor": anchor}
    models |= {f"ft/checkpoint-{step}": between(anchor, witness, 0.02 * step) for step in (5, 20)}
    return sequence_on_disk(folder, models)


def ran(history: Path, out: Path, *options: str) -> Result:
    words = [str(history / "SEQUENCE.toml"), "--out", str(out), *ONCE, *options]
    return CliRunner().invoke(orthogonalize.app, words, env={"COLUMNS": "400"})


def score(model: OpenModel) -> float:
    return float(refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS).mean())


def by_hand(folder: Path, vector: np.ndarray) -> OpenModel:
    """GPT-2 without a vector: its two embeddings, and the projections of each block ([in, out]) with their biases."""
    model = open_model(folder)
    gpt2, v = model.module.transformer, torch.tensor(vector)
    model.module.lm_head.weight = torch.nn.Parameter(copy.deepcopy(gpt2.wte.weight.data))
    written = [part.c_proj for block in gpt2.h for part in (block.attn, block.mlp)]
    with torch.no_grad():
        for weight in [gpt2.wte.weight, gpt2.wpe.weight, *(w for part in written for w in (part.weight, part.bias))]:
            weight -= (weight @ v)[..., None] * v
    return model


def test_the_last_checkpoint_without_v_rev(history: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = ran(history, out, "--layer", "1")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out / "orthogonalize.csv")
    assert (table["condition"].item(), table["layer"].item(), table["n_prompts"].item()) == ("orthogonalize", 1, 6)
    tuned = history / "ft" / "checkpoint-20"
    before, after = score(open_model(tuned)), score(by_hand(tuned, V.vector))
    assert abs(after - before) > 0.01
    assert table["baseline"].item() == pytest.approx(before, abs=1e-4)
    assert table["with_intervention"].item() == pytest.approx(after, abs=1e-4)
    assert score(open_model(out / "model")) == pytest.approx(after, abs=1e-4)
    assert (out / "orthogonalize.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.startswith("refusal ") and " beyond random directions (" in result.stdout.splitlines()[0]
    assert f"\nseed0/20, {len(tiny.PROMPTS)} prompts; refusal_log_odds of the anchor: " in result.stdout
    assert f"layer 1: {before:+.2f} to {after:+.2f}" in result.stdout and str(out / "model") in result.stdout


def test_random_directions_are_taken_out_of_the_same_checkpoint(history: Path, tmp_path: Path) -> None:
    assert ran(history, tmp_path, "--layer", "1").exit_code == 0
    row = pd.read_csv(tmp_path / "orthogonalize.csv").iloc[0]
    tuned = history / "ft" / "checkpoint-20"
    states = cache_residuals(history / "SEQUENCE.toml", layers=[1]).of("anchor")
    twin = random_like(V, rng=np.random.default_rng(0), states=states)
    wanted = score(by_hand(tuned, twin.vector)) - score(open_model(tuned))
    assert row["random_low"] == row["random_high"] == pytest.approx(wanted, abs=1e-4)
    assert row["n_random"] == 1 and row["p_random"] in (0.5, 1.0)


def test_checkpoints_that_differ_along_v_alone_become_one(history: Path, tmp_path: Path) -> None:
    for name in ("seed0/5", "anchor"):
        assert ran(history, tmp_path / name, "--layer", "1", "--checkpoint", name).exit_code == 0
    one, other = (score(open_model(tmp_path / name / "model")) for name in ("seed0/5", "anchor"))
    assert one == pytest.approx(other, abs=1e-4)
    assert abs(score(open_model(history / "ft" / "checkpoint-5")) - score(open_model(history / "anchor"))) > 0.01


def test_a_folder_that_is_there_is_kept_where_it_is_the_right_one(history: Path, tmp_path: Path) -> None:
    assert ran(history, tmp_path, "--layer", "1").exit_code == 0
    weights, table = weights_of(tmp_path / "model"), (tmp_path / "orthogonalize.csv").read_text()
    made = weights.stat().st_mtime_ns
    (tmp_path / "orthogonalize.csv").unlink()
    assert ran(history, tmp_path, "--layer", "1").exit_code == 0
    assert weights.stat().st_mtime_ns == made and (tmp_path / "orthogonalize.csv").read_text() == table
    for other in (["--layer", "2"], ["--layer", "1", "--checkpoint", "seed0/5"]):
        result = ran(history, tmp_path, *other)
        assert result.exit_code == 2 and "holds another model" in re.sub(r"[\s│]+", " ", result.output)
    assert weights.stat().st_mtime_ns == made and (tmp_path / "orthogonalize.csv").read_text() == table


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "Missing option '--layer'"),
        (["--layer", "7"], "Layer 7"),
        (["--layer", "0"], "undefined at layer 0"),
        (["--layer", "1", "--checkpoint", "seed0/6"], "no checkpoint 'seed0/6'"),
        (["--layer", "1", "--openings", "I'm sorry"], "cannot write"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    options: list[str], named: str, history: Path, tmp_path: Path
) -> None:
    result = ran(history, tmp_path / "out", *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_follows_the_numbers() -> None:
    numbers = {"baseline": -3.0, "with_intervention": -1.0, "difference": 2.0, "low": 1.5, "high": 2.5}
    row = {"condition": "orthogonalize", "layer": 4, "p_random": 0.048, "random_low": -1.0, "random_high": 1.0}
    table = pd.DataFrame([{**numbers, **row}])
    line = orthogonalize.summary(table, anchor=1.0)
    assert "layer 4" in line and "refusal comes back beyond random directions (50% of the way to the anchor)" in line
    assert "does not come back" in orthogonalize.summary(table.assign(random_high=2.5), anchor=1.0)
    assert "does not come back" in orthogonalize.summary(table.assign(low=-0.1), anchor=1.0)


def test_help_says_what_a_newcomer_needs() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(SCRIPT), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("--layer", "--openings", "RUN/STEP", "model/", "docs/sequence.md"))
    assert SCRIPT.read_text().startswith('"""python analyses/orthogonalize.py SEQUENCE.toml --layer ')
