"""Intervals against brute force, sign flips against scipy and counting, max-T on simulated nulls, two curves."""

import math
from itertools import permutations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
from by_layer import stacked
from histories import refused, synthetic
from scipy import stats

from gravlens.activations.residuals import Residuals
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.stats.bootstrap import bootstrap_alignment
from gravlens.stats.permutation import detrended_correlation, holm, least_p_value, max_t, sign_flip_test

PROMPTS, LAYERS, WIDTH = 10, 3, 8


def history(runs: int = 3, steps: tuple[int, ...] = (1, 5), *, prompts: int = PROMPTS, seed: int = 0) -> Residuals:
    rng = np.random.default_rng(seed)
    names = ["witness", "anchor", *(f"run{run}/{step}" for run in range(runs) for step in steps)]
    return synthetic({name: rng.standard_normal((prompts, LAYERS, WIDTH)) for name in names})


def intervals(residuals: Residuals, *, draws: int = 40, seed: int = 5, **changes: Any) -> pd.DataFrame:
    found = bootstrap_alignment(
        residuals, locate_vrev(residuals), draws=draws, rng=np.random.default_rng(seed), **changes
    )
    return stacked(found)


def row(table: pd.DataFrame, run: str, step: int, layer: int | None, measure: str = "alignment") -> pd.Series:
    at_layer = table.layer.isna() if layer is None else table.layer == layer
    (found,) = table[(table.run == run) & (table.step == step) & at_layer & (table.measure == measure)].iloc
    return found


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_estimates_are_those_of_the_trajectory_and_of_its_summary() -> None:
    residuals = history()
    table = intervals(residuals, layers_in_mean=(0, 2))
    assert list(table.columns) == ["measure", "run", "step", "layer", "estimate", "low", "high"]
    assert len(table) == (3 + 1) * 2 * (LAYERS + 1) * 2
    trajectory = follow(residuals, locate_vrev(residuals), layers_in_mean=(0, 2))
    for one in stacked(trajectory).to_dict("records"):
        layer = None if pd.isna(one["layer"]) else one["layer"]
        for measure in ("alignment", "fraction"):
            assert row(table, one["run"], one["step"], layer, measure).estimate == pytest.approx(one[measure])
    for step, means in trajectory.summary("given").iterrows():
        for measure in ("alignment", "fraction"):
            assert row(table, "mean", step, None, measure).estimate == pytest.approx(means[measure, "mean"])


def by_hand(residuals: Residuals, seed: int, draws: int) -> np.ndarray:
    """Every draw by copying prompts: [step, measure, draw, run or mean, layer or mean]; prompts are drawn first."""
    rng, v = np.random.default_rng(seed), locate_vrev(residuals)
    n, runs = residuals.values.shape[1], list(residuals.runs)
    prompts = rng.multinomial(n, np.full(n, 1 / n), size=draws)
    chosen = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=draws)
    out = np.empty((2, 2, draws, len(runs) + 1, LAYERS + 1))
    for i, step in enumerate((1, 5)):
        for draw in range(draws):
            rows = np.repeat(np.arange(n), prompts[draw])
            for j, run in enumerate(runs):
                drift = (residuals.of(f"{run}/{step}")[rows].astype(float) - residuals.of("anchor")[rows]).mean(0)
                along = (drift * v.vectors).sum(-1)
                out[i, 0, draw, j, :-1] = along / np.linalg.norm(drift, axis=-1)
                out[i, 1, draw, j, :-1] = along / v.distances
            out[i, :, draw, :-1, -1] = out[i, :, draw, :-1, :-1].mean(-1)
            out[i, :, draw, -1] = out[i, :, draw, np.repeat(np.arange(len(runs)), chosen[draw])].mean(0)
    return out


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_intervals_are_those_of_prompts_and_runs_copied_by_hand(level: float) -> None:
    residuals = history(4)
    drawn = by_hand(residuals, seed=5, draws=40)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=2)  # [step, measure, run, layer]
    tables = {kind: intervals(residuals, level=level, interval=kind) for kind in ("percentile", "basic")}
    side = (1 + level) / 2
    widening = stats.t.ppf(side, 3) / stats.norm.ppf(side) * math.sqrt(4 / 3)
    for i, step in enumerate((1, 5)):
        for m, measure in enumerate(("alignment", "fraction")):
            for (j, run), (k, layer) in product(
                enumerate([*residuals.runs, "mean"]), enumerate([*range(LAYERS), None])
            ):
                plain = row(tables["percentile"], run, step, layer, measure)
                assert (plain.low, plain.high) == pytest.approx((low[i, m, j, k], high[i, m, j, k]), abs=1e-9)
                basic = row(tables["basic"], run, step, layer, measure)
                factor = widening if run == "mean" else 1.0
                wanted = [basic.estimate + factor * (basic.estimate - end) for end in (plain.high, plain.low)]
                limits = (-1, 1) if measure == "alignment" else (-np.inf, np.inf)
                assert (basic.low, basic.high) == pytest.approx(np.clip(wanted, *limits), abs=1e-9)


