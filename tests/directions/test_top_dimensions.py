"""Is v_rev a few massive dimensions? Shares against closed forms, alignments with and without them."""

import dataclasses

import numpy as np
import pytest
from histories import refused, synthetic

from gravlens.directions.direction import Direction, Directions, carried_by_few, isotropic_share
from gravlens.directions.geometry import locate_in, without_dimensions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import direction_from, locate_vrev

WIDTH = 64
RNG = np.random.default_rng(0)
ANCHOR = RNG.standard_normal((6, 2, WIDTH))


def spiked(share: float, *, at: int = 7, width: int = WIDTH) -> Direction:
    """One dimension holds a share of the squared vector, all others the same."""
    vector = np.full(width, np.sqrt((1 - share) / (width - 1)))
    vector[at] = -np.sqrt(share)
    return direction_from(vector, layer=3)


def test_the_share_of_the_top_dimensions_is_that_of_the_squares() -> None:
    v = spiked(0.6)
    rest = 0.4 / (WIDTH - 1)
    assert [v.top_share(k) for k in (1, 2, 3)] == pytest.approx([0.6, 0.6 + rest, 0.6 + 2 * rest], rel=1e-5)
    assert v.top_dimensions(1) == (7,) and len(v.top_dimensions()) == 3 and v.top_share(WIDTH) == pytest.approx(1)
    nowhere = Direction(np.full(4, np.nan), 0, 0.0, undefined="no difference")
    assert np.isnan(nowhere.top_share()) and nowhere.top_dimensions() == () and not carried_by_few(nowhere)


@pytest.mark.parametrize("width", [8, 32, 512, 4096])
@pytest.mark.parametrize("k", [1, 3])
def test_the_share_by_chance_is_the_mean_over_isotropic_directions(width: int, k: int) -> None:
    drawn = np.random.default_rng(1).standard_normal((500, width)) ** 2
    top = np.sort(drawn / drawn.sum(1, keepdims=True), axis=1)[:, -k:].sum(1)
    assert isotropic_share(width, k) == pytest.approx(top.mean(), rel=0.06)
    assert isotropic_share(2, 3) <= 1
    if k == 1 and width == 4096:
        assert isotropic_share(width, 1) == pytest.approx(2 * np.log(width) / width, rel=0.15)


@pytest.mark.parametrize("width", [64, 512, 4096])
def test_it_warns_of_massive_dimensions_and_hardly_ever_of_isotropic_ones(width: int) -> None:
    rng = np.random.default_rng(2)
    isotropic = [direction_from(rng.standard_normal(width), layer=0) for _ in range(300)]
    assert sum(map(carried_by_few, isotropic)) <= 1
    assert carried_by_few(spiked(isotropic_share(width) + 0.22, width=width))
    assert not carried_by_few(spiked(0.1, width=width))


def test_every_repr_says_it_before_any_claim() -> None:
    v, plain = spiked(0.6), dataclasses.replace(direction_from(RNG.standard_normal(WIDTH), layer=1))
    for shown in (repr(v), v._repr_html_(), repr(Directions((plain, v))), Directions((plain, v))._repr_html_()):
        assert "top dimension: 60.0%" in shown and "isotropic: " in shown
        assert "layer 3 (7, " in shown and "without_dimensions" in shown and "layer 1 (" not in shown
    assert "massive" not in repr(plain) + plain._repr_html_() and "top 3" in repr(plain)
    assert "\n" not in repr(v), "it stands in the middle of errors"
    nowhere = Direction(np.full(4, np.nan), 0, 0.0, undefined="no difference")
    several = Directions((nowhere,))
    assert "no difference" in repr(several) and "top dimension" not in several._repr_html_()


def history(drift: np.ndarray) -> object:
    difference = RNG.standard_normal(WIDTH)
    difference[7] = 60.0
    states = {"witness": ANCHOR + difference, "anchor": ANCHOR, "run/1": ANCHOR + drift}
    return synthetic(states), difference


def test_an_alignment_of_one_massive_dimension_is_gone_without_it() -> None:
    drift = np.random.default_rng(3).standard_normal(WIDTH)
    drift[7] = 60.0
    residuals, difference = history(drift)  # pyright: ignore
    geometry = without_dimensions(residuals, k=1)
    raw = follow(residuals, locate_vrev(residuals)).table.alignment
    rest = follow(geometry.apply(residuals), locate_in(geometry, residuals)).table.alignment
    left = np.arange(WIDTH) != 7
    wanted = drift[left] @ difference[left] / np.linalg.norm(drift[left]) / np.linalg.norm(difference[left])
    assert raw.min() > 0.95 and rest.to_numpy() == pytest.approx([wanted] * 2, abs=1e-5)
    assert abs(wanted) < 0.3


def test_a_drift_along_all_of_v_rev_stays_aligned_without_its_top() -> None:
    residuals, _ = history(np.zeros(WIDTH))  # pyright: ignore
    values = residuals.values.copy()
    values[2] = values[1] + 0.5 * (values[0] - values[1])
    residuals = dataclasses.replace(residuals, values=values)
    geometry = without_dimensions(residuals)
    found = follow(geometry.apply(residuals), locate_in(geometry, residuals)).table
    assert found.alignment.to_numpy() == pytest.approx(1, abs=1e-5)
    assert found.fraction.to_numpy() == pytest.approx(0.5, abs=1e-5)
    assert (geometry.apply(residuals).of("anchor")[..., 7] == 0).all()
    assert geometry.name == "without_dimensions_3"


def test_as_many_dimensions_as_there_are_cannot_be_removed() -> None:
    residuals, _ = history(np.ones(WIDTH))  # pyright: ignore
    for k in (0, WIDTH):
        with refused(f"The {k} largest"):
            without_dimensions(residuals, k=k)
