"""Permutation tests with the run as the unit: sign flips, ranks, max-T, Holm, detrended correlation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np
from einops import einsum
from jaxtyping import Float
from numpy.random import Generator
from scipy import stats

from gravlens.core.errors import GravlensError

Alternative = Literal["greater", "less", "two-sided"]
ALL_SIGNS_UP_TO = 12  # runs: 4,096 sign patterns are enumerated, beyond it random ones are drawn
EXACT_ORDERS = 7  # runs: 5,040 orders
RANDOM = 9_999  # draws where there are too many runs to enumerate
SAME = 1e-10  # sums that are equal on paper differ in their last bits; the statistics are at most 1 in size


def least_p_value(n_runs: int, alternative: Alternative = "greater") -> float:
    """Smallest p of sign flips of `n_runs` runs: 2⁻ⁿ, twice that if two-sided; 1/10,000 beyond 12 runs.

    Examples:
        >>> gl.stats.least_p_value(5), gl.stats.least_p_value(5, "two-sided")
        (0.03125, 0.0625)
    """
    one_sided = 2.0**-n_runs if n_runs <= ALL_SIGNS_UP_TO else 1 / (1 + RANDOM)
    return min(1.0, one_sided * (2 if alternative == "two-sided" else 1))  # two-sided, one run would have 2 · ½


def sign_flip_test(
    values: Float[np.ndarray, "run *cell"], *, alternative: Alternative = "greater", rng: Generator | None = None
) -> Float[np.ndarray, "*cell"]:
    """p of a mean over runs against 0, cell by cell: whole runs change sign.

    The null says that each run's value is symmetric about 0, so subtract the baseline first: the alignment's is not 0
    (a shared anchor, drift common to all fine-tuning), that of a run minus its own control is. All 2ⁿ flips are
    enumerated up to 12 runs, so p is at least 2⁻ⁿ (5 runs: .031, 7: .0078); beyond, 9,999 are drawn, which needs an
    `rng`.

    Args:
        values: the first axis is the run.
        alternative: of the mean; two-sided is twice the smaller side, as in scipy.

    Returns:
        p-values [*cell], not corrected for their number (`max_t`, `holm`); 1 where a run's value is NaN.

    Examples:
        >>> gains = np.array([0.2, 0.3, 0.1, 0.4, 0.2])  # of five runs over their controls
        >>> float(gl.stats.sign_flip_test(gains))
        0.03125
    """
    flipped = _flipped(values, rng)
    sides = {"greater": _share_reached(flipped), "less": _share_reached(-flipped)}
    if check_alternative(alternative) != "two-sided":
        return sides[alternative]
    return np.minimum(1.0, 2 * np.minimum(sides["greater"], sides["less"]))


def rank_test(ranks: Sequence[int], sizes: Sequence[int]) -> float:
    """p of a candidate's ranks among controls, combined over units such as anchors: P(sum of uniform ranks ≤ theirs).

    Rank 1 of K + 1 is the candidate before all its K controls: r = 1 + #{control ≥ candidate}, so that ties count
    against it. Under the null each rank is uniform on 1 … size and independent between units; the statistic is
    Σ (r − ½) / size, the distribution exact, and p at least Π 1 / size.

    Args:
        ranks: one per unit.
        sizes: controls + 1 of each unit; they may differ.

    Raises:
        GravlensError: no unit, other lengths, or a rank that is not a whole number from 1 to its size.

    Examples:
        >>> gl.stats.rank_test([1], [20])  # the first of one candidate and 19 controls
        0.05
    """
    valid = len(ranks) == len(sizes) > 0 and all(isinstance(number, int | np.integer) for number in (*ranks, *sizes))
    if not valid or not all(1 <= rank <= size for rank, size in zip(ranks, sizes, strict=True)):
        given = f"Ranks {list(ranks)} of {list(sizes)} were given."
        raise GravlensError(
            given, "Each unit has a whole rank from 1 to its size.", "size = controls + 1, rank ≤ size."
        )
    scale = math.lcm(*map(int, sizes))  # 2 · scale · (r − ½) / size in whole numbers, where equal sums are equal
    steps = [scale // int(size) for size in sizes]
    reached = sum((2 * int(rank) - 1) * step for rank, step in zip(ranks, steps, strict=True))
    sums, chances = np.zeros(1, dtype=np.int64), np.ones(1)
    for size, step in zip(sizes, steps, strict=True):
        all_sums = (sums[:, None] + (2 * np.arange(1, size + 1) - 1) * step).ravel()
        kept = all_sums <= reached  # a sum beyond the sample's can only grow, and different sizes have many sums
        sums, which = np.unique(all_sums[kept], return_inverse=True)
        chances = np.bincount(which, np.repeat(chances / size, size)[kept], minlength=len(sums))
    return float(f"{min(1.0, chances.sum()):.14g}")  # 3 of 60 is .05, and not a last bit above an alpha of .05


def max_t(
    values: Float[np.ndarray, "run *cell"], *, alternative: Alternative = "greater", rng: Generator | None = None
) -> Float[np.ndarray, "*cell"]:
    """p of each cell (step × layer), adjusted for all of them: how often does the largest cell reach as far?

    Westfall and Young's single-step max-T (1993) by sign flips of whole runs, all cells together, which keeps their
    dependence; the family-wise error is controlled in every configuration of true nulls. The statistic is
    Σv / √(n Σv²), monotonic in Student's t but finite: a flip does not change Σv². Arguments as `sign_flip_test`.

    Returns:
        Adjusted p-values [*cell], at least 2⁻ⁿ; 1 where one is NaN or all are 0.

    Examples:
        >>> gains = np.array([[0.2, 0.0], [0.3, 0.1], [0.1, -0.2], [0.4, 0.1], [0.2, -0.1]])  # run × step
        >>> gl.stats.max_t(gains).tolist()[0]
        0.03125
    """
    flipped = _flipped(values, rng)
    signed = {"greater": flipped, "less": -flipped, "two-sided": np.abs(flipped)}[check_alternative(alternative)]
    cells = signed.reshape(len(signed), -1)
    # fmax skips NaN: a cell without a statistic does not hide the others
    largest = np.fmax.reduce(cells, axis=1, initial=-np.inf)
    return _share_reached(signed, largest.reshape(-1, *[1] * (signed.ndim - 1)))


def holm(p_values: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """Adjust p-values by Holm's step-down (1979): controls the family-wise error under any dependence.

    Examples:
        >>> gl.stats.holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, axis=None)  # over all cells; NaN sorts last and stays
    adjusted = np.empty(p.size)
    # monotonic: a larger p must not be adjusted to a smaller one
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p.ravel()[order] * np.arange(p.size, 0, -1)))
    return adjusted.reshape(p.shape)


