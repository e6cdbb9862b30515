"""Trajectories against closed forms: drift = a·v + b·w, w at right angles to v."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from histories import refused, synthetic
from scipy.stats import sem

from gravlens.activations.residuals import Residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.trajectory import JUDGED_FROM, MEASURES, Trajectory, drifts, follow, measure_drift
from gravlens.directions.vrev import locate_vrev

WIDTH, LAYERS, PROMPTS = 6, 3, 4
DISTANCES = np.array([2.0, 5.0, 0.5])
ANCHOR = np.random.default_rng(0).standard_normal((PROMPTS, LAYERS, WIDTH)) * 3
BASIS = np.linalg.qr(np.random.default_rng(1).standard_normal((LAYERS, WIDTH, WIDTH)))[0]
V, W = BASIS[:, :, 0], BASIS[:, :, 1]  # [layer, d_model], orthonormal


def history(runs: Mapping[str, tuple[float, float]], prompts: str = "probes") -> Residuals:
    """Runs whose drift is `a` of the distance along v and `b` of it along w, at every layer and on average alone."""
    jitter = np.random.default_rng(2).standard_normal((PROMPTS, LAYERS, WIDTH))
    jitter -= jitter.mean(0)
    states = {"witness": ANCHOR + (DISTANCES[:, None] * V), "anchor": ANCHOR}
    for name, (a, b) in runs.items():
        states[name] = ANCHOR + DISTANCES[:, None] * (a * V + b * W) + jitter
    return synthetic(states, prompts=prompts)


def per_layer(trajectory: object, run: str, step: int) -> np.ndarray:
    table = trajectory.table  # pyright: ignore
    rows = table[(table.run == run) & (table.step == step)].sort_values("layer")
    return rows[list(MEASURES)].to_numpy(float)


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.4), (-0.2, 0.1), (1.0, 0.0), (0.0, 0.7), (2.0, -1.0)])
def test_alignment_projection_fraction_and_norm_have_their_closed_form(a: float, b: float) -> None:
    residuals = history({"seed0/5": (a, b)})
    found = per_layer(follow(residuals, locate_vrev(residuals)), "seed0", 5)
    length = math.hypot(a, b)
    wanted = np.stack([np.full(LAYERS, a / length), a * DISTANCES, np.full(LAYERS, a), length * DISTANCES], axis=1)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_named_axes_hold_what_the_table_holds_and_nan_where_a_run_lacks_a_step() -> None:
    residuals = history({"seed0/1": (0.3, 0.4), "seed0/5": (0.6, 0.1), "seed1/5": (0.2, 0.0)})
    followed = follow(residuals, locate_vrev(residuals))
    found = followed.data
    assert dict(found.sizes) == {"run": 2, "prompts": 1, "step": 2, "layer": LAYERS}
    for run, step in (("seed0", 1), ("seed0", 5), ("seed1", 5)):
        rows = found.sel(run=run, step=step, prompts="given").to_dataframe()[list(MEASURES)]
        np.testing.assert_array_equal(rows.to_numpy(), per_layer(followed, run, step))
    assert np.isnan(found.fraction.sel(run="seed1", step=1)).all() and found.judged.dtype == bool
    assert not found.judged.sel(run="seed1", step=1).any()
    assert len(followed.table) == 3 * LAYERS and len(followed.layer_mean) == 3, "what was not measured has no row"


def test_runs_and_steps_of_each_set_keep_their_own_rows() -> None:
    given = history({"b/1": (0.1, 0), "b/5": (0.2, 0), "a/1": (0.3, 0)})
    held_out = history({"a/20": (0.4, 0), "a/1": (0.5, 0)}, "others")
    trajectory = follow([given, held_out], locate_vrev(given), layers_in_mean=[0, 2])
    found = trajectory.layer_mean.set_index(["prompts", "run", "step"]).fraction
    wanted = {("given", "b", 1): 0.1, ("given", "b", 5): 0.2, ("given", "a", 1): 0.3}
    wanted |= {("held_out", "a", 1): 0.5, ("held_out", "a", 20): 0.4}
    assert found.to_dict() == pytest.approx(wanted, abs=1e-6)


def test_a_trajectory_comes_back_from_its_table() -> None:
    residuals = history({"seed0/1": (0.3, 0.4), "seed0/5": (0.6, 0.1), "seed1/5": (0.2, 0.0)})
    followed = follow(residuals, locate_vrev(residuals), layers_in_mean=[0, 2])
    again = Trajectory.from_table(followed.table, layers_in_mean=[0, 2])
    pd.testing.assert_frame_equal(again.table, followed.table)
    pd.testing.assert_frame_equal(again.layer_mean, followed.layer_mean)
    assert Trajectory.from_table(followed.table).layers_in_mean == (0, 1, 2)


def test_the_witness_is_all_the_way_back_and_straight() -> None:
    residuals = history({"seed0/1": (1, 0)})
    residuals.values[2] = residuals.of("witness")
    found = per_layer(follow(residuals, locate_vrev(residuals)), "seed0", 1)
    assert found[:, 0] == pytest.approx(1, abs=1e-6) and found[:, 2] == pytest.approx(1, abs=1e-6)


def test_no_drift_is_fraction_zero_and_has_no_cosine() -> None:
    residuals = history({"seed0/1": (1, 0)})
    residuals.values[2] = residuals.of("anchor")
    table = follow(residuals, locate_vrev(residuals)).table
    assert (table.fraction == 0).all() and (table.drift_norm == 0).all()
    assert table.alignment.isna().all() and not table.judged.any()


def test_the_table_is_tidy() -> None:
    residuals = history({"a/20": (0.1, 0), "a/5": (0.2, 0), "b/5": (0.3, 0)})
    table = follow(residuals, locate_vrev(residuals)).table
    assert list(table.columns.sort_values()) == sorted(["run", "step", "layer", "prompts", "judged", *MEASURES])
    assert len(table) == 3 * LAYERS and not table.duplicated(["run", "step", "layer", "prompts"]).any()
    assert table.layer.dtype == int and table.step.dtype == int and table.judged.dtype == bool
    assert table[table.run == "a"].step.unique().tolist() == [5, 20]
    assert table[(table.run == "a") & (table.step == 5)].fraction.to_numpy() == pytest.approx(0.2, abs=1e-6)
    assert table[(table.run == "b")].fraction.to_numpy() == pytest.approx(0.3, abs=1e-6)


def test_the_mean_over_layers_is_over_the_chosen_layers() -> None:
    residuals = history({"seed0/1": (0, 0)})
    fractions = np.array([0.1, 0.2, 0.9])
    sideways = np.array([0.0, 0.2, 0.9])
    moved = DISTANCES[:, None] * (fractions[:, None] * V + sideways[:, None] * W)
    residuals.values[2] = residuals.of("anchor") + moved
    alignments = fractions / np.hypot(fractions, sideways)
    for chosen in (None, (0, 2), [1], (2, 0)):
        trajectory = follow(residuals, locate_vrev(residuals), layers_in_mean=chosen)
        layers = list(range(LAYERS)) if chosen is None else list(chosen)
        mean = trajectory.layer_mean
        assert trajectory.layers_in_mean == tuple(layers)
        assert mean.fraction.item() == pytest.approx(fractions[layers].mean(), abs=1e-5)
        assert mean.alignment.item() == pytest.approx(alignments[layers].mean(), abs=1e-5)
        assert mean.drift_norm.item() == pytest.approx(
            (np.hypot(fractions, sideways) * DISTANCES)[layers].mean(), abs=1e-5
        )
        assert "layer" not in mean and len(trajectory.table) == LAYERS, "the table has every layer"


def test_the_summary_is_mean_and_sem_over_runs() -> None:
    fractions = {"a": 0.1, "b": 0.2, "c": 0.6}
    runs = {f"{run}/{step}": (f * step, 0.1) for run, f in fractions.items() for step in (1, 2)}
    residuals = history(runs)
    summary = follow(residuals, locate_vrev(residuals)).summary("given")
    assert summary.index.tolist() == [1, 2]
    for step in (1, 2):
        values = np.array(list(fractions.values())) * step
        row = summary.loc[step, "fraction"]
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-5) and row["sem"] == pytest.approx(
            sem(values), abs=1e-5
        )
        cosines = values / np.hypot(values, 0.1)
        row = summary.loc[step, "alignment"]
        assert row["mean"] == pytest.approx(cosines.mean(), abs=1e-5) and row["sem"] == pytest.approx(
            sem(cosines), abs=1e-5
        )


def test_a_mean_over_fewer_runs_says_so() -> None:
    """In the count of the summary, and wherever a trajectory is shown: no silent mean over what is left."""
    residuals = history({"a/1": (0.1, 0.1), "a/5": (0.2, 0.1), "b/5": (0.4, 0.1), "c/5": (0.3, 0.1)})
    trajectory = follow(residuals, locate_vrev(residuals), layers_in_mean=[0, 2])
    assert trajectory.summary()["fraction", "count"].tolist() == [1, 3]
    for shown in (repr(trajectory), trajectory._repr_html_()):
        assert "step 1: 1 of 3 runs" in shown and "mean over the layers 0, 2" in shown and "a, b, c" in shown
        assert "step 5:" not in shown and "judge" not in shown
    whole = history({"a/5": (0.2, 0.1), "b/5": (0.4, 0.1)})
    assert "different runs" not in repr(follow(whole, locate_vrev(whole)))


def test_a_mean_over_drifts_that_are_not_judged_says_so() -> None:
    residuals = history({"a/1": (0.1, 0.1), "b/1": (0.01, 0.0)})
    states = residuals.values.copy()
    states[3] = residuals.of("anchor") + np.float32(0.01) * (residuals.of("witness") - residuals.of("anchor"))
    residuals = dataclasses.replace(residuals, values=states)
    shown = repr(follow(residuals, locate_vrev(residuals)))
    assert "long enough to judge the alignment of only some runs: step 1: 1" in shown


def test_given_and_held_out_prompts_are_told_apart_by_their_digest() -> None:
    given, held_out = history({"a/1": (0.1, 0)}, "probes"), history({"a/1": (0.4, 0)}, "others")
    trajectory = follow([given, held_out], locate_vrev(given))
    fraction = trajectory.table.groupby("prompts").fraction.mean()
    assert fraction["given"] == pytest.approx(0.1, abs=1e-6) and fraction["held_out"] == pytest.approx(0.4, abs=1e-6)
    assert trajectory.summary().loc[1, ("fraction", "mean")] == pytest.approx(0.4, abs=1e-6)
    assert trajectory.summary("given").loc[1, ("fraction", "mean")] == pytest.approx(0.1, abs=1e-6)
    with refused("'held-out'"):
        trajectory.summary("held-out")
    assert set(follow(held_out, locate_vrev(given)).table.prompts) == {"held_out"}
    assert set(follow(given, locate_vrev(given)).table.prompts) == {"given"}


@pytest.mark.parametrize(("share", "judged"), [(0.5, False), (0.99, False), (1.01, True), (50.0, True)])
def test_a_cosine_is_judged_where_the_drift_exceeds_two_percent_of_the_distance(share: float, judged: bool) -> None:
    assert JUDGED_FROM == 0.02
    residuals = history({"a/1": (0.0, share * 0.02)})
    assert set(follow(residuals, locate_vrev(residuals)).table.judged) == {judged}


def test_the_mean_is_judged_where_all_its_layers_are() -> None:
    residuals = history({"a/1": (0.5, 0.0)})
    residuals.values[2][:, 1] = residuals.of("anchor")[:, 1]
    trajectory = follow(residuals, locate_vrev(residuals))
    assert trajectory.table.judged.tolist() == [True, False, True] and not trajectory.layer_mean.judged.item()
    assert follow(residuals, locate_vrev(residuals), layers_in_mean=[0, 2]).layer_mean.judged.item()


def test_undefined_layers_are_left_out_of_the_mean_and_listed() -> None:
    residuals = history({"a/1": (0.25, 0.0)})
    residuals.values[0][:, 1] = residuals.of("anchor")[:, 1]
    vs = locate_vrev(residuals)
    trajectory = follow(residuals, vs)
    assert trajectory.layers_in_mean == (0, 2) and dict(trajectory.undefined) == {1: vs[1].undefined}
    assert trajectory.table.layer.tolist() == [0, 2]
    assert trajectory.table.fraction.to_numpy() == pytest.approx(0.25, abs=1e-5)
    assert follow(residuals, vs, layers_in_mean=[1, 2]).layers_in_mean == (2,)
    with refused("[1]"):
        follow(residuals, vs, layers_in_mean=[1])


def test_two_sets_of_a_kind_are_refused_since_they_would_count_a_run_twice() -> None:
    one, other = (history({"r/1": (0.1, 0.2)}, prompts=name) for name in ("new", "newer"))
    with refused("2 sets of residuals"):
        follow([one, other], locate_vrev(history({})))


@pytest.mark.parametrize(
    ("fact", "one", "other"),
    [
        ("positions", "last", -5),
        ("chat_template", "own", "none"),
        ("chat_template_kwargs", {"enable_thinking": True}, {"enable_thinking": False}),
    ],
)
def test_directions_and_states_that_were_read_differently_are_refused(fact: str, one: object, other: object) -> None:
    residuals = history({"a/1": (0.5, 0.0)})
    first, second = (dataclasses.replace(residuals, meta={**residuals.meta, fact: value}) for value in (one, other))
    if fact != "positions":  # under the same template the same prompts have the same tokens
        second = dataclasses.replace(second, prompts="as others")
    vs = locate_vrev(first)
    with refused(fact.replace("_", " ")):
        follow(second, vs)
    held_out = dataclasses.replace(second, prompts="others")
    with refused(fact.replace("_", " ")):
        follow([first, held_out], vs)
    assert follow(first, vs).table.fraction.to_numpy() == pytest.approx(0.5, abs=1e-6)
    absent = dataclasses.replace(residuals, meta={**residuals.meta, "chat_template": "own"}, prompts="as others")
    if fact == "chat_template_kwargs":
        with refused("chat template kwargs"):
            follow(absent, locate_vrev(dataclasses.replace(residuals, meta={**absent.meta, fact: one})))
    unknown = Directions(tuple(Direction(V[i], i, DISTANCES[i]) for i in range(LAYERS)))
    assert len(follow(second, unknown).table) == LAYERS, "a vector of one's own is not known to differ"


def test_the_last_position_has_two_names() -> None:
    residuals = history({"a/1": (0.5, 0.0)})
    last, minus_one = (
        dataclasses.replace(residuals, meta={"dtype": ["float32"], "positions": p}) for p in ("last", -1)
    )
    assert len(follow(minus_one, locate_vrev(last)).table) == LAYERS


def test_nothing_to_follow_is_an_error() -> None:
    residuals = history({"a/1": (0.5, 0.0)})
    vs = locate_vrev(residuals)
    with refused("no run", "witness"):
        follow(history({}), vs)
    with refused("layer 9"):
        follow(residuals, vs, layers_in_mean=[0, 9])
    with refused("layer 5"):
        follow(residuals, Directions((Direction(V[0], 5, 1.0),)))
    with refused("undefined"):
        follow(residuals, Directions((Direction(np.full(WIDTH, np.nan), 0, 0.0, undefined="no difference"),)))


def test_drifts_are_means_over_prompts_in_order_of_steps_and_layers_asked_for() -> None:
    residuals = history({"a/20": (0.5, 0.0), "a/5": (0.1, 0.0)})
    found = drifts(residuals, "a", (2, 0))
    wanted = np.stack([np.stack([f * DISTANCES[layer] * V[layer] for layer in (2, 0)]) for f in (0.1, 0.5)])
    assert found == pytest.approx(wanted, abs=1e-5)


def test_pitfall_10_drifts_are_accumulated_in_fp64() -> None:
    rng = np.random.default_rng(0)
    anchor = (1e4 + rng.standard_normal((50_000, 1, 2))).astype(np.float32)
    states = {"witness": anchor + 1, "anchor": anchor, "a/1": anchor + np.float32([0.5, 0.25])}
    residuals = synthetic(states)
    exact = [
        math.fsum(residuals.of("a/1")[:, 0, i].tolist()) / 5e4 - math.fsum(anchor[:, 0, i].tolist()) / 5e4
        for i in (0, 1)
    ]
    assert drifts(residuals, "a", (0,))[0, 0] == pytest.approx(exact, abs=1e-9)


def test_a_set_that_was_not_measured_is_never_another_ones_numbers() -> None:
    given = history({"a/1": (0.1, 0)})
    trajectory = follow(given, locate_vrev(given))
    assert trajectory.summary().loc[1, ("fraction", "mean")] == pytest.approx(0.1, abs=1e-6)
    with pytest.raises(GravlensError, match="given") as caught:
        trajectory.summary("held_out")
    assert "'held_out'" in caught.value.given and "given" in caught.value.wanted


def test_the_drift_of_an_unknown_run_is_refused() -> None:
    with refused("'b'"):
        drifts(history({"a/1": (0.1, 0)}), "b", (0,))


def test_measures_keep_any_leading_axes() -> None:
    drift = np.random.default_rng(0).standard_normal((2, 3, LAYERS, WIDTH))
    vs = Directions(tuple(Direction(V[i], i, DISTANCES[i]) for i in range(LAYERS)))
    found = measure_drift(drift, vs)
    assert all(found[name].shape == (2, 3, LAYERS) for name in MEASURES)
    one = drift[1, 2, 1]
    assert found["projection"][1, 2, 1] == pytest.approx(float(one @ V[1]), abs=1e-6)
    assert found["alignment"][1, 2, 1] == pytest.approx(float(one @ V[1] / np.linalg.norm(one)), abs=1e-6)


def test_the_html_is_escaped_and_says_nothing_of_anchors() -> None:
    residuals = history({"<b>a</b>/1": (0.5, 0.0)})
    trajectory = follow(residuals, locate_vrev(residuals))
    html = trajectory._repr_html_()
    assert "anchor" not in html and "runs: " in html
    assert "<b>a" not in html and "&lt;b&gt;a" in html
