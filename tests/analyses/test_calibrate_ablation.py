"""analyses/calibrate_ablation.py: random directions are seldom said to bring refusal back, the planted one mostly."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2] / "analyses"))

import calibrate_ablation as script

from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.vrev import locate_vrev

pytestmark = pytest.mark.long


def test_the_planted_history_loses_its_refusals_along_v_rev() -> None:
    one = script.history(0)
    vs = locate_vrev(one.states).defined()
    assert len(vs) == script.LAYERS and vs[script.PLANTED_AT].distance == pytest.approx(script.LENGTH, rel=1e-3)
    score = script.opening_log_odds(one.tuned, script.PROMPTS)
    assert score == pytest.approx(refusal_log_odds(one.tuned, script.PROMPTS, openings=[script.OPENING]), abs=1e-5)
    assert score.mean() < one.anchor - 1


@pytest.mark.parametrize("kind", ["matched", "isotropic", "stranger"])
def test_what_stands_in_v_revs_place_is_not_v_rev(kind: str) -> None:
    one = script.history(0)
    vs = locate_vrev(one.states).defined()
    found = [script.directions_of(kind, one, np.random.default_rng(seed)) for seed in range(2)]
    assert found[0].layers == vs.layers and not np.allclose(found[0].vectors, found[1].vectors)
    assert np.abs((found[0].vectors * vs.vectors).sum(1)).max() < 0.9


def test_it_is_said_of_few_random_directions_and_of_most_planted_ones(tmp_path: Path) -> None:
    rows = [row["comes_back"] for row in script.judged("matched", 60, 19)]
    assert stats.binomtest(sum(rows), len(rows), 0.05, alternative="greater").pvalue > 0.01
    few = ["--trials", "1", "--planted", "8", "--out", str(tmp_path)]
    result = CliRunner().invoke(script.app, few)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "calibrate_ablation.csv").set_index("in_place")
    assert table.loc["v_rev", "comes_back"] >= 0.5 and table.loc["v_rev", "trials"] == 8
