"""Permutation tests with the run as the unit: sign flips, max-T, Holm, detrended correlation."""

from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np
from einops import einsum
from jaxtyping import Float
from scipy import stats

from gravlens.core.errors import GravlensError

Alternative = Literal["greater", "less", "two-sided"]
EXACT_ORDERS = 7  # runs: 5,040 orders are enumerated, as are 4,096 sign flips of 12
RANDOM = 9_999  # draws where there are too many runs to enumerate
SAME = 1e-10  # sums that are equal on paper differ in their last bits; the statistics are at most 1 in size


# --- tests over runs ----------------------------------------------------------------------------------------------
def least_p_value(n_runs: int, alternative: Alternative = "greater") -> float:
    """Least p of sign flips of `n_runs` runs: p = 2⁻ⁿ, twice that for a two-sided `alternative`; 1/10,000 if drawn."""
    one_sided = 2.0**-n_runs if n_runs <= ALL_SIGNS_UP_TO else 1 / (1 + RANDOM)
    return min(1.0, one_sided * (2 if alternative == "two-sided" else 1))


def sign_flip_test(
    values: Float[np.ndarray, "run *cell"],
    *,
    alternative: Alternative = "greater",
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, "*cell"]:
    """p of a mean over runs against 0, cell by cell: whole runs change sign.

    The null says that each run's value is symmetric about 0, so subtract the baseline first: the alignment's is not 0
    (a shared anchor, drift common to all fine-tuning), that of a run minus its own control is. All 2ⁿ flips are
    enumerated up to 12 runs, so n runs give no p below 2⁻ⁿ (5 runs: .031, 7: .0078); beyond, 9,999 are drawn. p is not
    corrected for the number of cells (`max_t`, `holm`).

    Args:
        values: one value a run, of any unit, or an array of them; the first axis is the run.
        alternative: of the mean; two-sided is twice the smaller side, as in scipy.
        rng: source of randomness, for more than 12 runs.

    Returns:
        p-values [*cell]; 1 where a run's value is NaN. GravlensError without a run, or without an rng that is needed.
    """
    flipped = _flipped(values, rng)
    sides = {"greater": _share_reached(flipped), "less": _share_reached(-flipped)}
    if check_alternative(alternative) != "two-sided":
        return sides[alternative]
    return np.minimum(1.0, 2 * np.minimum(sides["greater"], sides["less"]))


def max_t(
    values: Float[np.ndarray, "run *cell"],
    *,
    alternative: Alternative = "greater",
    rng: np.random.Generator | None = None,
) -> Float[np.ndarray, "*cell"]:
    """p of each cell (step × layer), adjusted for all of them: how often does the largest cell reach as far?

    Westfall and Young's single-step max-T (1993) by sign flips of whole runs, all cells together, which keeps their
    dependence; the family-wise error is held in every configuration of true nulls. The statistic is Σv / √(n Σv²),
    which grows with Student's t and, unlike it, is finite: a flip does not change Σv².

    Args:
        values: of any unit, one per run and cell, less its baseline (see `sign_flip_test`); the first axis is the run.
        alternative: of the means.
        rng: source of randomness, for more than 12 runs.

    Returns:
        Adjusted p-values [*cell], 2⁻ⁿ at least; 1 where one is NaN, or all are 0. GravlensError as `sign_flip_test`.
    """
    flipped = _flipped(values, rng)
    signed = {"greater": flipped, "less": -flipped, "two-sided": np.abs(flipped)}[check_alternative(alternative)]
    cells = signed.reshape(len(signed), -1)
    largest = np.fmax.reduce(cells, axis=1, initial=-np.inf)
    return _share_reached(signed, largest.reshape(-1, *[1] * (signed.ndim - 1)))


def holm(p_values: Float[np.ndarray, "*cell"]) -> Float[np.ndarray, "*cell"]:
    """p-values adjusted by Holm's step-down (1979): family-wise error held whatever the dependence, with less power."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, axis=None)
    adjusted = np.empty(p.size)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, p.ravel()[order] * np.arange(p.size, 0, -1)))
    return adjusted.reshape(p.shape)


def _flipped(values: np.ndarray, rng: np.random.Generator | None) -> Float[np.ndarray, "flip *cell"]:
    """Σ s v / √(n Σ v²) over runs, for all flips s; the first is the sample itself."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim == 0 or len(v) == 0:
        raise GravlensError(
            f"Values of shape {v.shape} were given.", "The first axis is the run.", "values [run, step, layer]."
        )
    signs = _signs(len(v), rng)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.tensordot(signs, v / np.sqrt(len(v) * (v**2).sum(0)), 1)


