"""Estimators of v_rev: a planted direction, its sign and length, outliers and anisotropic noise, others' code."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from histories import refused, synthetic
from scipy import optimize
from scipy.stats import special_ortho_group
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from gravlens.directions.estimators import first_component, geometric_median, lda, logistic_probe
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import difference_of_means, locate_vrev
from gravlens.stats.robustness import ESTIMATORS

OTHERS = (geometric_median, first_component, logistic_probe, lda)
PAIRED = (geometric_median, first_component)
every_estimator = pytest.mark.parametrize("estimator", OTHERS)

Pair = tuple[np.ndarray, np.ndarray]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def axis(width: int, place: int = 0) -> np.ndarray:
    return np.eye(width)[place]


def planted(
    *, prompts: int = 60, width: int = 16, length: float = 4.0, noise: Any = 0.5, shared: float = 0.0, seed: int = 0
) -> Pair:
    """Witness and anchor [prompt, d_model]: own noise in each (SD `noise`, one number or one a dimension), a part that
    both share at each prompt, far from the origin, and the witness moved along the first axis."""
    rng = np.random.default_rng(seed)
    common = 50 + shared * rng.standard_normal((prompts, width))
    witness, anchor = (common + noise * rng.standard_normal((prompts, width)) for _ in range(2))
    return witness + length * axis(width), anchor


def turned(pair: Pair, rotation: np.ndarray) -> Pair:
    return pair[0] @ rotation.T, pair[1] @ rotation.T


# -- what each of them promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@every_estimator
def test_a_planted_direction_is_found_and_points_to_the_witness(estimator: Callable, seed: int) -> None:
    pair = planted(prompts=300, seed=seed)
    found = estimator(*pair)
    assert cosine(found, axis(16)) > 0.97
    assert np.linalg.norm(found) == pytest.approx(4, rel=0.05)
    assert estimator(*pair[::-1]) == pytest.approx(-found, abs=1e-4)  # the roles exchanged: the same line, turned


@pytest.mark.parametrize("seed", range(3))
@every_estimator
def test_its_length_is_the_mean_difference_along_it(estimator: Callable, seed: int) -> None:
    pair = planted(noise=np.linspace(0.5, 5, 16), length=1.0, seed=seed)  # so noisy that directions differ
    found, difference = estimator(*pair), difference_of_means(*pair)
    assert found @ difference == pytest.approx(found @ found)
    assert 0 < np.linalg.norm(found) <= np.linalg.norm(difference)
    assert cosine(found, difference) < 0.9999  # and it is not the difference of means under another name


@every_estimator
def test_neither_the_order_of_prompts_nor_where_the_states_lie_matters(estimator: Callable) -> None:
    pair, order = planted(noise=2.0, shared=1.0), np.random.default_rng(1).permutation(60)
    found = estimator(*pair)
    assert estimator(pair[0][order], pair[1][order]) == pytest.approx(found, abs=1e-4)
    assert estimator(pair[0] + 7, pair[1] + 7) == pytest.approx(found, abs=1e-4)


@every_estimator
def test_it_turns_and_scales_with_the_space(estimator: Callable) -> None:
    pair, rotation = planted(noise=2.0), special_ortho_group.rvs(16, random_state=1)
    found = estimator(*pair)
    assert estimator(*turned(pair, rotation)) == pytest.approx(rotation @ found, abs=1e-4)
    assert estimator(pair[0] * 30, pair[1] * 30) == pytest.approx(30 * found, abs=1e-2)


@every_estimator
def test_single_precision_gives_the_direction_of_double(estimator: Callable) -> None:
    pair = planted(noise=2.0)
    single = estimator(*(states.astype(np.float32) for states in pair))
    assert cosine(single, estimator(*pair)) > 1 - 1e-6 and single.dtype == np.float64


@every_estimator
def test_equal_states_have_no_direction(estimator: Callable) -> None:
    states = planted()[0]
    assert np.array_equal(estimator(states, states), np.zeros(16))
    vs = locate_vrev(synthetic({"witness": states[:, None], "anchor": states[:, None]}), estimator=estimator)
    assert vs[0].undefined is not None and vs[0].estimator == estimator.__name__


@every_estimator
def test_by_locate_vrev_a_run_half_of_the_way_has_half_the_fraction_along_each(estimator: Callable) -> None:
    witness, anchor = (states[:, None] for states in planted(noise=0.2, shared=1.0))
    half = {"seed0/5": (witness + anchor) / 2}
    residuals = synthetic({"witness": witness, "anchor": anchor, **half})
    v = locate_vrev(residuals, layer=0, estimator=estimator)
    assert v.estimator == estimator.__name__ and v.reliability > 0.9
    table = follow(residuals, locate_vrev(residuals, estimator=estimator)).table
    assert table["fraction"].to_numpy() == pytest.approx(0.5, abs=1e-3)
    assert (table["alignment"] > 0.9).all()


def test_the_table_of_all_choices_holds_every_estimator() -> None:
    assert (difference_of_means, *OTHERS) == ESTIMATORS


# -- what sets each of them apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_geometric_median_stands_an_outlier_that_the_others_follow(seed: int) -> None:
    witness, anchor = planted(noise=0.3, seed=seed)
    witness[7] += 600 * axis(16, 5)
    found = {estimator: cosine(estimator(witness, anchor), axis(16)) for estimator in PAIRED}
    assert found[geometric_median] > 0.99
    assert cosine(difference_of_means(witness, anchor), axis(16)) < 0.7
    assert abs(found[first_component]) < 0.1


def test_the_geometric_median_breaks_down_beyond_half_of_the_prompts() -> None:
    witness, anchor = planted(noise=0.3)
    witness[:35] += 600 * axis(16, 5)
    assert cosine(geometric_median(witness, anchor), axis(16)) < 0.1


def test_the_first_component_is_the_line_of_the_mean_difference_where_centring_would_lose_it() -> None:
    witness, anchor = planted(noise=0.3)
    witness += np.outer(np.random.default_rng(3).standard_normal(60), axis(16, 4))  # differences spread along another
    centred = np.linalg.svd((witness - anchor) - (witness - anchor).mean(0))[2][0]
    assert cosine(first_component(witness, anchor), axis(16)) > 0.98
    assert abs(cosine(centred, axis(16))) < 0.2


@pytest.mark.parametrize("seed", range(5))
def test_lda_beats_the_difference_of_means_under_anisotropic_noise(seed: int) -> None:
    loud = np.r_[0.3, np.full(3, 12.0), np.full(12, 0.3)]  # three loud dimensions, none of them the planted one
    pair = planted(noise=loud, length=1.0, seed=seed)
    assert cosine(lda(*pair), axis(16)) > 0.9
    assert cosine(difference_of_means(*pair), axis(16)) < 0.7


def test_lda_reads_out_and_does_not_say_where_the_states_move() -> None:
    """Noise that is correlated with the planted direction turns lda away from it, and not the difference of means."""
    rng = np.random.default_rng(0)
    mixing = np.eye(16)
    mixing[0, 1] = 3.0  # what moves dimension 1 moves dimension 0 threefold
    witness, anchor = (0.3 * rng.standard_normal((800, 16)) @ mixing.T for _ in range(2))
    witness = witness + 4 * axis(16)
    goal = np.linalg.solve(mixing @ mixing.T, axis(16))
    assert cosine(lda(witness, anchor), goal) > 0.99 and cosine(lda(witness, anchor), axis(16)) < 0.5
    assert cosine(difference_of_means(witness, anchor), axis(16)) > 0.99


# -- against others' code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_against_a_general_minimiser(seed: int) -> None:
    witness, anchor = planted(prompts=15, width=5, noise=2.0, seed=seed)
    differences = witness - anchor
    far = lambda point: np.linalg.norm(differences - point, axis=1).sum()  # noqa: E731
    best = optimize.minimize(far, differences.mean(0), method="BFGS", options={"gtol": 1e-9}).x
    assert cosine(geometric_median(witness, anchor), best) > 1 - 1e-8


def test_geometric_median_on_a_line_is_the_median_and_may_fall_on_a_prompt() -> None:
    """Five differences on a line: the middle one is the optimum, and Weiszfeld's weights are infinite there."""
    differences = np.array([[0, 1.0], [0, 2.0], [0, 3.0], [0, 4.0], [0, 5.0]])
    found = geometric_median(differences + np.array([1.0, 0]), np.zeros((5, 2)))
    assert cosine(found, np.array([1.0, 3.0])) > 1 - 1e-9