def test_many_prompts_are_drawn_in_parts_and_nothing_depends_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    residuals = history()
    whole = intervals(residuals)
    monkeypatch.setattr("gravlens.stats.bootstrap.PAIRS_AT_ONCE", 100)
    assert np.allclose(intervals(residuals)[["low", "high"]], whole[["low", "high"]])
    assert not np.allclose(intervals(residuals, seed=6)[["low", "high"]], whole[["low", "high"]])


def world(
    *, runs: int, prompts: int, run_spread: float, prompt_spread: float, rng: np.random.Generator, layers: int = 1
) -> Residuals:
    """Runs that go as far along v (the first axis) as across it, each on its own way, read on some prompts."""
    means = np.eye(24)[0] + np.eye(24)[1] + run_spread * rng.standard_normal((runs, 1, layers, 24))
    drift = means + prompt_spread * rng.standard_normal((runs, prompts, layers, 24))
    still = np.zeros((prompts, layers, 24))
    states = {f"run{i}/1": one for i, one in enumerate(drift)}
    return synthetic({"witness": still + np.eye(24)[0], "anchor": still, **states})


def width(table: pd.DataFrame, run: str) -> float:
    found = row(table, run, 1, None)
    return found.high - found.low


def test_runs_that_differ_widen_the_mean_and_prompts_that_differ_widen_each_run() -> None:
    rng = np.random.default_rng(0)
    of = {
        (runs, prompts): intervals(
            world(runs=6, prompts=20, run_spread=runs, prompt_spread=prompts, rng=rng), draws=300
        )
        for runs, prompts in [(0.02, 0.1), (0.3, 0.1), (0.02, 0.4)]
    }
    assert width(of[0.3, 0.1], "mean") > 3 * width(of[0.02, 0.1], "mean")
    assert width(of[0.02, 0.4], "run0") > 3 * width(of[0.02, 0.1], "run0")
    assert width(of[0.3, 0.1], "mean") > 3 * width(of[0.3, 0.1], "run0"), "the unit is the run"


def test_the_interval_holds_the_truth_and_plain_quantiles_of_a_cosine_do_not() -> None:
    rng, worlds, run_spread = np.random.default_rng(1), 200, 0.06
    means = np.eye(24)[0] + np.eye(24)[1] + run_spread * rng.standard_normal((100_000, 24))
    truth = (means[:, 0] / np.linalg.norm(means, axis=1)).mean()
    each = world(runs=6, prompts=24, run_spread=run_spread, prompt_spread=0.8, rng=rng, layers=worlds)
    held = {}
    for kind in ("basic", "percentile"):
        table = intervals(each, draws=400, interval=kind)
        table = table[(table.run == "mean") & (table.measure == "alignment") & table.layer.notna()]
        held[kind] = table.low.le(truth).mul(table.high.ge(truth)).mean()
    assert held["basic"] > 0.9 and held["percentile"] < 0.5, held


def test_one_run_has_an_interval_over_prompts_and_none_over_runs() -> None:
    table = intervals(history(runs=1))
    mean, run = table[table.run == "mean"], table[table.run == "run0"]
    assert mean[["low", "high"]].isna().all(axis=None) and np.isfinite(run[["low", "high"]]).all(axis=None)
    assert mean.estimate.to_list() == run.estimate.to_list()


def test_runs_may_lack_steps() -> None:
    states = {name: history().of(name) for name in ("witness", "anchor", "run0/1", "run1/1", "run0/5", "run1/5")}
    states["run2/1"] = history().of("run2/1")
    table = intervals(synthetic(states))
    assert set(table[table.step == 5].run) == {"run0", "run1", "mean"}
    assert set(table[table.step == 1].run) == {"run0", "run1", "run2", "mean"}
    both = [row(table, run, 5, None).estimate for run in ("run0", "run1")]
    assert row(table, "mean", 5, None).estimate == pytest.approx(np.mean(both))


