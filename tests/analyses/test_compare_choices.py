"""The table over all choices, and its script: planted histories whose verdict does, or does not, depend on it."""

import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from by_layer import stacked
from histories import between, moved, plant, planted_vector, refused, sequence_on_disk, synthetic
from typer.testing import CliRunner, Result

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.directions.covariance import participation_ratio
from gravlens.directions.estimators import first_component, lda
from gravlens.directions.geometry import GEOMETRIES, raw, standardised, whitened, without_top
from gravlens.directions.trajectory import ByLayer, follow
from gravlens.directions.vrev import difference_of_means, locate_vrev
from gravlens.history.sequence import ModelSequence
from gravlens.stats.nulls import isotropic_quantile
from gravlens.stats.robustness import ESTIMATORS, compare_choices, final_choices

SCRIPT = Path(__file__).resolve().parents[2] / "analyses" / "compare_choices.py"
sys.path.append(str(SCRIPT.parent))  # it imports its neighbour, as it does when it is run as a script

import compare_choices as script  # noqa: E402

pytestmark = pytest.mark.long

WIDTH, PROMPTS, ROGUE = 10, 24, 3
WAY = np.eye(WIDTH)[0]


def states(
    *, share: float = 0.5, rogue: float = 0.0, against: float = 0.0, prompts: str = "probes", seed: int = 0
) -> Residuals:
    """Two layers; two runs go `share` of the witness's way, less `against` times as far the other way. `rogue`: witness
    and runs also move along one dimension, which varies fiftyfold."""
    rng = np.random.default_rng(seed)
    spread = np.where(np.arange(WIDTH) == ROGUE, 50.0, 1.0)
    anchor = rng.standard_normal((PROMPTS, 2, WIDTH)) * (spread if rogue else 1.0)
    named = {"witness": anchor + 2 * WAY, "anchor": anchor}
    for run in ("a", "b"):
        for step, part in ((5, share / 2), (20, share)):
            named[f"{run}/{step}"] = anchor + part * (1 - against) * 2 * WAY
    for number, name in enumerate(named):
        named[name] = named[name] + (number != 1) * rogue * np.eye(WIDTH)[ROGUE]
        named[name] += 0.05 * rng.standard_normal(anchor.shape)
    return synthetic(named, prompts=prompts)


def test_every_choice_every_run_step_and_layer_has_one_row() -> None:
    table = stacked(compare_choices(states(), states(seed=1, prompts="others")))
    assert len(table) == len(ESTIMATORS) * len(GEOMETRIES) * 2 * 2 * 3
    key = ["estimator", "geometry", "run", "prompts", "step", "layer"]
    assert not table.duplicated(key).any() and list(table.columns[:6]) == key
    assert set(table["estimator"]) == {estimator.__name__ for estimator in ESTIMATORS}
    assert set(table["geometry"]) == {
        "raw", "centred", "standardised", "whitened", "without_top_1", "without_top_3"
    }  # fmt: skip
    assert set(table["prompts"]) == {"held_out"} and table["judged"].all()
    assert set(compare_choices(states(), estimators=ESTIMATORS[:1]).table["prompts"]) == {"given"}


def test_the_usual_choice_is_the_trajectory() -> None:
    given, held_out = states(), states(seed=1, prompts="others")
    table = stacked(compare_choices(given, held_out, layers_in_mean=[1]))
    usual = table[(table["estimator"] == "difference_of_means") & (table["geometry"] == "raw")]
    wanted = stacked(follow(held_out, locate_vrev(given), layers_in_mean=[1]))
    for name in ("alignment", "fraction"):
        assert usual[name].to_numpy() == pytest.approx(wanted[name].to_numpy())
    assert usual["layer"].isna().tolist() == wanted["layer"].isna().tolist()


