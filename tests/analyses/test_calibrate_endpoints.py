"""analyses/calibrate_endpoints.py: its worlds are what they say, and the null keeps its rate in them."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[2] / "analyses"))

import calibrate_endpoints as script


@pytest.mark.parametrize(("r", "cosine"), [(0.1, 1 / 11), (1.0, 0.5)])
def test_the_endpoints_share_the_anchor_and_nothing_else(r: float, cosine: float) -> None:
    residuals = script.simulate("isotropic", r, 3, 200, np.random.default_rng(0))
    mean = {name: residuals.of(name).astype(float).mean(0) for name in residuals.checkpoints}
    away = {name: mean[name] - mean["anchor"] for name in ("a/1", "witness", "s1")}
    unit = {name: one / np.linalg.norm(one, axis=-1, keepdims=True) for name, one in away.items()}
    assert (unit["a/1"] * unit["witness"]).sum(-1).mean() == pytest.approx(cosine, abs=0.03)
    from_sibling = (mean["a/1"] - mean["anchor"]) * (mean["witness"] - mean["s1"])
    assert from_sibling.sum(-1).mean() / script.WIDTH == pytest.approx(0, abs=0.05)
    assert np.square(away["s1"]).sum(-1).mean() / script.WIDTH == pytest.approx(2 * r, rel=0.05)


@pytest.mark.long
def test_the_null_keeps_its_rate_and_the_estimate_s_spread_does_not(tmp_path: Path) -> None:
    result = CliRunner().invoke(script.app, ["--simulations", "400", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "calibrate_endpoints.csv")
    rates = table[table.world != "other_spectrum"].groupby(["null", "nominal"]).rejection_rate
    assert rates.mean()["independent_endpoints", 0.05] == pytest.approx(0.05, abs=0.01)  # 16 × 400, 4 standard errors
    assert rates.mean()["independent_endpoints", 0.01] < 0.02 and rates.min()["estimate", 0.01] > 0.09