def test_a_run_that_did_not_move_has_no_cosine_and_a_layer_without_direction_no_row() -> None:
    residuals = history(2)
    residuals.values[2] = residuals.of("anchor")  # run0/1
    table = intervals(residuals)
    for run in ("run0", "mean"):
        assert np.isnan(row(table, run, 1, 0)[["estimate", "low", "high"]].astype(float)).all()
    assert row(table, "run0", 1, 0, "fraction")[["estimate", "low", "high"]].to_list() == [0, 0, 0]
    assert np.isfinite(row(table, "run0", 5, 0).estimate)
    undefined = Direction(np.full(WIDTH, np.nan), 1, 0.0, undefined="no difference")
    vs = Directions((locate_vrev(residuals)[0], undefined, locate_vrev(residuals)[2]))
    found = bootstrap_alignment(residuals, vs, draws=5, rng=np.random.default_rng(0))
    assert set(found.table.layer) == {0, 2}


def test_a_cosine_stays_a_cosine() -> None:
    drift = np.random.default_rng(0).standard_normal((6, 1, 4)) * 0.5 + np.array([3.0, 0, 0, 0])
    residuals = synthetic({"witness": np.ones((6, 1, 4)), "anchor": np.zeros((6, 1, 4)), "a/1": drift, "b/1": drift})
    vs = Directions((direction_from(np.eye(4)[0], layer=0),))
    table = stacked(bootstrap_alignment(residuals, vs, draws=200, rng=np.random.default_rng(0)))
    assert table[table.measure == "alignment"][["low", "high"]].abs().max(axis=None) <= 1


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"level": 1.0}, {"level": 0.0}, {"interval": "normal"}])
def test_what_is_no_interval_is_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with refused(name):
        intervals(history(), **wrong)


def test_without_runs_there_is_nothing_to_draw() -> None:
    with refused("no run"):
        intervals(history(runs=0))


# -- sign flips --------------------------------------------------------------------------------------------------------


def scipys(values: np.ndarray, alternative: str) -> np.ndarray:
    def mean(sample: np.ndarray, axis: int) -> np.ndarray:
        return sample.mean(axis)

    return stats.permutation_test(
        (values,), mean, permutation_type="samples", vectorized=True, n_resamples=np.inf, alternative=alternative
    ).pvalue


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
@pytest.mark.parametrize("runs", [2, 5, 8])
def test_sign_flips_are_scipys(runs: int, alternative: Any) -> None:
    values = np.random.default_rng(runs).standard_normal((runs, 3, 4)) + 0.4
    assert sign_flip_test(values, alternative=alternative) == pytest.approx(scipys(values, alternative))
    assert sign_flip_test(values[:, 0, 0], alternative=alternative) == pytest.approx(
        scipys(values[:, 0, 0], alternative)
    )


@pytest.mark.parametrize(("runs", "least"), [(1, 0.5), (3, 0.125), (5, 0.03125), (7, 0.0078125), (12, 2**-12)])
def test_n_runs_that_agree_reach_the_least_p_and_no_less(runs: int, least: float) -> None:
    values = np.random.default_rng(0).uniform(0.1, 1, runs)
    assert sign_flip_test(values) == least == least_p_value(runs)
    assert sign_flip_test(-values) == 1 and sign_flip_test(-values, alternative="less") == least
    assert sign_flip_test(values, alternative="two-sided") == 2 * least == least_p_value(runs, "two-sided")
    assert max_t(values) == least, "one cell needs no adjustment"


def test_equal_sums_count_as_equal_whatever_their_last_bits() -> None:
    whole = np.random.default_rng(0).integers(-4, 8, (6, 40))  # small whole numbers make many equal sums
    signs = np.array(list(product((1, -1), repeat=6)))
    exact = (signs @ whole >= whole.sum(0)).mean(0)
    assert sign_flip_test(whole * 0.1).tolist() == exact.tolist()


