"""calibrate_nulls.py: simulated worlds are what they say; nulls are as exact as they claim, here and in the tables."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from gravlens.directions.trajectory import drifts

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

import calibrate_nulls as calibration  # noqa: E402

pytestmark = pytest.mark.long

WORLDS = {world.name: world for world in calibration.WORLDS}
COLUMNS = ["null", "world", "assumed", "nominal", "rejection_rate", "n_simulations"]
DISCRETE = {"sign_flips"}


def cosines(world: str, *, number: int = 100, planted: float = 0.0, first_run: bool = True) -> np.ndarray:
    """Alignments on the held-out prompts in so many histories of a world."""
    made = replace(WORLDS[world], planted=planted)
    table = calibration.simulate(made, number, np.random.default_rng(0)).all_runs.table
    table = table[(table.run == "run0") | (not first_run)]
    return table.alignment.to_numpy()


def within(rate: float, nominal: float, n: int, *, discrete: bool, confidence: float = 0.999) -> bool:
    """Whether a rejection rate is the nominal one within Monte-Carlo error, or below it where a test is discrete."""
    low, high = stats.binom.interval(confidence, n, nominal)
    return rate * n <= high and (discrete or rate * n >= low)


# -- worlds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [34, 5.4, 2.5, None])
def test_a_spectrum_has_its_participation_ratio(ratio: float | None) -> None:
    variance = calibration.spectrum(ratio) ** 2
    assert variance.sum() ** 2 / (variance**2).sum() == pytest.approx(ratio or calibration.WIDTH, rel=1e-6)
    assert variance.mean() == pytest.approx(1)


def test_a_shared_anchor_gives_a_cosine_of_one_half_and_its_absence_none() -> None:
    assert cosines("shared_anchor").mean() == pytest.approx(0.5, abs=0.04)
    for world in ("isotropic", "anisotropic_34", "labels_exchangeable"):
        assert abs(cosines(world).mean()) < 3.5 * cosines(world).std() / np.sqrt(100), world


def test_a_participation_ratio_sets_the_spread_of_chance() -> None:
    spreads = [cosines(world).std() for world in ("isotropic", "anisotropic_34", "anisotropic_5.4", "anisotropic_2.5")]
    assert spreads == sorted(spreads) and spreads[0] == pytest.approx(1 / np.sqrt(calibration.WIDTH), rel=0.15)


def test_runs_go_alike_in_one_world_only() -> None:
    for world, alike in [("runs_alike", True), ("anisotropic_5.4", False)]:
        histories = calibration.simulate(WORLDS[world], 30, np.random.default_rng(0))
        one, other = (drifts(histories.held_out, run, histories.held_out.layers)[0] for run in ("run0", "run1"))
        between = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
        assert (between.mean() > 0.8) == alike


@pytest.mark.parametrize("world", ["isotropic", "anisotropic_34", "labels_exchangeable"])
@pytest.mark.parametrize("planted", [0.3, 0.8])
def test_what_is_planted_is_there(world: str, planted: float) -> None:
    assert cosines(world, planted=planted).mean() == pytest.approx(planted, abs=0.1)


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["isotropic", "anisotropic_2.5", "labels_exchangeable"])
def test_nulls_reject_as_often_as_they_should_where_they_assume_it(world: str) -> None:
    table = calibration.calibrate([WORLDS[world]], simulations=100, rng=np.random.default_rng(0))
    assert list(table.columns) == COLUMNS and len(table) == 2 * len(calibration.ASSUMED)
    assert [row for row in table[table.assumed].to_dict("records") if not _within(row, 0.9999)] == []
    rate = table[table.nominal == 0.05].set_index("null").rejection_rate
    assert rate["swapped_labels"] < 0.2 if world == "labels_exchangeable" else rate["swapped_labels"] > 0.25
    assert (rate["isotropic"] > 0.2) == (world != "isotropic"), "false alarms are seen"


def test_what_is_planted_is_found_by_the_nulls_of_its_world() -> None:
    world, rng = replace(WORLDS["anisotropic_34"], planted=0.7), np.random.default_rng(0)
    rates = calibration.rejection_rates(world, simulations=20, rng=rng)
    rate = rates[rates.nominal == 0.01].set_index("null").rejection_rate
    assert (rate[["isotropic", "covariance_matched", "sample_covariance", "weight_noise"]] > 0.8).all()
    assert rate["sign_flips"] > 0.9 and rate["other_prompts"] > 0.8


def test_the_command_writes_tables_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "PLANTED", (0.0, 0.8))
    result = CliRunner().invoke(calibration.app, ["--simulations", "10", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    table, power = (pd.read_csv(tmp_path / "new" / name) for name in ("calibration.csv", "null_power.csv"))
    assert list(table.columns) == COLUMNS and set(table.n_simulations) == {10} and set(power.n_simulations) == {1}
    assert set(power.planted) == set(calibration.PLANTED)
    assert (tmp_path / "new" / "null_power.png").read_bytes().startswith(b"\x89PNG")
    assert "anisotropic_34" in result.output


# -- the committed tables ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return pd.read_csv(ROOT / "docs/data/calibration.csv")


def test_the_committed_calibration_is_complete_and_says_what_is_assumed(committed: pd.DataFrame) -> None:
    assert list(committed.columns) == COLUMNS and (committed.n_simulations >= 2000).all()
    wanted = {(null, world, level) for null in calibration.ASSUMED for world in WORLDS for level in calibration.LEVELS}
    assert set(zip(committed.null, committed.world, committed.nominal, strict=True)) == wanted
    assert len(committed) == len(wanted)
    assumed = [row.world in calibration.ASSUMED[row.null] for row in committed.itertuples()]
    assert committed.assumed.to_list() == assumed


def test_the_committed_rates_are_nominal_where_a_null_assumes_its_world(committed: pd.DataFrame) -> None:
    rows = committed[committed.assumed].to_dict("records")
    assert {row["null"] for row in rows} == set(calibration.ASSUMED)

    def outside(confidence: float) -> list[dict[str, Any]]:
        return [row for row in rows if not _within(row, confidence)]

    together = 1 - 0.001 / len(rows)
    assert outside(together) == [], "99.9 % for all rows together"
    assert len(outside(0.999)) <= stats.binom.ppf(0.999, len(rows), 0.001), "and for each by itself, but for chance"


def _within(row: dict[str, Any], confidence: float) -> bool:
    discrete = row["null"] in DISCRETE
    return within(row["rejection_rate"], row["nominal"], row["n_simulations"], discrete=discrete, confidence=confidence)


def test_the_bound_would_see_a_null_that_is_off() -> None:
    assert within(0.01, 0.01, 2000, discrete=False) and within(0.0078, 0.01, 2000, discrete=True)
    assert not within(0.02, 0.01, 2000, discrete=False) and not within(0.002, 0.01, 2000, discrete=False)
    assert within(0.002, 0.01, 2000, discrete=True) and not within(0.02, 0.01, 2000, discrete=True)


def test_the_committed_tables_show_the_false_alarms_that_the_page_speaks_of(committed: pd.DataFrame) -> None:
    rows = committed[committed.nominal == 0.01].to_dict("records")
    rate: dict[str, dict[str, float]] = {null: {} for null in calibration.ASSUMED}
    for row in rows:
        rate[row["null"]][row["world"]] = row["rejection_rate"]
    assert rate["isotropic"]["anisotropic_2.5"] > rate["isotropic"]["anisotropic_34"] > 0.05
    assert rate["covariance_matched"]["few_prompts"] > 0.02 > rate["sample_covariance"]["few_prompts"]
    assert all(rate[null]["shared_anchor"] > 0.5 for null in rate if null != "other_prompts")
    assert rate["sign_flips"]["runs_alike"] > 0.2 and rate["other_prompts"]["noisier_others"] > 0.02
    power = pd.read_csv(ROOT / "docs/data/null_power.csv")
    for _, line in power[power.nominal == 0.01].groupby(["null", "world"]):
        rates = line.sort_values("planted").rejection_rate
        assert rates.iloc[-1] >= rates.iloc[0] - 0.02


def test_the_table_of_the_page_is_that_of_the_file(committed: pd.DataFrame) -> None:
    page = (ROOT / "docs/nulls.md").read_text(encoding="utf-8")
    rows = committed[committed.nominal == 0.01].set_index(["world", "null"])
    shown = re.findall(r"^\| `(\w[\w.]*)` \|((?: \**[\d.]+\** \|)+)$", page, re.MULTILINE)
    assert [world for world, _ in shown] == list(WORLDS)
    for world, cells in shown:
        for null, cell in zip(calibration.ASSUMED, cells.strip(" |").split("|"), strict=True):
            rate, assumed = rows.loc[(world, null), ["rejection_rate", "assumed"]]
            assert float(cell.strip(" *")) == pytest.approx(100 * rate, abs=0.051)
            assert ("**" in cell) == assumed