def _signs(n_runs: int, rng: np.random.Generator | None) -> Float[np.ndarray, "flip run"]:
    if n_runs <= ALL_SIGNS_UP_TO:
        return sign_patterns(n_runs)
    drawn = demand_rng(rng, n_runs, "sign flips").choice((1.0, -1.0), size=(RANDOM, n_runs))
    return np.concatenate([np.ones((1, n_runs)), drawn])


def _share_reached(flipped: np.ndarray, reached: np.ndarray | None = None) -> np.ndarray:
    """Share of the flips whose statistic is at least the sample's; not `>=`, so that NaN is never significant."""
    return (~((flipped if reached is None else reached) < flipped[:1] - SAME)).mean(0)


def check_alternative(alternative: Alternative) -> Alternative:
    """Return a valid `alternative`, or raise."""
    if alternative not in ("greater", "less", "two-sided"):
        raise GravlensError(
            f"alternative={alternative!r} was given.", "It is 'greater', 'less' or 'two-sided'.", "'greater'."
        )
    return alternative


def demand_rng(rng: np.random.Generator | None, n_runs: int, what: str) -> np.random.Generator:
    """Return `rng`, or raise where random draws need one."""
    if rng is None:
        raise GravlensError(
            f"There are {n_runs} runs and no rng.",
            f"The {what} of more than a few runs are drawn, not enumerated.",
            "rng=np.random.default_rng(0).",
        )
    return rng


# --- two curves ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DetrendedCorrelation:
    """Do two measures go together beyond the trend that all runs share?

    Attributes:
        correlation: Spearman's ρ after the mean over runs is taken out at each step; −1 to 1, NaN where nothing varies.
        raw: the same correlation over all run-step pairs, trend and all: two curves that grow always correlate.
        p_value: of `correlation`, by permuting whole runs of one measure against the other.
        n_runs: how many runs; all orders are enumerated up to 7, so no p is below 1 / n_runs!.
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
    rng: np.random.Generator | None = None,
) -> DetrendedCorrelation:
    """Correlation of two measures over runs and steps, less the step's mean over runs.

    Spearman's ρ of x − mean(x) and y − mean(y), means over runs at each step: is a run that is ahead in x ahead in y?
    Differences are not enough: two curves that rise early and flatten have changes that shrink together.

    Args:
        x: a measure of any unit, e.g. the alignment, one row a run.
        y: a measure of any unit, e.g. the harmfulness, same runs and steps.
        of: `levels`, or `changes` from step to step.
        alternative: of the correlation.
        rng: source of randomness, for more than 7 runs.

    Raises:
        GravlensError: shapes differ, fewer than 3 runs, NaN, one step for `changes`.
    """
    x, y = (np.asarray(one, dtype=np.float64) for one in (x, y))
    if x.shape != y.shape or x.ndim != 2 or len(x) < 3 or not np.isfinite([x, y]).all():
        raise GravlensError(
            f"x {x.shape} and y {y.shape} were given.",
            "Both are finite [run, step] of the same runs and steps, three runs at least.",
            "leave out steps that are missing from a run.",
        )
    x, y = (one / (np.abs(one).max() or 1.0) for one in (x, y))
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
    """Ranks over all entries, standardised: the mean product of two is Spearman's correlation; NaN if all are equal."""
    ranks = stats.rankdata(values.round(12)).reshape(values.shape)  # a mean taken out leaves its last bits
    with np.errstate(invalid="ignore"):
        return (ranks - ranks.mean()) / ranks.std()


def _orders(n_runs: int, rng: np.random.Generator | None) -> np.ndarray:
    """Orders of the runs; the first is their own."""
    if n_runs <= EXACT_ORDERS:
        return np.array(list(permutations(range(n_runs))))
    own = np.arange(n_runs)
    return np.concatenate([own[None], demand_rng(rng, n_runs, "orders").permuted(np.tile(own, (RANDOM, 1)), axis=1)])


# Up to here all patterns of signs are gone through (4,095 of them), above it random ones are drawn.
ALL_SIGNS_UP_TO = 12


def sign_patterns(units: int) -> Float[np.ndarray, "pattern unit"]:
    """All 2ⁿ patterns of signs; the first flips nothing."""
    return np.array(list(product((1.0, -1.0), repeat=units)))


def mean_under_signs(
    values: Float[np.ndarray, "unit step layer"], draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw step layer"]:
    """Means over units under random sign flips; for few units, under every pattern but the true one."""
    units = len(values)
    few = units <= ALL_SIGNS_UP_TO
    signs = sign_patterns(units)[1:] if few else rng.choice((1.0, -1.0), (draws, units))
    return einsum(signs, values, "draw unit, unit step layer -> draw step layer") / units