def test_beyond_twelve_runs_flips_are_drawn_and_agree_with_the_t_test() -> None:
    values = np.random.default_rng(0).standard_normal((20, 6)) + 0.4
    drawn = sign_flip_test(values, rng=np.random.default_rng(1))
    t_test = stats.ttest_1samp(values, 0, alternative="greater").pvalue
    assert drawn == pytest.approx(t_test, abs=0.03)
    assert np.array_equal(drawn, sign_flip_test(values, rng=np.random.default_rng(1)))
    assert sign_flip_test(np.ones(40), rng=np.random.default_rng(1)) == pytest.approx(1e-4) == least_p_value(40)
    for test in (sign_flip_test, max_t):
        with refused("20 runs", "rng"):
            test(values)


def test_a_missing_value_is_never_significant() -> None:
    values = np.ones((6, 2, 2))
    values[0, 1, 1] = np.nan
    for test in (sign_flip_test, max_t):
        p = test(values)
        assert p[1, 1] == 1 and np.delete(p.ravel(), 3) == pytest.approx(2**-6)
        assert test(np.zeros((6, 2))).tolist() == [1, 1]


def test_what_is_no_test_is_refused() -> None:
    for test in (sign_flip_test, max_t):
        with refused("alternative='bigger'"):
            test(np.ones(4), alternative="bigger")  # pyright: ignore[reportArgumentType]
        with refused("()"):
            test(np.float64(1.0))


# -- many cells --------------------------------------------------------------------------------------------------------


def max_t_by_hand(values: np.ndarray) -> np.ndarray:
    """Westfall–Young with Student's t itself, flip by flip."""
    largest = []
    for signs in product((1, -1), repeat=len(values)):
        flipped = values * np.array(signs)[:, None]
        largest.append((flipped.mean(0) / flipped.std(0, ddof=1) * math.sqrt(len(values))).max())
    own = values.mean(0) / values.std(0, ddof=1) * math.sqrt(len(values))
    return np.array([np.mean(np.array(largest) >= t - 1e-9) for t in own])


def test_max_t_is_westfall_and_youngs_with_students_t() -> None:
    values = np.random.default_rng(3).standard_normal((6, 5)) * np.array([1, 10, 0.1, 1, 1]) + 0.3
    assert max_t(values) == pytest.approx(max_t_by_hand(values))
    assert max_t(values.reshape(6, 5, 1)).shape == (5, 1)
    assert max_t(values, alternative="less") == pytest.approx(max_t_by_hand(-values))
    assert max_t(values, alternative="two-sided") == pytest.approx(max_t_by_hand(np.hstack([values, -values]))[:5])


def null_values(rng: np.random.Generator, shared: float, runs: int = 7) -> np.ndarray:
    """Steps × layers that go together within a run, about 0."""
    return shared * rng.standard_normal((runs, 1, 1)) + rng.standard_normal((runs, 4, 5)).cumsum(1)


@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_max_t_holds_the_family_wise_error_where_single_tests_do_not(shared: float) -> None:
    rng, worlds = np.random.default_rng(0), 300
    some, single = 0, 0
    for _ in range(worlds):
        values = null_values(rng, shared)
        some += (max_t(values) <= 0.05).any()
        single += (sign_flip_test(values) <= 0.05).any()
    assert stats.binomtest(some, worlds, 0.05, alternative="greater").pvalue > 0.01
    assert some > 0.02 * worlds, "and it is not merely timid"
    assert single > 2 * some


def test_max_t_finds_the_planted_cell_and_no_other() -> None:
    rng = np.random.default_rng(1)
    found = np.zeros((4, 5))
    for _ in range(40):
        values = rng.standard_normal((8, 4, 5))
        values[:, 2, 3] += 4
        found += max_t(values) <= 0.05
    assert found[2, 3] >= 36 and np.delete(found.ravel(), 13).sum() <= 6


def test_max_t_has_more_power_than_holm_where_cells_go_together() -> None:
    rng = np.random.default_rng(2)
    values = 1.2 + rng.standard_normal((8, 1, 1)) + 0.1 * rng.standard_normal((8, 4, 5))
    assert (max_t(values) <= holm(sign_flip_test(values))).all()
    assert max_t(values).max() < 0.05 < holm(sign_flip_test(values)).min()


def test_holm_is_the_step_down_of_the_textbook() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([[0.9, 0.01], [0.8, 0.7]])) == pytest.approx(np.array([[1, 0.04], [1, 1]]))
    p = np.random.default_rng(0).uniform(size=12)
    assert (holm(p) >= p).all() and (holm(p) <= np.minimum(1, 12 * p)).all()