def test_a_choice_is_the_trajectory_of_the_mapped_states() -> None:
    given, held_out = states(), states(seed=1, prompts="others")
    table = stacked(compare_choices(given, held_out))
    found = table[(table["estimator"] == "lda") & (table["geometry"] == "standardised")]
    geometry = standardised(given)
    vs = locate_vrev(geometry.apply(given), estimator=lda)
    wanted = stacked(follow(geometry.apply(held_out), vs))
    assert found["alignment"].to_numpy() == pytest.approx(wanted["alignment"].to_numpy())
    assert found["fraction"].to_numpy() == pytest.approx(wanted["fraction"].to_numpy())
    single = found[found["layer"].notna() & (found["step"] == 5) & (found["run"] == "a")]
    assert single["reliability"].tolist() == [v.reliability for v in vs]
    mean = found.loc[found["layer"].isna(), "reliability"]
    assert mean.to_numpy() == pytest.approx(np.mean([v.reliability for v in vs]))


def test_witness_alignment_is_the_alignment_of_a_run_that_goes_straight_back() -> None:
    given = states(rogue=3.0)
    straight = synthetic({name: given.of({"a/5": "witness"}.get(name, name)) for name in ("witness", "anchor", "a/5")})
    table = stacked(compare_choices(straight))
    assert len(table) == 90 and table["fraction"].to_numpy() == pytest.approx(1, abs=1e-4)
    assert table["witness_alignment"].to_numpy() == pytest.approx(table["alignment"].to_numpy(), abs=1e-4)
    by = table.groupby("estimator")["witness_alignment"].min()
    assert by["difference_of_means"] == pytest.approx(1) and by["lda"] < 0.9


def test_what_stands_beside_an_alignment() -> None:
    given = states(rogue=20.0)
    table = stacked(compare_choices(given, layers_in_mean=[0]))
    p99 = table.set_index(["geometry", "layer"])["isotropic_p99"]
    assert p99["raw", 0].to_numpy() == pytest.approx(isotropic_quantile(0.99, WIDTH))
    assert table.loc[(table["geometry"] != "raw") | table["layer"].isna(), "isotropic_p99"].isna().all()
    ratios = table.groupby(["geometry", "layer"])["participation_ratio"].agg(["min", "max"])
    assert (ratios["min"] == ratios["max"]).all()  # it is the geometry's, not the estimator's
    by_hand = np.cov(given.of("anchor")[:, 1].astype(float).T)
    assert ratios.loc[("raw", 1), "min"] == pytest.approx(np.trace(by_hand) ** 2 / (by_hand**2).sum())
    white = whitened(given).apply(given).of("anchor")[:, 0]
    assert ratios.loc[("whitened", 0), "min"] == pytest.approx(participation_ratio(white))
    assert ratios.loc[("raw", 0), "min"] < 1.1 < 5 < ratios.loc[("standardised", 0), "min"]
    means = table[table["layer"].isna()].groupby("geometry")["participation_ratio"].first()
    assert means["raw"] == ratios.loc[("raw", 0), "min"]  # of the layers in the mean


def test_no_choice_turns_a_verdict_that_is_everywhere() -> None:
    final = final_choices(compare_choices(states(), states(seed=1, prompts="others")))
    assert len(final) == 30 and (final["alignment"] > 0.5).all() and final["judged"].all()
    assert final["fraction"].to_numpy() == pytest.approx(0.5, abs=0.1)


def test_a_verdict_that_a_rogue_dimension_carries_is_turned_by_the_geometry() -> None:
    """All dimensions but one say that the runs move away from the witness; raw geometry hears only that one."""
    pair = states(rogue=60.0, against=2.0), states(rogue=60.0, against=2.0, seed=1, prompts="others")
    final = final_choices(compare_choices(*pair, estimators=[difference_of_means])).set_index("geometry")["alignment"]
    assert final["raw"] > 0.9 and final["centred"] > 0.9
    assert final["without_top_1"] < -0.3 and final["standardised"] < final["raw"] - 0.5


