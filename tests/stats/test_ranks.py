"""`rank_test`: against enumeration of every outcome, and its size under the null."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy import stats

from gravlens.core.errors import GravlensError
from gravlens.stats.permutation import rank_test


def enumerated(ranks: list[int], sizes: list[int]) -> Fraction:
    """The same probability, from every combination of ranks in exact fractions."""

    def total(combination: tuple[int, ...]) -> Fraction:
        return sum((Fraction(2 * r - 1, 2 * n) for r, n in zip(combination, sizes, strict=True)), Fraction(0))

    outcomes = list(product(*[range(1, size + 1) for size in sizes]))
    return Fraction(sum(total(one) <= total(tuple(ranks)) for one in outcomes), len(outcomes))


@pytest.mark.parametrize("sizes", [[5], [4, 4], [20, 20], [3, 5], [2, 3, 4], [4, 4, 4, 4], [2, 5, 4, 3], [1, 4]])
def test_it_equals_enumeration_at_every_outcome(sizes: list[int]) -> None:
    for ranks in product(*[range(1, size + 1) for size in sizes]):
        assert rank_test(list(ranks), sizes) == pytest.approx(float(enumerated(list(ranks), sizes)), rel=1e-12)


def test_the_least_p_is_the_chance_of_being_first_everywhere() -> None:
    assert rank_test([1] * 6, [6] * 6) == pytest.approx(6.0**-6)
    assert rank_test([1, 1, 1], [20, 21, 23]) == pytest.approx(1 / (20 * 21 * 23))
    assert rank_test([20], [20]) == 1.0


def test_a_share_that_is_alpha_on_paper_does_not_exceed_it() -> None:
    assert [rank_test([size // 20], [size]) for size in range(20, 2001, 20)] == [0.05] * 100


def test_units_are_exchangeable_and_numpy_integers_are_whole_numbers() -> None:
    assert rank_test([2, 5, 1], [6, 9, 4]) == pytest.approx(rank_test([1, 2, 5], [4, 6, 9]))
    assert rank_test(np.array([2, 3]), np.array([6, 6])) == rank_test([2, 3], [6, 6])  # pyright: ignore


def test_many_units_of_one_size_are_near_the_normal_distribution() -> None:
    units, size, rank = 40, 20, 8
    deviation = np.sqrt(units * (size**2 - 1) / 12)  # of the sum of ranks
    normal = stats.norm.cdf((units * (rank - (size + 1) / 2) + 0.5) / deviation)  # half a rank for continuity
    assert rank_test([rank] * units, [size] * units) == pytest.approx(normal, rel=0.05)


@pytest.mark.parametrize(("anchors", "controls"), [(1, 19), (2, 4), (6, 5)])
def test_under_the_null_it_rejects_at_most_alpha(anchors: int, controls: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((20_000, anchors, controls + 1))
    ranks = 1 + (values[..., 1:] >= values[..., :1]).sum(-1)
    p = {one: rank_test(list(one), [controls + 1] * anchors) for one in {tuple(r) for r in ranks.tolist()}}
    rejected = np.mean([p[tuple(r)] <= 0.05 for r in ranks.tolist()])
    attainable = max((value for value in p.values() if value <= 0.05), default=0.0)  # the size of a discrete test
    assert attainable > 0.03 and rejected == pytest.approx(attainable, abs=4 * np.sqrt(0.05 * 0.95 / 20_000))


@pytest.mark.parametrize(
    ("ranks", "sizes"), [([], []), ([1], [2, 3]), ([0], [5]), ([6], [5]), ([1.5], [5]), ([1], [2.0])]
)
def test_what_is_no_rank_is_refused(ranks: list[int], sizes: list[int]) -> None:
    with pytest.raises(GravlensError, match=r"size = controls \+ 1"):
        rank_test(ranks, sizes)
