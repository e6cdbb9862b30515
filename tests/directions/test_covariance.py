"""Covariance: against scikit-learn's Ledoit–Wolf estimator, eigenvalues, and the moments of many draws."""

import numpy as np
import pytest
from histories import refused
from sklearn.covariance import LedoitWolf

from gravlens.directions.covariance import (
    draw_from_covariance,
    draws_by_layer,
    estimate_covariance,
    participation_ratio,
    shrunk_covariance,
    whitening,
)

SHAPES = pytest.mark.parametrize("shape", [(8, 20), (20, 20), (21, 20), (200, 6)], ids=str)


def samples_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Anisotropic samples, far from the origin."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) * np.arange(1, shape[-1] + 1) + 10


@SHAPES
@pytest.mark.parametrize("centred", [True, False])
def test_it_is_the_covariance_of_ledoit_and_wolf(shape: tuple[int, int], centred: bool) -> None:
    samples = samples_of(shape)
    fitted = LedoitWolf(assume_centered=not centred).fit(samples)
    found = estimate_covariance(samples, centred=centred)
    assert found.matrix == pytest.approx(fitted.covariance_, rel=1e-9, abs=1e-9)
    assert found.shrinkage == pytest.approx(fitted.shrinkage_) and 0 < found.shrinkage < 1
    assert np.array_equal(shrunk_covariance(samples, centred=centred), found.matrix)
    plain = np.cov(samples.T, bias=True) if centred else samples.T @ samples / len(samples)
    assert estimate_covariance(samples, centred=centred, shrunk=False).matrix == pytest.approx(plain)


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_the_shrinkage_does_not_depend_on_the_unit(unit: float) -> None:
    samples = samples_of((30, 12))
    assert shrunk_covariance(unit * samples) == pytest.approx(unit**2 * shrunk_covariance(samples), rel=1e-6)


@SHAPES
def test_whitening_is_the_symmetric_inverse_root(shape: tuple[int, int]) -> None:
    samples = samples_of(shape)
    root, covariance = whitening(samples), LedoitWolf().fit(samples).covariance_
    assert root @ covariance @ root == pytest.approx(np.eye(shape[1]), abs=1e-8)
    assert root == pytest.approx(root.T) and np.linalg.eigvalsh(root).min() > 0


def test_what_cannot_be_whitened_is_an_error() -> None:
    with refused("5 samples in 3 dimensions is singular"):
        whitening(np.ones((5, 3)))
    with refused("(1, 4)"):
        shrunk_covariance(np.ones((1, 4)))
    with refused("(4,)"):
        shrunk_covariance(np.ones(4))
    with refused("not all finite"):
        shrunk_covariance(np.array([[0.0, np.nan], [1.0, 2.0]]))


@SHAPES
@pytest.mark.parametrize("shrunk", [True, False])
def test_participation_ratio_is_that_of_the_eigenvalues(shape: tuple[int, int], shrunk: bool) -> None:
    samples = samples_of(shape)
    covariance = LedoitWolf().fit(samples).covariance_ if shrunk else np.cov(samples.T, bias=True)
    values = np.linalg.eigvalsh(covariance)
    wanted = values.sum() ** 2 / (values**2).sum()
    assert participation_ratio(samples, shrunk=shrunk) == pytest.approx(wanted)


def test_participation_ratio_counts_directions() -> None:
    axes = np.concatenate([np.eye(7), -np.eye(7)])
    assert participation_ratio(axes) == pytest.approx(7)
    assert participation_ratio(axes[:, :1] * np.ones(5)) == pytest.approx(1)
    few, many = (participation_ratio(np.random.default_rng(0).standard_normal((n, 50))) for n in (10, 5000))
    assert few < 9 and many == pytest.approx(50, rel=0.02), "a few samples show at most one less than there are"
    far = samples_of((50, 4)) + 1000
    assert participation_ratio(far, centred=False) == pytest.approx(1, abs=1e-3) and participation_ratio(far) > 2
    assert np.isnan(participation_ratio(np.ones((3, 2))))


@pytest.mark.parametrize("shrunk", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_draws_have_the_covariance_and_layers_vary_together_as_in_the_samples(centred: bool, shrunk: bool) -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((12, 2, 5)) * np.arange(1, 6) + 1
    samples[:, 1] += 2 * samples[:, 0]  # the second layer goes on from the first
    drawn = draw_from_covariance(samples, draws=60_000, rng=rng, centred=centred, shrunk=shrunk)
    assert drawn.shape == (60_000, 2, 5)
    each = [estimate_covariance(samples[:, layer], centred=centred, shrunk=shrunk) for layer in (0, 1)]
    kept = np.sqrt([1 - one.shrinkage for one in each])
    between = kept.prod() * each[0].deviations.T @ each[1].deviations
    wanted = np.block([[each[0].matrix, between], [between.T, each[1].matrix]])
    found = drawn.reshape(-1, 10).T @ drawn.reshape(-1, 10) / len(drawn)
    spread = np.sqrt(np.diag(wanted))
    assert found / np.outer(spread, spread) == pytest.approx(wanted / np.outer(spread, spread), abs=0.025)
    assert np.abs(drawn.mean(0) / spread.reshape(2, 5)).max() < 0.02, "about 0, wherever the samples lie"


def test_without_shrinkage_draws_stay_in_the_span_of_the_samples_and_with_it_they_leave_it() -> None:
    samples = np.random.default_rng(0).standard_normal((4, 1, 30))
    for shrunk, rank in [(False, 3), (True, 30)]:
        drawn = draw_from_covariance(samples, draws=50, rng=np.random.default_rng(1), shrunk=shrunk)
        assert np.linalg.matrix_rank(drawn[:, 0]) == rank


def test_draws_by_layer_are_the_same_draws_and_follow_their_generator() -> None:
    samples = samples_of((6, 3, 4))
    together = draw_from_covariance(samples, draws=7, rng=np.random.default_rng(0))
    one_by_one = list(draws_by_layer(samples, draws=7, rng=np.random.default_rng(0)))
    assert np.array_equal(together, np.stack(one_by_one, axis=1))
    assert not np.allclose(together, draw_from_covariance(samples, draws=7, rng=np.random.default_rng(1)))