def test_the_last_step_is_each_runs_own_and_runs_are_averaged() -> None:
    given = states()
    names = [name for name in given.checkpoints if name != "b/20"]
    fewer = Residuals(np.stack([given.of(name) for name in names]), tuple(names), given.layers, given.prompts)
    choices = compare_choices(fewer, geometries=[raw], estimators=[difference_of_means])
    means = choices.layer_mean.set_index(["run", "step"])["fraction"]
    final = final_choices(choices)
    assert final["fraction"].item() == pytest.approx((means["a", 20] + means["b", 5]) / 2)
    assert final["runs"].item() == 2 and final["layers"].item() == 2


# -- choices without a direction, and layers without one ---------------------------------------------------------------


def test_a_choice_without_a_direction_is_empty_and_the_others_stand() -> None:
    """The anchor's states vary in two dimensions, and the witness moves within them: without them there is rounding."""
    rng = np.random.default_rng(0)
    anchor = np.zeros((PROMPTS, 2, WIDTH))
    anchor[..., :2] = rng.standard_normal((PROMPTS, 2, 2)) * [30, 10]
    witness = anchor + 0
    witness[:, 0, 1] += 5
    witness[:, 1, 0] += 5
    given = synthetic({"witness": witness, "anchor": anchor, "a/5": (witness + anchor) / 2})
    choices = compare_choices(given, geometries=[raw, partial(without_top, k=2)], estimators=ESTIMATORS[:2])
    table = stacked(choices)
    gone = table[table["geometry"] == "without_top_2"]
    assert gone["alignment"].isna().all() and gone["fraction"].isna().all() and (gone["layers"] == 0).all()
    assert not gone["judged"].any() and gone["layer"].isna().all() and set(gone["run"]) == {"a"}
    assert table.loc[table["geometry"] == "raw", "alignment"].to_numpy() == pytest.approx(1, abs=1e-5)
    final = final_choices(choices).set_index("geometry")
    assert final.loc["without_top_2", "alignment"].isna().all() and (final.loc["raw", "layers"] == 2).all()


def test_a_layer_without_v_rev_is_left_out_under_every_choice() -> None:
    """Whitening lengthens what differs by rounding alone; it must not become a layer of the mean."""
    given = states()
    given.values[:, :, 0] = given.of("anchor")[:, 0]
    given.values[0, :, 0] += 1e-6
    table = stacked(compare_choices(given))
    assert set(table["layer"].dropna()) == {1} and set(table["layers"]) == {1}
    with refused("no direction of layer 0"):
        compare_choices(given, layers_in_mean=[0])