def test_first_component_against_scikit_learns_truncated_svd() -> None:
    witness, anchor = planted(noise=2.0)
    (other,) = TruncatedSVD(1, algorithm="arpack", random_state=0).fit(witness - anchor).components_
    assert abs(cosine(first_component(witness, anchor), other)) > 1 - 1e-9


def test_logistic_probe_is_scikit_learns_on_states_of_unit_spread() -> None:
    witness, anchor = planted(noise=2.0, length=1.5, shared=1.0)
    states, labels = np.concatenate([witness, anchor]), np.repeat([1, 0], 60)
    spread = (states - states.mean(0)).std()
    other = LogisticRegression(solver="newton-cholesky", tol=1e-10).fit(states / spread, labels).coef_[0]
    assert cosine(logistic_probe(witness, anchor), other) > 1 - 1e-6


@pytest.mark.parametrize("prompts", [12, 60])  # fewer and more samples than dimensions
def test_lda_is_the_closed_form(prompts: int) -> None:
    witness, anchor = planted(noise=np.linspace(0.5, 4, 40), width=40, length=3.0, prompts=prompts)
    within = np.concatenate([witness - witness.mean(0), anchor - anchor.mean(0)])
    covariance = LedoitWolf(assume_centered=True).fit(within).covariance_
    closed = np.linalg.solve(covariance, witness.mean(0) - anchor.mean(0))
    assert cosine(lda(witness, anchor), closed) > 1 - 1e-9


def test_lda_is_scikit_learns_where_there_are_so_many_prompts_that_neither_shrinks() -> None:
    witness, anchor = planted(noise=np.linspace(0.5, 4, 10), width=10, length=3.0, prompts=2000)
    states, labels = np.concatenate([witness, anchor]), np.repeat([1, 0], 2000)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(states, labels).coef_[0]
    assert cosine(lda(witness, anchor), other) > 0.999


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", PAIRED)
def test_paired_differences_need_the_same_prompts(estimator: Callable) -> None:
    witness, anchor = planted()
    for shorter in (anchor[:1], anchor[:9]):  # one would be spread over all without a word
        with refused("60 states of the witness", f"{len(shorter)} of the anchor"):
            estimator(witness, shorter)


@pytest.mark.parametrize("alike", [partial(np.repeat, repeats=5, axis=0), lambda states: states])
def test_lda_needs_states_that_vary(alike: Callable) -> None:
    witness, anchor = (alike(states[:1]) for states in planted())
    with refused(f"The states of {len(witness)} prompts do not vary"):
        lda(witness, anchor)


@pytest.mark.parametrize("estimator", [geometric_median, first_component, logistic_probe])
def test_the_others_take_one_prompt(estimator: Callable) -> None:
    witness, anchor = planted(prompts=1)
    assert cosine(estimator(witness, anchor), (witness - anchor)[0]) > 1 - 1e-6
