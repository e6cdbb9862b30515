"""Nulls: draws against geometry, hand-made vectors and brute force; p-values against counting."""

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from by_layer import stacked
from histories import refused, synthetic
from scipy import stats

from gravlens.activations.residuals import Residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import shrunk_covariance
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.subspaces import random_like
from gravlens.directions.trajectory import ByLayer, Trajectory, drift_per_prompt, follow
from gravlens.directions.vrev import difference_of_means, direction_from, locate_vrev
from gravlens.stats.nulls import (
    NullDraws,
    compare,
    covariance_matched,
    isotropic,
    isotropic_p_value,
    isotropic_quantile,
    other_prompts,
    p_value,
    sample_covariance,
    sign_flips,
    swapped_labels,
)
from gravlens.stats.permutation import ALL_SIGNS_UP_TO


def random_vs(width: int = tiny.WIDTH, layers: int = tiny.LAYERS, seed: int = 0) -> Directions:
    rng = np.random.default_rng(seed)
    return Directions(tuple(direction_from(rng.standard_normal(width), layer=layer) for layer in range(layers)))


# -- isotropic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cosine", [-1.0, -0.8, -0.1, 0.0, 0.3, 0.99, 1.0])
def test_in_two_dimensions_it_is_an_angle_and_in_three_a_height(cosine: float) -> None:
    assert isotropic_p_value(cosine, 2) == pytest.approx(math.acos(cosine) / math.pi, abs=1e-12)
    assert isotropic_p_value(cosine, 3) == pytest.approx((1 - cosine) / 2, abs=1e-12)


@pytest.mark.parametrize("width", [2, 3, 8, 64])
def test_closed_form_and_draws_are_the_distribution_of_random_unit_vectors(width: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2000, width))
    fixed = rng.standard_normal(width)
    cosines = vectors @ fixed / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(fixed))
    below = np.vectorize(lambda cosine: 1 - isotropic_p_value(float(cosine), width))
    assert stats.kstest(cosines, below).pvalue > 0.01
    for coherent in (True, False):
        drawn = isotropic(random_vs(width), steps=(1,), draws=2000, rng=rng, coherent=coherent).cosines
        assert all(stats.kstest(drawn[:, 0, layer], below).pvalue > 0.003 for layer in range(drawn.shape[2]))


@pytest.mark.parametrize("width", [2, 5, 128, 4096])
@pytest.mark.parametrize("probability", [0.001, 0.2, 0.5, 0.8, 0.99])
def test_quantile_and_p_value_are_inverse_and_mirrored(width: int, probability: float) -> None:
    quantile = isotropic_quantile(probability, width)
    assert isotropic_p_value(quantile, width) == pytest.approx(1 - probability, abs=1e-9)
    assert isotropic_quantile(1 - probability, width) == pytest.approx(-quantile, abs=1e-12)
    assert isotropic_p_value(-quantile, width) == pytest.approx(probability, abs=1e-9)
    assert (quantile > 0) == (probability > 0.5) and (quantile < 0) == (probability < 0.5)


@pytest.mark.parametrize(("width", "p99"), [(128, 0.2046), (4096, 0.0363)])
def test_its_p99_is_nearly_vacuous(width: int, p99: float) -> None:
    assert isotropic_quantile(0.99, width) == pytest.approx(p99, abs=1e-4)
    assert isotropic_quantile(0.99, width) == pytest.approx(stats.norm.ppf(0.99) / math.sqrt(width), rel=0.01)


def test_one_drift_for_all_layers_has_the_directions_own_correlations() -> None:
    """In closed form: the mean of cosines with unit vectors v_l is ‖mean v‖ times the cosine with their mean."""
    rng, width = np.random.default_rng(0), 64
    shared = rng.standard_normal(width)
    vs = Directions(tuple(direction_from(shared + 0.3 * rng.standard_normal(width), layer=i) for i in range(6)))
    found = isotropic(vs, steps=(1,), draws=20_000, rng=rng).cosines[:, 0]
    gram = vs.vectors @ vs.vectors.T
    assert gram[~np.eye(6, dtype=bool)].min() > 0.8
    np.testing.assert_allclose(np.corrcoef(found.T), gram, atol=0.01)
    mean = found.mean(1) / np.linalg.norm(vs.vectors.mean(0))
    below = np.vectorize(lambda cosine: 1 - isotropic_p_value(float(cosine), width))
    assert stats.kstest(mean, below).pvalue > 0.01
    p99 = np.linalg.norm(vs.vectors.mean(0)) * isotropic_quantile(0.99, width)
    assert np.quantile(found.mean(1), 0.99) == pytest.approx(p99, rel=0.03)