# -- two curves --------------------------------------------------------------------------------------------------------

STEPS = np.arange(8)


def curves(rng: np.random.Generator, coupling: float, runs: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Two measures that rise and flatten in every run; a run's own way in one is `coupling` of that in the other."""
    rise = 1 - np.exp(-STEPS / 3)
    own, other = 0.05 * rng.standard_normal((2, runs, len(STEPS)))
    return rise + own, 2 * rise + coupling * own + math.sqrt(1 - coupling**2) * other


def test_two_curves_that_grow_correlate_and_detrended_they_do_not() -> None:
    rng = np.random.default_rng(0)
    found = [detrended_correlation(*curves(rng, 0.0)) for _ in range(100)]
    assert min(one.raw for one in found) > 0.8
    assert abs(np.mean([one.correlation for one in found])) < 0.05
    assert stats.binomtest(sum(one.p_value <= 0.05 for one in found), 100, 0.05).pvalue > 0.01
    plain = [stats.spearmanr(*(np.diff(one).ravel() for one in curves(rng, 0.0))).statistic for _ in range(100)]
    assert np.mean(plain) > 0.2, "changes alone still share how the rise flattens"
    changes = [detrended_correlation(*curves(rng, 0.0), of="changes").correlation for _ in range(100)]
    assert abs(np.mean(changes)) < 0.05


@pytest.mark.parametrize("of", ["levels", "changes"])
@pytest.mark.parametrize("coupling", [0.9, -0.9])
def test_runs_that_are_ahead_in_both_are_found_with_their_sign(coupling: float, of: Any) -> None:
    found = detrended_correlation(*curves(np.random.default_rng(1), coupling), of=of)
    assert found.correlation * coupling > 0.6 and found.p_value < 0.02 and found.n_runs == 6
    assert found.raw > 0.8, "the raw one does not see the sign"


def test_it_is_spearmans_over_all_orders_of_the_runs() -> None:
    x, y = np.random.default_rng(2).standard_normal((2, 4, 5))
    x, y = x + STEPS[:5], 0.7 * x + y
    flat_x, flat_y = x - x.mean(0), y - y.mean(0)
    by_hand = [
        stats.spearmanr(flat_x[list(order)].ravel(), flat_y.ravel()).statistic for order in permutations(range(4))
    ]
    for alternative, reached in {
        "two-sided": np.abs(by_hand),
        "greater": np.array(by_hand),
        "less": -np.array(by_hand),
    }.items():
        found = detrended_correlation(x, y, alternative=alternative)  # pyright: ignore[reportArgumentType]
        assert found.correlation == pytest.approx(by_hand[0])
        assert found.raw == pytest.approx(stats.spearmanr(x.ravel(), y.ravel()).statistic)
        assert found.p_value == np.mean(reached >= reached[0] - 1e-9)


def test_beyond_seven_runs_orders_are_drawn() -> None:
    x, y = curves(np.random.default_rng(3), 0.0, runs=9)
    drawn = [detrended_correlation(x, y, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and drawn[0].p_value == pytest.approx(drawn[2].p_value, abs=0.03)
    coupled = detrended_correlation(*curves(np.random.default_rng(3), 0.95, runs=9), rng=np.random.default_rng(0))
    assert coupled.p_value < 0.002
    with refused("9 runs", "rng"):
        detrended_correlation(x, y)


def test_what_cannot_be_correlated_is_refused() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4))
    with refused("(3, 4)", "(3, 5)"):
        detrended_correlation(x, np.ones((3, 5)))
    with refused("(2, 4)"):
        detrended_correlation(x[:2], x[:2])
    with refused("(3, 4)"):
        detrended_correlation(x, np.full((3, 4), np.nan))
    with refused("one step"):
        detrended_correlation(x[:, :1], x[:, :1], of="changes")


def test_a_measure_that_does_not_vary_goes_with_nothing() -> None:
    x, _ = curves(np.random.default_rng(0), 0.0)
    for still in (np.zeros_like(x), np.full_like(x, 0.1)):
        found = detrended_correlation(x, still)
        assert math.isnan(found.correlation) and math.isnan(found.raw) and found.p_value == 1
    found = detrended_correlation(x, np.tile(0.1 * STEPS, (6, 1)))
    assert math.isnan(found.correlation) and found.raw > 0.8 and found.p_value == 1, "a trend alone"
