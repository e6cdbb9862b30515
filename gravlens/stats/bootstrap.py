"""Cluster bootstrap over runs and prompts: confidence intervals of alignment and fraction."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
from scipy import stats

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import ByLayer, drift_per_prompt, follow

Interval = Literal["basic", "percentile"]
MEASURED = ["alignment", "fraction"]
PAIRS_AT_ONCE = 2_000_000  # numbers in memory at a time: draws × pairs of prompts do not fit at once


def bootstrap_alignment(
    residuals: Residuals,
    directions: Directions,
    *,
    draws: int,
    rng: Generator,
    layers_in_mean: Sequence[int] | None = None,
    level: float = 0.95,
    interval: Interval = "basic",
) -> ByLayer:
    """Confidence intervals of alignment and fraction: over prompts for a run, over runs *and* prompts for their mean.

    Each draw resamples the prompts once for all runs, steps and layers, and the runs once for all steps that the same
    runs have (two-way cluster bootstrap: Owen, "The pigeonhole bootstrap", 2007). The directions are held fixed: their
    own sampling error is not included (`split_half_reliability`, `cross_fit`).

    Args:
        residuals: with `anchor` and the runs; best on prompts that the directions were not estimated on.
        directions: one direction per layer.
        layers_in_mean: layers of the mean (default: all of the directions').
        interval: `basic` reflects the draws' quantiles about the estimate and widens those over n runs by
            t(n − 1) / z · √(n / (n − 1)) (Hesterberg, "What teachers should know about the bootstrap", 2015);
            `percentile` lies too low, for resampled prompts add noise to the drift (docs/statistics.md).

    Returns:
        `measure` (`alignment`, `fraction`), `run` (`mean`: over runs, NaN bounds for a single run or where a run has no
        drift), `step, layer`, `estimate, low, high`.

    Examples:
        >>> intervals = gl.stats.bootstrap_alignment(held_out, vs, draws=200, rng=rng)
        >>> rows = intervals.layer_mean.query("run == 'mean' and measure == 'fraction'")
        >>> bool((rows.low <= rows.high).all())
        True
    """
    residuals, directions = check_states(residuals), Directions.of(directions)
    if draws < 1 or not 0 < level < 1 or interval not in ("basic", "percentile"):
        given = f"draws={draws}, level={level} and interval={interval!r} were given."
        raise GravlensError(given, "draws ≥ 1, 0 < level < 1, interval 'basic' or 'percentile'.", "draws=10_000.")
    followed = follow(residuals, directions, layers_in_mean=layers_in_mean)
    vs = directions.defined()
    mean = [vs.layers.index(layer) for layer in followed.layers_in_mean]
    weights = _weights(residuals.values.shape[1], draws, rng)  # once: all runs and steps are read on the same prompts
    shares: dict[tuple[str, ...], np.ndarray] = {}
    parts = []
    for step in sorted({step for steps in residuals.runs.values() for step in steps}):
        runs = tuple(run for run, steps in residuals.runs.items() if step in steps)
        drift = np.stack([drift_per_prompt(residuals, f"{run}/{step}", vs.layers) for run in runs])
        drawn = _resample(drift, vs, weights)
        drawn = np.concatenate([drawn, drawn[..., mean].mean(-1, keepdims=True)], axis=-1)  # the layer mean is the last
        if runs not in shares:  # drawn once per set of runs: steps of one run are not independent
            shares[runs] = _weights(len(runs), draws, rng)
        over_runs = np.einsum("br,mbrl->mbl", shares[runs], drawn)[:, :, None]
        widened = [*[1.0] * len(runs), _widening(len(runs), level)]
        bounds = _bounds(np.concatenate([drawn, over_runs], axis=2), np.array(widened), level, interval)
        axes = {"measure": MEASURED, "run": [*runs, "mean"], "step": [step], "layer": list(vs.layers)}
        parts.append(ByLayer.split(axes, dict(zip(("estimate", "low", "high"), bounds[:, :, :, None], strict=True))))
    return ByLayer.concat(parts)


def _weights(items: int, draws: int, rng: Generator) -> Float[np.ndarray, "draw item"]:
    """Weight of each item in each draw; the first row is the sample itself."""
    drawn = rng.multinomial(items, np.full(items, 1 / items), size=draws)
    return np.concatenate([np.ones((1, items)), drawn]) / items


def _resample(
    drift: Float[np.ndarray, "run prompt layer d_model"], vs: Directions, weights: Float[np.ndarray, "draw prompt"]
) -> Float[np.ndarray, "measure draw run layer"]:
    """Alignment and fraction of the resampled mean drift: ⟨W D, v⟩, and ‖W D‖² = Σ_ij W_i W_j (D Dᵀ)_ij over i ≤ j."""
    along = np.einsum("rpld,ld->prl", drift, vs.vectors.astype(np.float64), optimize=True)
    projection = np.tensordot(weights, along, 1)
    one, other = np.triu_indices(drift.shape[1])  # pairs: no [draw, run, layer, d_model] is made
    cells = drift.swapaxes(1, 2)  # [run, layer, prompt, d_model]
    gram = (cells @ cells.swapaxes(-1, -2))[..., one, other] * np.where(one == other, 1.0, 2.0)
    gram = gram.reshape(-1, len(one)).T  # [pair, cell]
    parts = np.array_split(weights, 1 + len(weights) * len(one) // PAIRS_AT_ONCE)
    squared = [(part.T[one] * part.T[other]).T @ gram for part in parts]
    norm = np.sqrt(np.concatenate(squared).clip(min=0)).reshape(projection.shape)  # rounding may leave −0
    with np.errstate(invalid="ignore", divide="ignore"):
        alignment = projection / norm
    return np.stack([alignment, projection / vs.distances])


def _bounds(
    drawn: Float[np.ndarray, "measure draw run layer"], widened: np.ndarray, level: float, interval: Interval
) -> Float[np.ndarray, "bound measure run layer"]:
    """Estimate, low and high; the first draw is the sample itself."""
    estimate = drawn[:, 0]
    ends = np.quantile(drawn[:, 1:], [(1 - level) / 2, (1 + level) / 2], axis=1)
    if interval == "basic":
        ends = estimate + (estimate - ends[::-1]) * widened[:, None]
    ends[:, 0] = ends[:, 0].clip(-1, 1)  # a reflected or widened cosine may pass 1
    ends[:, :, np.isnan(widened)] = np.nan
    return np.concatenate([estimate[None], ends])


def _widening(n_runs: int, level: float) -> float:
    """Widening of an interval over `n_runs`; NaN for one run."""
    if n_runs == 1:
        return float("nan")
    side = (1 + level) / 2
    # t for z, and the n − 1 of a variance for the n of the draws'
    return float(stats.t.ppf(side, n_runs - 1) / stats.norm.ppf(side) * np.sqrt(n_runs / (n_runs - 1)))