def test_more_layers_than_dimensions_leave_nothing_across() -> None:
    vs = random_vs(2, layers=5)
    found = isotropic(vs, steps=(1,), draws=50, rng=np.random.default_rng(0)).cosines[:, 0]
    drift = np.linalg.lstsq(vs.vectors.astype(float), found.T, rcond=None)[0]
    assert np.linalg.norm(drift, axis=0) == pytest.approx(1, abs=1e-5), "the cosines are those of one unit vector"


def test_independent_layers_have_a_narrower_null_of_their_mean() -> None:
    vs = random_vs(64, layers=9)
    draws = isotropic(vs, steps=(1, 5), draws=20_000, rng=np.random.default_rng(0), coherent=False)
    assert draws.name == "isotropic_independent"
    assert draws.cosines.shape == (20_000, 2, 9) and (draws.steps, draws.layers) == ((1, 5), tuple(range(9)))
    flat = draws.cosines.reshape(20_000, -1)
    assert np.abs(np.corrcoef(flat.T) - np.eye(18)).max() < 0.03
    one, mean = np.quantile(flat[:, 0], 0.99), np.quantile(draws.cosines[:, 0].mean(1), 0.99)
    assert mean == pytest.approx(one / 3, rel=0.06)


def test_isotropic_is_drawn_for_defined_layers_and_reproduced_by_its_generator() -> None:
    undefined = Direction(np.full(tiny.WIDTH, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((random_vs()[0], undefined, random_vs()[2]))
    draws = [isotropic(vs, steps=(1,), draws=7, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0].layers == (0, 2) and draws[0].cosines.shape == (7, 1, 2) and np.isfinite(draws[0].cosines).all()
    assert np.array_equal(draws[0].cosines, draws[1].cosines)
    assert not np.array_equal(draws[0].cosines, draws[2].cosines)


# -- drifts from a covariance ------------------------------------------------------------------------------------------


def states_of(n: int, *, layers: int = 1, width: int = 8, seed: int = 0) -> np.ndarray:
    """Anisotropic states [sample, layer, d_model], far from the origin."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, layers, width)) * np.arange(width, 0, -1) ** 1.5 + 20


@pytest.mark.parametrize("centred", [True, False])
def test_covariance_matched_drifts_are_normal_with_the_shrunk_covariance(centred: bool) -> None:
    rng = np.random.default_rng(0)
    states, vs = states_of(10), random_vs(8, layers=1)
    covariance = shrunk_covariance(states[:, 0], centred=centred)
    drifts = rng.multivariate_normal(np.zeros(8), covariance, 4000)
    wanted = drifts @ vs[0].vector / np.linalg.norm(drifts, axis=1)
    found = covariance_matched(vs, states, steps=(1, 5), draws=2000, rng=rng, centred=centred)
    assert (found.name, found.steps, found.layers) == ("covariance_matched", (1, 5), (0,))
    assert found.cosines.shape == (2000, 2, 1)
    assert stats.kstest(found.cosines.ravel(), wanted).pvalue > 0.01
    assert stats.kstest(isotropic(vs, steps=(1,), draws=4000, rng=rng).cosines.ravel(), wanted).pvalue < 1e-3


def test_sample_covariance_drifts_are_random_mixtures_of_the_states() -> None:
    rng = np.random.default_rng(0)
    states, vs = states_of(6), random_vs(8, layers=1)
    twins = [random_like(vs, rng=rng, states=states)[0].vector @ vs[0].vector for _ in range(2000)]
    found = sample_covariance(vs, states, steps=(1,), draws=4000, rng=rng)
    assert found.name == "sample_covariance" and stats.kstest(found.cosines.ravel(), twins).pvalue > 0.01
    shrunk = covariance_matched(vs, states, steps=(1,), draws=4000, rng=rng)
    assert stats.kstest(shrunk.cosines.ravel(), twins).pvalue < 0.01, "shrinkage is another null"


@pytest.mark.parametrize(("null", "at_least"), [(covariance_matched, 0.3), (sample_covariance, 0.99)])
def test_layers_of_a_draw_go_together_as_the_states_do_and_steps_do_not(null: Any, at_least: float) -> None:
    states = states_of(40, layers=2)
    states[:, 1] = states[:, 0]
    vs = Directions((random_vs(8)[0], direction_from(random_vs(8)[0].vector, layer=1)))
    cosines = null(vs, states, steps=(1, 5), draws=3000, rng=np.random.default_rng(0)).cosines
    between = np.corrcoef(cosines.reshape(3000, -1).T)  # step by step, layer by layer
    assert between[0, 1] > at_least and between[2, 3] > at_least, "what shrinkage adds is each layer's own"
    assert np.abs(between[:2, 2:]).max() < 0.06


def test_it_is_wide_where_few_directions_carry_the_variance() -> None:
    width, p99 = 64, []
    for power in (0.0, 1.0, 2.0):
        rng = np.random.default_rng(0)
        spread = np.arange(1.0, width + 1) ** (-power / 2)
        states = spread * rng.standard_normal((500, 40, width))
        vs = Directions(tuple(direction_from(spread * rng.standard_normal(width), layer=i) for i in range(40)))
        null = covariance_matched(vs, states, steps=(1,), draws=200, rng=rng)
        p99.append(np.quantile(null.cosines, 0.99))
    assert p99[0] == pytest.approx(isotropic_quantile(0.99, width), rel=0.1)
    assert p99[1] > 1.5 * p99[0] and p99[2] > 1.3 * p99[1]


@pytest.mark.parametrize("null", [covariance_matched, sample_covariance])
def test_an_undefined_layer_takes_its_states_along(null: Any) -> None:
    undefined = Direction(np.full(8, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((random_vs(8)[0], undefined, random_vs(8)[2]))
    states = states_of(9, layers=3)
    found, wanted = (
        null(one, given, steps=(1,), draws=5, rng=np.random.default_rng(0))
        for one, given in [(vs, states), (vs.defined(), states[:, [0, 2]])]
    )
    assert found.layers == (0, 2) and np.array_equal(found.cosines, wanted.cosines)
    with refused("4 layers", "(2 defined)"):
        null(vs, states_of(9, layers=4), steps=(1,), draws=5, rng=np.random.default_rng(0))


def test_anisotropic_drifts_alarm_the_isotropic_null_and_not_the_matched_ones() -> None:
    rng = np.random.default_rng(3)
    spread, layers = np.arange(1.0, 33) ** -1.0, 400  # a layer is a history of its own
    vs = Directions(tuple(direction_from(spread * rng.standard_normal(32), layer=i) for i in range(layers)))
    drifts = spread * rng.standard_normal((layers, 32))
    cosines = (drifts * vs.vectors).sum(1) / np.linalg.norm(drifts, axis=1)
    states = spread * rng.standard_normal((100, layers, 32))
    given = {"steps": (1,), "draws": 99, "rng": rng}
    for null, size in [
        (isotropic(vs, **given), None),
        (covariance_matched(vs, states, **given), 0.05),
        (sample_covariance(vs, states, **given), 0.05),
    ]:
        p = np.array([p_value(drawn, one) for drawn, one in zip(null.cosines[:, 0].T, cosines, strict=True)])
        rejected = int((p <= 0.05).sum())
        if size is None:
            assert rejected > 0.25 * layers
        else:
            assert stats.binomtest(rejected, layers, size).pvalue > 0.001
    towards = covariance_matched(vs, states, **given)
    assert np.mean([p_value(drawn, 0.99) for drawn in towards.cosines[:, 0].T]) < 0.03


def test_what_all_prompts_share_is_in_the_uncentred_null_itself() -> None:
    rng, v = np.random.default_rng(1), random_vs(16, layers=1)
    common = v[0].vector + rng.standard_normal(16) / 4  # of about equal length
    drifts = common + 0.05 * rng.standard_normal((30, 1, 16))
    given = {"steps": (1,), "draws": 199, "rng": rng}
    cosine = float(drifts.mean(0)[0] @ v[0].vector / np.linalg.norm(drifts.mean(0)))
    about_zero = covariance_matched(v, drifts, **given, name="drifts", centred=False)
    assert 0.6 < cosine < 0.9 and about_zero.name == "drifts"
    assert p_value(about_zero.cosines[:, 0, 0], cosine) > 0.1
    assert p_value(covariance_matched(v, drifts, **given).cosines[:, 0, 0], cosine) < 0.01


# -- signs of runs -----------------------------------------------------------------------------------------------------


def runs_of(cosines: np.ndarray, steps: tuple[int, ...] = (1,)) -> Trajectory:
    """Runs with chosen alignments [run, step, layer], held out."""
    rows = [
        {"run": f"run{i:02}", "step": step, "layer": layer, "prompts": "held_out", "alignment": value}
        for i, run in enumerate(cosines)
        for step, values in zip(steps, run, strict=True)
        for layer, value in enumerate(values)
    ]
    return Trajectory.from_table(pd.DataFrame(rows).assign(drift_norm=1.0))


@pytest.mark.parametrize("n", [1, 2, 5, 7, ALL_SIGNS_UP_TO])
def test_sign_flips_of_few_runs_are_exact(n: int) -> None:
    cosines = np.random.default_rng(n).normal(0.2, 0.3, (n, 2, 3))
    trajectory = runs_of(cosines, (5, 20))
    null = sign_flips(trajectory, draws=1, rng=np.random.default_rng(0))
    assert (null.of, null.run, null.steps, null.layers) == ("mean", None, (5, 20), (0, 1, 2))
    assert len(null.cosines) == 2**n - 1
    table = stacked(compare(trajectory, null))
    assert table.run.unique().tolist() == ["mean"] and len(table) == 2 * 4
    for row in table.to_dict("records"):
        values = cosines[:, (5, 20).index(row["step"])]
        values = values.mean(1) if pd.isna(row["layer"]) else values[:, row["layer"]]
        means = [np.mean(np.multiply(signs, values)) for signs in itertools.product((1, -1), repeat=n)]
        assert row["alignment"] == pytest.approx(values.mean())
        assert row["p_value"] == pytest.approx(np.mean(np.array(means) >= values.mean() - 1e-9))


def test_sign_flips_agree_with_scipy() -> None:
    values = np.random.default_rng(4).normal(0.1, 0.3, 9)
    trajectory = runs_of(values[:, None, None])
    found = compare(trajectory, sign_flips(trajectory, draws=1, rng=np.random.default_rng(0))).table.p_value.iloc[0]
    test = stats.permutation_test((values,), np.mean, permutation_type="samples", alternative="greater")
    assert 0.01 < found == pytest.approx(test.pvalue)


@pytest.mark.parametrize(("n", "p"), [(5, 1 / 32), (6, 1 / 64), (7, 1 / 128)])
def test_seven_runs_are_needed_for_a_p_below_one_percent(n: int, p: float) -> None:
    all_there, none_there = runs_of(np.full((n, 1, 1), 0.6)), runs_of(np.full((n, 1, 1), -0.6))
    for trajectory, wanted in [(all_there, p), (none_there, 1.0)]:
        table = stacked(compare(trajectory, sign_flips(trajectory, draws=1, rng=np.random.default_rng(0))))
        assert table.p_value.to_list() == [wanted] * 2


def test_many_runs_are_flipped_at_random() -> None:
    trajectory = runs_of(np.random.default_rng(0).normal(0.0, 0.3, (ALL_SIGNS_UP_TO + 1, 1, 2)))
    nulls = [sign_flips(trajectory, draws=3000, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert nulls[0].cosines.shape == (3000, 1, 2)
    assert np.array_equal(nulls[0].cosines, nulls[1].cosines) and not np.array_equal(nulls[0].cosines, nulls[2].cosines)
    values = trajectory.table[trajectory.table.layer == 0].alignment.to_numpy()
    spread = np.sqrt((values**2).sum()) / len(values)
    drawn = nulls[0].cosines[:, 0, 0]
    assert drawn.std() == pytest.approx(spread, rel=0.05) and abs(drawn.mean()) < 0.1 * spread


def test_a_run_flips_as_a_whole() -> None:
    values = np.random.default_rng(0).uniform(0.1, 1, (4, 1, 1)) * np.ones((4, 2, 3))
    drawn = sign_flips(runs_of(values, (1, 5)), draws=1, rng=np.random.default_rng(0)).cosines
    assert (drawn == drawn[:, :1, :1]).all() and len(np.unique(drawn[:, 0, 0])) == 15


def test_only_common_steps_are_flipped_and_a_still_run_leaves_no_mean() -> None:
    trajectory = runs_of(np.full((3, 2, 1), 0.5), (1, 5))
    table = trajectory.table[(trajectory.table.run != "run01") | (trajectory.table.step == 5)]
    fewer = Trajectory.from_table(table)
    null = sign_flips(fewer, draws=1, rng=np.random.default_rng(0))
    assert null.steps == (5,) and stacked(compare(fewer, null)).p_value.to_list() == [1 / 8] * 2
    still = runs_of(np.array([0.5, np.nan, 0.5])[:, None, None])
    table = stacked(compare(still, sign_flips(still, draws=1, rng=np.random.default_rng(0))))
    assert table.alignment.isna().all() and table.p_value.to_list() == [1, 1]
    with refused("['run00', 'run01', 'run02']", "given"):
        sign_flips(trajectory, prompts="given", draws=1, rng=np.random.default_rng(0))
    with refused("no held_out step in common"):
        apart = trajectory.table[(trajectory.table.run == "run00") == (trajectory.table.step == 1)]
        sign_flips(Trajectory.from_table(apart), draws=1, rng=np.random.default_rng(0))


# -- labels of probes --------------------------------------------------------------------------------------------------


def sets_of(
    n_probes: int = 5, n_held_out: int = 4, *, towards: float = 0.0, seed: int = 0
) -> tuple[Residuals, Residuals]:
    """Probes with witness and anchor, held-out prompts with a run; `towards` of the drift's length along v_rev."""
    rng = np.random.default_rng(seed)
    witness, anchor = rng.standard_normal((2, n_probes, 3, WIDTH))
    v = (witness - anchor).mean(0) / np.linalg.norm((witness - anchor).mean(0), axis=-1, keepdims=True)
    start = rng.standard_normal((n_held_out, 3, WIDTH))
    drift = rng.standard_normal((2, n_held_out, 3, WIDTH)) / np.sqrt(WIDTH) + towards * v
    probes = synthetic({"witness": witness, "anchor": anchor})
    runs = {"anchor": start, "a/1": start + drift[0], "a/5": start + drift[1], "b/1": start - drift[0]}
    return probes, synthetic(runs, prompts="others")


def test_swapped_labels_are_those_of_probes_swapped_by_hand() -> None:
    probes, held_out = sets_of()
    null = swapped_labels(probes, held_out, run="a", draws=1, rng=np.random.default_rng(0))
    assert (null.run, null.of, null.steps, null.layers) == ("a", "run", (1, 5), (0, 1, 2))
    witness, anchor = probes.of("witness").astype(np.float64), probes.of("anchor").astype(np.float64)
    distance = np.linalg.norm((witness - anchor).mean(0), axis=-1)
    drift = np.stack([drift_per_prompt(held_out, f"a/{step}", (0, 1, 2)).mean(0) for step in (1, 5)])
    by_hand = []
    for swapped in itertools.product((False, True), repeat=5):
        chosen = np.array(swapped)[:, None, None]
        states = np.where(chosen, anchor, witness), np.where(chosen, witness, anchor)
        v = np.stack([difference_of_means(states[0][:, layer], states[1][:, layer]) for layer in range(3)])
        by_hand.append((drift * v).sum(-1) / np.linalg.norm(drift, axis=-1) / distance)
    assert null.cosines == pytest.approx(np.stack(by_hand[1:]), abs=1e-9)
    alignment = follow(held_out, locate_vrev(probes)).table.query("run == 'a'").alignment
    assert by_hand[0].ravel() == pytest.approx(alignment.to_numpy(), abs=1e-6), "nothing swapped is the alignment"


def test_a_direction_that_probes_agree_on_exceeds_swapped_labels_and_one_of_chance_does_not() -> None:
    for towards, p in [(0.0, None), (1.0, 0.01)]:
        probes, held_out = sets_of(30, towards=towards, seed=1)
        null = swapped_labels(probes, held_out, run="a", draws=500, rng=np.random.default_rng(0))
        table = stacked(compare(follow(held_out, locate_vrev(probes)), null))
        assert table.run.unique().tolist() == ["a"] and len(table) == 2 * 4
        assert (table.p_value < p).all() if p else table.p_value.between(0.02, 0.98).all()


def test_labels_are_swapped_on_other_prompts_than_the_drift_is_of() -> None:
    probes, held_out = sets_of()
    with refused("of the same prompts (probes)"):
        swapped_labels(probes, probes, run="a", draws=3, rng=np.random.default_rng(0))
    with refused("no run 'c'"):
        swapped_labels(probes, held_out, run="c", draws=3, rng=np.random.default_rng(0))


# -- other prompts -----------------------------------------------------------------------------------------------------


def two_sets(*, towards: float = 0.0, n: int = 4, seed: int = 0) -> tuple[Residuals, Residuals, Directions]:
    """A run on two sets of prompts, `towards` v_rev on the first; layer 1 of the directions is undefined."""
    _, others = sets_of(n_held_out=5, seed=seed + 10)
    probes, held_out = sets_of(n_held_out=n, towards=towards, seed=seed)
    vs = locate_vrev(probes)
    undefined = Direction(np.full(WIDTH, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((vs[0], undefined, vs[2]))
    return held_out, Residuals(others.values, others.checkpoints, others.layers, "harmless"), vs


def test_other_prompts_are_subsets_of_both_sets_together() -> None:
    held_out, others, vs = two_sets()
    null = other_prompts(held_out, others, vs, run="a", draws=4000, rng=np.random.default_rng(0), name="harmless")
    assert (null.name, null.run, null.steps, null.layers) == ("harmless", "a", (1, 5), (0, 2))
    subsets = list(itertools.combinations(range(9), 4))
    for column, step in enumerate((1, 5)):
        pool = np.concatenate([drift_per_prompt(one, f"a/{step}", (0, 2)) for one in (held_out, others)])
        means = np.stack([pool[list(subset)].mean(0) for subset in subsets])
        cosines = (means * vs.defined().vectors).sum(-1) / np.linalg.norm(means, axis=-1)
        distance = np.abs(null.cosines[:, column, None] - cosines[None]).max(-1)  # [draw, subset]
        assert distance.min(1).max() < 1e-9, "each draw is a subset, the same for all layers"
        counts = np.bincount(distance.argmin(1), minlength=len(subsets))
        assert stats.chisquare(counts).pvalue > 0.001


def test_other_prompts_agree_with_scipy() -> None:
    held_out, others, vs = two_sets(towards=0.2)
    null = other_prompts(held_out, others, vs, run="a", draws=20_000, rng=np.random.default_rng(0))
    found = compare(follow(held_out, vs), null).table
    assert found.run.unique().tolist() == ["a"]
    for layer in (0, 2):
        sets = [drift_per_prompt(one, "a/5", [layer])[:, 0] for one in (held_out, others)]
        pool, v = np.concatenate(sets), vs[layer].vector

        def cosine(one: np.ndarray, _: np.ndarray, pool: np.ndarray = pool, v: np.ndarray = v) -> float:
            mean = pool[one].mean(0)
            return float(mean @ v / np.linalg.norm(mean))

        test = stats.permutation_test((np.arange(4), np.arange(4, 9)), cosine, vectorized=False, alternative="greater")
        row = found[(found.step == 5) & (found.layer == layer)]
        assert row.p_value.item() == pytest.approx(test.pvalue, abs=0.02)


def test_prompts_that_reversion_is_of_exceed_the_others_and_exchangeable_ones_do_not() -> None:
    for towards, p in [(0.0, None), (3.0, 0.01)]:
        held_out, others, vs = two_sets(towards=towards, n=8)
        null = other_prompts(held_out, others, vs, run="a", draws=2000, rng=np.random.default_rng(0))
        table = stacked(compare(follow(held_out, vs), null))
        assert (table.p_value < p).all() if p else (table.p_value > 0.02).all()


def test_what_is_common_to_all_prompts_is_not_found_by_other_prompts() -> None:
    held_out, others, vs = two_sets()
    for one in (held_out, others):
        one.values[one.checkpoints.index("a/1")] += 5 * vs[0].vector
    null = other_prompts(held_out, others, vs, run="a", draws=500, rng=np.random.default_rng(0))
    row = compare(follow(held_out, vs), null).table.query("step == 1 and layer == 0")
    assert row.alignment.item() > 0.9 and row.p_value.item() > 0.05


def test_two_sets_differ_and_have_a_step_in_common() -> None:
    held_out, others, vs = two_sets()
    with refused("of the same prompts (others)"):
        other_prompts(held_out, held_out, vs, run="a", draws=3, rng=np.random.default_rng(0))
    with refused("c has steps None"):
        other_prompts(held_out, others, vs, run="c", draws=3, rng=np.random.default_rng(0))


# -- comparing ---------------------------------------------------------------------------------------------------------


def trajectory_of(alignments: dict[str, list[float]], steps: tuple[int, ...] = (1,)) -> Trajectory:
    """Runs of one layer, held out, with chosen alignments, one per step."""
    rows = [
        {"run": run, "step": step, "layer": 0, "prompts": "held_out", "alignment": value, "drift_norm": 1.0}
        for run, values in alignments.items()
        for step, value in zip(steps, values, strict=True)
    ]
    return Trajectory.from_table(pd.DataFrame(rows))


def null_of(draws: list[float], name: str = "null") -> NullDraws:
    return NullDraws(name, np.array(draws)[:, None, None], (1,), (0,))


@pytest.mark.parametrize(
    ("alignment", "at_least"), [(0.25, 2), (0.2, 3), (0.4, 1), (0.41, 0), (-0.9, 4), (-math.inf, 4)]
)
def test_p_counts_the_draws_that_reach_as_far_and_the_run_itself(alignment: float, at_least: int) -> None:
    draws = [0.1, 0.4, 0.2, 0.3]
    compared = compare(trajectory_of({"a": [alignment]}), null_of(draws))
    columns = ["null", "run", "step", "layer", "alignment", "p99", "p_value", "above"]
    assert list(compared.table) == columns and list(compared.layer_mean) == [*columns[:3], *columns[4:]]
    table = stacked(compared)
    assert table.p_value.to_list() == [(1 + at_least) / (1 + 4)] * 2
    assert table.p99.to_list() == [pytest.approx(np.quantile(draws, 0.99))] * 2
    assert not table.above.any(), "four draws have no p99 of their own"
    assert table.null.unique().tolist() == ["null"] and compared.table.layer.dtype == int


@pytest.mark.parametrize(("alignment", "above"), [(0.985, True), (0.975, False), (0.5, False)])
def test_above_takes_ninety_nine_draws(alignment: float, above: bool) -> None:
    draws = (np.arange(99) / 100).tolist()  # 0 to .98
    assert stacked(compare(trajectory_of({"a": [alignment]}), null_of(draws))).above.to_list() == [above] * 2
    assert not stacked(compare(trajectory_of({"a": [alignment]}), null_of(draws[1:]))).above.any()


def test_a_run_without_drift_has_no_cosine_and_is_never_significant() -> None:
    table = stacked(compare(trajectory_of({"still": [math.nan]}), null_of([-0.1, 0.0, 0.1])))
    assert table.p_value.to_list() == [1, 1] and not table.above.any()
    table = stacked(compare(trajectory_of({"a": [0.9]}), null_of([-0.1, math.nan, 0.1])))
    assert table.p_value.to_list() == [0.5, 0.5] and not table.above.any(), "a draw without drift excuses nothing"


def test_steps_and_layers_are_held_against_their_own_draws_and_the_mean_against_means() -> None:
    rng = np.random.default_rng(0)
    states = {name: rng.standard_normal((2, 3, 16)) for name in ("witness", "anchor", "a/1", "a/5", "a/20")}
    residuals = synthetic(states)
    trajectory = follow(residuals, locate_vrev(residuals), layers_in_mean=(0, 2))
    null = NullDraws("null", rng.uniform(-1, 1, (50, 2, 3)), (20, 1), (2, 0, 1))  # other orders than the trajectory's
    table, followed = stacked(compare(trajectory, null, prompts="given")), stacked(trajectory)
    assert len(table) == 2 * 4 and set(table.step) == {1, 20}
    for row in table.to_dict("records"):
        draws = null.cosines[:, null.steps.index(row["step"])]
        drawn = (draws[:, 0] + draws[:, 1]) / 2 if pd.isna(row["layer"]) else draws[:, (2, 0, 1).index(row["layer"])]
        assert row["p99"] == pytest.approx(np.quantile(drawn, 0.99))
        assert row["p_value"] == (1 + sum(d >= row["alignment"] for d in drawn)) / 51
        wanted = followed[followed.step == row["step"]]
        wanted = wanted[wanted.layer.isna() if pd.isna(row["layer"]) else wanted.layer == row["layer"]]
        assert row["alignment"] == wanted.alignment.item()


def test_draws_have_named_axes() -> None:
    null = NullDraws("null", np.random.default_rng(0).uniform(-1, 1, (50, 2, 3)), (20, 1), (2, 0, 1))
    assert null.data.dims == ("draw", "step", "layer") and null.data.name == "null"
    np.testing.assert_array_equal(null.data.sel(step=1, layer=0), null.cosines[:, 1, 1])


def test_draws_of_one_run_are_held_against_that_run_alone() -> None:
    trajectory = trajectory_of({"a": [0.15], "b": [0.35]})
    null = NullDraws("null", np.array([0.1, 0.4, 0.2, 0.3])[:, None, None], (1,), (0,), "b")
    table = stacked(compare(trajectory, null))
    assert table.run.to_list() == ["b", "b"] and table.p_value.to_list() == [2 / 5] * 2
    with refused("rows of c"):
        compare(trajectory, NullDraws("null", null.cosines, (1,), (0,), "c"))


def test_draws_of_the_mean_are_held_against_the_mean_over_runs() -> None:
    trajectory = trajectory_of({"a": [0.15], "b": [0.35]})
    null = NullDraws("null", np.array([0.1, 0.4, 0.2, 0.3])[:, None, None], (1,), (0,), of="mean")
    table = stacked(compare(trajectory, null))
    assert table.run.to_list() == ["mean", "mean"] and table.alignment.to_list() == [0.25] * 2
    assert table.p_value.to_list() == [3 / 5] * 2 and table.layer.isna().sum() == 1


def test_a_draw_that_ties_counts_however_it_was_added_up() -> None:
    assert p_value(np.array([0.1 + 0.2, 0.0, 0.0]), 0.3) == p_value(np.array([0.3, 0.0, 0.0]), 0.1 + 0.2) == 0.5


def test_nothing_to_compare_is_an_error() -> None:
    with refused("held_out", "[1]"):
        compare(trajectory_of({"a": [0.1]}, steps=(5,)), null_of([0.0]))
    for wrong in ("given", "held-out"):
        with pytest.raises(GravlensError) as caught:
            compare(trajectory_of({"a": [0.1]}), null_of([0.0]), prompts=wrong)
        assert wrong in caught.value.given and "held_out" in caught.value.wanted
    other_layer = NullDraws("null", np.zeros((1, 1, 1)), (1,), (7,))
    with refused("null", "layer 0"):
        compare(trajectory_of({"a": [0.1]}), other_layer)


# -- a world where it is true, and one where it is false ---------------------------------------------------------------

WIDTH = 24


def world(*, along: float, runs: int) -> ByLayer:
    """Runs whose drifts are uniformly random, plus `along` of their length in the direction of v_rev."""
    rng = np.random.default_rng(7)
    witness, anchor = rng.standard_normal((2, 1, 3, WIDTH))
    v = (witness - anchor) / np.linalg.norm(witness - anchor, axis=-1, keepdims=True)
    drift = rng.standard_normal((runs, 1, 3, WIDTH))
    drift /= np.linalg.norm(drift, axis=-1, keepdims=True)
    moved = {f"run{i}/1": anchor + one + along * v for i, one in enumerate(drift)}
    residuals = synthetic({"witness": witness, "anchor": anchor, **moved})
    vs = locate_vrev(residuals)
    null = isotropic(vs, steps=(1,), draws=1000, rng=np.random.default_rng(1))
    return compare(follow(residuals, vs), null, prompts="given")


def test_isotropic_drifts_exceed_the_isotropic_null_as_often_as_they_should() -> None:
    table = world(along=0.0, runs=250)
    for rows in (table.layer_mean, *(table.table[table.table.layer == layer] for layer in (0, 1, 2))):
        assert len(rows) == 250 and stats.kstest(rows.p_value, "uniform").pvalue > 0.005
        assert stats.binomtest(int(rows.above.sum()), 250, 0.01).pvalue > 0.005


def test_drifts_towards_the_witness_exceed_it_and_drifts_away_never_do() -> None:
    towards, away = world(along=1.5, runs=30), world(along=-1.5, runs=30)
    assert towards.layer_mean.above.all() and (towards.layer_mean.p_value < 0.01).all()
    assert not stacked(away).above.any() and (away.layer_mean.p_value > 0.99).all()