def _flipped(values: np.ndarray, rng: Generator | None) -> Float[np.ndarray, "flip *cell"]:
    """Σ s v / √(n Σ v²) over runs, for all flips s; the first is the sample itself."""
    v = np.asarray(values, dtype=np.float64)  # integers and fp32 would tie differently
    if v.ndim == 0 or len(v) == 0:
        given = f"Values of shape {v.shape} were given."
        raise GravlensError(given, "The first axis is the run.", "values [run, step, layer].")
    signs = _signs(len(v), rng)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.tensordot(signs, v / np.sqrt(len(v) * (v**2).sum(0)), 1)


def _signs(n_runs: int, rng: Generator | None) -> Float[np.ndarray, "flip run"]:
    if n_runs <= ALL_SIGNS_UP_TO:
        return sign_patterns(n_runs)
    drawn = demand_rng(rng, n_runs, "sign flips").choice((1.0, -1.0), size=(RANDOM, n_runs))
    return np.concatenate([np.ones((1, n_runs)), drawn])  # with the sample itself, p is never 0


def _share_reached(flipped: np.ndarray, reached: np.ndarray | None = None) -> np.ndarray:
    """Share of the flips with a statistic at least the sample's; not `>=`, so that NaN is never significant."""
    return (~((flipped if reached is None else reached) < flipped[:1] - SAME)).mean(0)


def check_alternative(alternative: Alternative) -> Alternative:
    """Return a valid `alternative`, or raise."""
    if alternative not in ("greater", "less", "two-sided"):
        given = f"alternative={alternative!r} was given."
        raise GravlensError(given, "Known: 'greater', 'less', 'two-sided'.", "one of these.")
    return alternative


def demand_rng(rng: Generator | None, n_runs: int, what: str) -> Generator:
    """Return `rng`, or raise where random draws need one."""
    if rng is None:
        given = f"There are {n_runs} runs and no rng."
        raise GravlensError(given, f"The {what} of many runs are drawn at random.", "rng=np.random.default_rng(0).")
    return rng