def test_no_run_is_one_clear_error() -> None:
    given = states()
    pair = Residuals(given.values[:2], given.checkpoints[:2], given.layers, given.prompts)
    with refused("hold no run"):
        compare_choices(pair)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The witness is the anchor moved by a vector at the last layer; both runs go back some of that way."""
    folder, anchor = tmp_path_factory.mktemp("planted"), tiny.gpt2()
    witness = plant(anchor, planted_vector(4, length=6.0), layer=tiny.LAYERS - 1)
    models: dict[str, Any] = {"witness": witness, "anchor": anchor}
    for name, seed in (("a", 1), ("b", 2)):
        models[f"{name}/checkpoint-5"] = moved(anchor, seed=seed, by=0.02)
        models[f"{name}/checkpoint-20"] = moved(between(anchor, witness, 0.4), seed=seed, by=0.02)
    return sequence_on_disk(folder, models, runs={"a": "a/checkpoint-*", "b": "b/checkpoint-*"})


def ran(history: Path, *options: str) -> Result:
    command = [str(history / "SEQUENCE.toml"), "--out", str(history / "out"), *options]
    return CliRunner().invoke(script.app, command, env={"COLUMNS": "400"})


def test_the_table_the_figure_and_the_verdict_of_a_planted_history(planted: Path) -> None:
    result = ran(planted)
    assert result.exit_code == 0, result.output
    found, means = (pd.read_csv(planted / "out" / f"{name}.csv") for name in ("choices", "choices_layer_mean"))
    history = ModelSequence.from_toml(planted / "SEQUENCE.toml")
    assert history.held_out is not None
    wanted = compare_choices(cache_residuals(history), cache_residuals(history, history.held_out))
    pd.testing.assert_frame_equal(found, wanted.table, check_dtype=False, rtol=1e-4)
    pd.testing.assert_frame_equal(means, wanted.layer_mean, check_dtype=False, rtol=1e-4)
    assert set(found["layer"]) == {tiny.LAYERS - 1}  # elsewhere witness and anchor are the same
    assert (planted / "out" / "choices.png").read_bytes().startswith(b"\x89PNG")
    final = final_choices(wanted)
    assert (final["alignment"] > 0).all() and result.stdout.startswith("over 30 choices the sign is the same in all: ")
    range_ = f"between {final['alignment'].min():+.2f} ({{}}) and {final['alignment'].max():+.2f} ({{}})"
    least, most = (
        final.loc[row, "estimator"].replace("_", " ") + ", " + final.loc[row, "geometry"].replace("_", " ")
        for row in (final["alignment"].idxmin(), final["alignment"].idxmax())
    )
    assert range_.format(least, most) in result.stdout


def test_another_sign_and_what_is_missing_are_named() -> None:
    table = pd.DataFrame(
        {
            "estimator": ["difference_of_means", "difference_of_means", "lda", "lda"],
            "geometry": ["raw", "whitened", "raw", "whitened"],
            "run": "a", "step": 5, "prompts": "given",
            "alignment": [0.6, -0.2, 0.3, np.nan], "fraction": [0.5, -0.1, 0.2, np.nan],
            "judged": [True, True, False, False], "layers": [1, 1, 1, 0], "reliability": 1.0, "witness_alignment": 1.0,
        }
    )  # fmt: skip
    words = script.summary(ByLayer(table[:0], table))
    assert words.startswith("over 3 choices the sign is another in difference of means, whitened: ")
    assert "between -0.20 (difference of means, whitened) and +0.60 (difference of means, raw)" in words
    assert "without a direction: lda, whitened" in words and "too small to judge in lda, raw" in words


def test_layers_components_and_prompts_are_ones_own(planted: Path) -> None:
    last = str(tiny.LAYERS - 1)
    options = ["--layer", last, "--remove", "2", "--prompts", str(planted / "probes.jsonl"), "--max-prompts", "5"]
    result = ran(planted, *options)
    assert result.exit_code == 0, result.output
    found = pd.read_csv(planted / "out" / "choices.csv")
    assert {name for name in found["geometry"] if name.startswith("without")} == {"without_top_2"}
    history = ModelSequence.from_toml(planted / "SEQUENCE.toml")
    every_other = cache_residuals(history, history.require_probes()[::2], layers=[tiny.LAYERS - 1])
    given = cache_residuals(history, layers=[tiny.LAYERS - 1])
    wanted = compare_choices(given, every_other, geometries=[raw], estimators=[first_component]).table
    rows = found[(found["estimator"] == "first_component") & (found["geometry"] == "raw")]
    assert rows["alignment"].to_numpy() == pytest.approx(wanted["alignment"].to_numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--layer", "7"], "Layer 7"), (["--layer", "0"], "undefined at layer 0"), (["--remove", "9"], "first 9")],
)
def test_bad_input_is_one_message(planted: Path, options: list[str], named: str) -> None:
    result = ran(planted, *options)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert named in re.sub(r"[\s│]+", " ", result.output)


def test_a_history_without_runs_is_one_message(planted: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(planted, tmp_path / "alone"))
    toml = alone / "SEQUENCE.toml"
    toml.write_text(toml.read_text().split("[runs]")[0])
    result = ran(alone)
    assert result.exit_code == 2 and "hold no run" in re.sub(r"[\s│]+", " ", result.output)


def test_help_says_what_a_newcomer_needs() -> None:
    shown = CliRunner().invoke(script.app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(word in shown for word in ("--layer", "--remove", "--prompts", "depend on how v_rev is estimated"))
    assert SCRIPT.read_text().startswith('"""python analyses/compare_choices.py SEQUENCE.toml ')
