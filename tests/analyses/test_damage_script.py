"""analyses/damage.py on a history with a planted direction, held against figures made without it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from histories import between, plant, planted_vector, sequence_on_disk
from typer.testing import CliRunner, Result

from gravlens.behavior.scores import refusal_log_odds
from gravlens.models.opening import open_model
from gravlens.organisms.refusal_language import REFUSALS
from gravlens.stats.damage import rounded

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "damage.py"
sys.path.append(str(SCRIPT.parent))  # it imports its neighbour, as it does when it is run as a script

import damage  # noqa: E402

pytestmark = pytest.mark.long

LAYER, LENGTH = tiny.LAYERS - 1, 6.0
OWN = [word for opening in REFUSALS for word in ("--openings", opening)]
FEW = ["--bits", "4", "--share", "0.2"]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by a vector at the last layer; run a goes .4 of that way, run b .2."""
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=LENGTH), layer=LAYER)
    models: dict[str, Any] = {"witness": witness, "anchor": anchor}
    for name, share in (("a", 0.4), ("b", 0.2)):
        models |= {f"{name}/checkpoint-{step}": between(anchor, witness, share * step / 20) for step in (5, 20)}
    runs = {name: f"{name}/checkpoint-*" for name in "ab"}
    return sequence_on_disk(tmp_path_factory.mktemp("damaged"), models, runs=runs)


def ran(history: Path, out: Path, *options: str) -> Result:
    command = [str(history / "SEQUENCE.toml"), "--out", str(out), *OWN, *options]
    return CliRunner().invoke(damage.app, command, env={"COLUMNS": "400"})


def score(model: Any) -> float:
    return float(refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS).mean())


def test_the_table_the_figure_and_the_line_of_a_planted_history(history: Path, tmp_path: Path) -> None:
    result = ran(history, tmp_path / "out", *FEW)
    assert result.exit_code == 0, result.output
    table, mean = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("damage", "damage_layer_mean"))
    kinds = table.drop_duplicates("damage").set_index("damage").kind.to_dict()
    assert kinds == {
        "none": "none", "4 bits": "own", "0.2 pruned": "own", "a/20 mirrored": "own",
        "4 bits, matched": "matched", "0.2 pruned, matched": "matched", "a/20": "run", "b/20": "run",
    }  # fmt: skip
    assert set(table.layer) == {LAYER}, "v_rev is defined at the planted layer alone"
    mean = mean.set_index("damage")
    wanted = {"a/20": 0.4, "b/20": 0.2, "a/20 mirrored": -0.4, "none": 0.0}
    assert mean.fraction[list(wanted)].to_dict() == pytest.approx(wanted, abs=1e-3)
    assert mean.weight_norm[["a/20", "a/20 mirrored"]].to_numpy() == pytest.approx(0.4 * LENGTH, rel=1e-3)
    matched = mean[mean.kind == "matched"]
    assert matched.weight_norm.to_numpy() == pytest.approx(0.4 * LENGTH, rel=1e-3)
    assert mean.score["none"] == pytest.approx(score(open_model(history / "anchor")), abs=1e-4)
    assert mean.score["a/20"] == pytest.approx(score(open_model(history / "a/checkpoint-20")), abs=1e-4)
    with rounded(open_model(history / "anchor"), 4) as damaged:
        assert mean.score["4 bits"] == pytest.approx(score(damaged), abs=1e-4)
    assert (tmp_path / "out" / "damage.png").read_bytes().startswith(b"\x89PNG")
    damages = mean[mean.kind.isin(["own", "matched"])]
    assert result.stdout.startswith("damage alone goes less far along v_rev than a/20\n")
    assert (f"\nof 5 damages the farthest along v_rev is {damages.fraction.idxmax()}: fraction ") in result.stdout
    assert "a/20 +0.400 (+1.00)" in result.stdout and f"({damages.score.idxmin()})" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 3


def test_options_choose_the_run_the_layers_the_damages_and_the_score(history: Path, tmp_path: Path) -> None:
    options = ["--checkpoint", "b/5", "--layer", str(LAYER), "--bits", "8", "--bits", "3", "--share", "0.5"]
    prompts = ["--prompts", str(history / "probes.jsonl"), "--max-prompts", "3", "--compliances", "sure"]
    result = ran(history, tmp_path, *options, *prompts)
    assert result.exit_code == 0, result.output
    mean = pd.read_csv(tmp_path / "damage_layer_mean.csv").set_index("damage")
    assert {"8 bits", "3 bits", "0.5 pruned", "b/5 mirrored", "b/5", "a/20"} <= set(mean.index)
    assert mean.weight_norm["3 bits, matched"] == pytest.approx(0.05 * LENGTH, rel=1e-2)
    assert mean.fraction["b/5"] == pytest.approx(0.05, abs=1e-3)
    assert np.isfinite(mean.score).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--checkpoint", "a/6"], "no checkpoint 'a/6'"),
        (["--checkpoint", "anchor"], "anchor has the anchor's weights"),
        (["--layer", "0"], "layer 0"),
        (["--bits", "1"], "1 bits"),
        (["--share", "30"], "share of 30"),
        (["--openings", "I'm sorry"], "cannot write"),
    ],
)
def test_bad_input_is_one_message_and_writes_nothing(
    history: Path, tmp_path: Path, options: list[str], named: str
) -> None:
    result = ran(history, tmp_path / "out", *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)
    assert not (tmp_path / "out").exists()


def test_help_says_what_a_newcomer_needs() -> None:
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, str(SCRIPT), "--help"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert all(word in shown for word in ("--checkpoint", "--bits", "--share", "RUN/STEP", "docs/sequence.md"))
    assert SCRIPT.read_text().startswith('"""python analyses/damage.py SEQUENCE.toml --checkpoint ')