@dataclass(frozen=True)
class DetrendedCorrelation:
    """Correlation of two measures beyond the trend that all runs share.

    Attributes:
        correlation: Spearman's ρ less each step's mean over runs; NaN where nothing varies.
        raw: ρ over all run-step pairs, trend and all: two curves that grow always correlate.
        p_value: of `correlation`, by permuting whole runs of one measure against the other.
        n_runs: number of runs; up to 7 all orders are enumerated, so p is at least 1 / n_runs!.
    """

    correlation: float
    raw: float
    p_value: float
    n_runs: int


def detrended_correlation(
    x: Float[np.ndarray, "run step"],
    y: Float[np.ndarray, "run step"],
    *,
    of: Literal["levels", "changes"] = "levels",
    alternative: Alternative = "two-sided",
    rng: Generator | None = None,
) -> DetrendedCorrelation:
    """Correlate two measures over runs and steps, less the step's mean over runs.

    Spearman's ρ of x − mean(x) and y − mean(y): is a run that is ahead in x ahead in y? Differences are not enough: two
    curves that rise early and flatten have changes that shrink together. `of`: `levels`, or `changes` from step to
    step. GravlensError for fewer than 3 runs, NaN, or more than 7 runs without an `rng`.

    Examples:
        >>> alignment = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.5], [0.3, 0.5, 0.8], [0.0, 0.1, 0.1]])  # run × step
        >>> found = gl.stats.detrended_correlation(alignment, alignment**2)
        >>> found.n_runs, found.correlation > 0.5
        (4, True)
    """
    x, y = (np.asarray(one, dtype=np.float64) for one in (x, y))
    if x.shape != y.shape or x.ndim != 2 or len(x) < 3 or not np.isfinite([x, y]).all():
        given = f"x {x.shape} and y {y.shape} were given."
        raise GravlensError(given, "Both are finite [run, step], three runs at least.", "leave out missing steps.")
    x, y = (one / (np.abs(one).max() or 1.0) for one in (x, y))  # one scale, for _ranks rounds to 12 digits
    raw = float((_ranks(x) * _ranks(y)).mean())
    if of == "changes":
        if x.shape[1] < 2:
            raise GravlensError("There is one step.", "A change needs two.", "of='levels'.")
        x, y = np.diff(x), np.diff(y)
    orders = _orders(len(x), rng)
    # [run, run]: Spearman's is its trace, with the runs in their order
    between: np.ndarray = _ranks(x - x.mean(0)) @ _ranks(y - y.mean(0)).T / x.size
    permuted = between[orders, np.arange(len(x))].sum(1)
    reached = {"greater": permuted, "less": -permuted, "two-sided": np.abs(permuted)}[check_alternative(alternative)]
    return DetrendedCorrelation(float(permuted[0]), raw, float(_share_reached(reached)), len(x))


def _ranks(values: Float[np.ndarray, "run step"]) -> Float[np.ndarray, "run step"]:
    """Standardised ranks over all entries: the mean product of two is Spearman's ρ; NaN if all are equal."""
    ranks = stats.rankdata(values.round(12)).reshape(values.shape)  # a mean taken out leaves its last bits
    with np.errstate(invalid="ignore"):
        return (ranks - ranks.mean()) / ranks.std()


def _orders(n_runs: int, rng: Generator | None) -> np.ndarray:
    """Orders of the runs, their own first."""
    if n_runs <= EXACT_ORDERS:
        return np.array(list(permutations(range(n_runs))))
    own = np.arange(n_runs)
    return np.concatenate([own[None], demand_rng(rng, n_runs, "orders").permuted(np.tile(own, (RANDOM, 1)), axis=1)])


def sign_patterns(units: int) -> Float[np.ndarray, "pattern unit"]:
    """All 2ⁿ patterns of signs; the first flips nothing."""
    return np.array(list(product((1.0, -1.0), repeat=units)))


def mean_under_signs(
    values: Float[np.ndarray, "unit step layer"], draws: int, rng: Generator
) -> Float[np.ndarray, "draw step layer"]:
    """Means over units under random sign flips; for few units, under every pattern but the true one."""
    units = len(values)
    few = units <= ALL_SIGNS_UP_TO
    signs = sign_patterns(units)[1:] if few else rng.choice((1.0, -1.0), (draws, units))
    return einsum(signs, values, "draw unit, unit step layer -> draw step layer") / units
