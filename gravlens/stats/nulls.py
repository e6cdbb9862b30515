"""Null distributions of the alignment: a null is a function that returns draws; `compare` gives p-values of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float
from scipy import stats

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, of_kind
from gravlens.directions.covariance import draws_by_layer
from gravlens.directions.direction import Directions, defined_columns
from gravlens.directions.trajectory import (
    ByLayer,
    Trajectory,
    check_trajectory,
    drift_per_prompt,
    drifts,
    measure_drift,
    rows_on,
)
from gravlens.stats.permutation import mean_under_signs

# Cosines closer than this are the same one, added up in another order.
TIED_WITHIN = 1e-9
ABOVE = 0.01 + 1e-9  # p of what is called above a null


@dataclass(frozen=True, eq=False)
class NullDraws:
    """Draws of the cosine with v_rev under a null hypothesis.

    Attributes:
        name: name of the null.
        cosines: of the null's drifts, [draw, step, layer]; the layers of one draw belong together.
        steps: the steps of the second axis.
        layers: the layers of the third axis.
        run: the run that the draws belong to; None: they serve every run.
        of: `run`, or `mean`: each draw is a mean over runs, and is compared with the mean of the runs.
    """

    name: str
    cosines: Float[np.ndarray, "draw step layer"] = field(repr=False)
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    run: str | None = None
    of: Literal["run", "mean"] = "run"

    @property
    def data(self) -> xarray.DataArray:
        """The cosines [draw, step, layer] with named axes."""
        places = {"step": list(self.steps), "layer": list(self.layers)}
        return xarray.DataArray(self.cosines, places, ("draw", "step", "layer"), self.name)

    def _repr_html_(self) -> str:
        served = "the mean over runs" if self.of == "mean" else self.run or "every run"
        notes = [
            f"{len(self.cosines):,} draws for {served}",
            f"cosine with v_rev, mean over the layers {html.listed(self.layers)}",
        ]
        quantiles = np.quantile(self.cosines.mean(-1), (0.01, 0.5, 0.99), axis=0).round(3) + 0.0  # no −0
        rows = list(zip(self.steps, *quantiles, strict=True))
        return html.table(("step", "p1", "median", "p99"), rows, title=f"NullDraws: {self.name}", notes=notes)


def isotropic_p_value(cosine: float, d_model: int) -> float:
    """P(cos > c) of a uniformly random direction: ½ P(Beta(½, (d − 1)/2) > c²), mirrored for negative c."""
    tail = 0.5 * float(stats.beta.sf(cosine**2, 0.5, (d_model - 1) / 2))
    return tail if cosine >= 0 else 1 - tail


def isotropic_quantile(probability: float, d_model: int) -> float:
    """The quantile of the cosine of a uniformly random direction with a fixed one, in closed form."""
    magnitude = float(np.sqrt(stats.beta.ppf(abs(2 * probability - 1), 0.5, (d_model - 1) / 2)))
    return magnitude if probability >= 0.5 else -magnitude


def isotropic(directions: Directions, *, steps: Sequence[int], draws: int, rng: np.random.Generator) -> NullDraws:
    """Uniformly random drifts, independent between layers. Nearly vacuous: real drifts are anything but isotropic.

    The p99 of one layer is about 2.33 / √d_model (docs/nulls.md).

    Args:
        directions: one direction per layer; undefined ones are left out.
        steps: the steps that it serves; each has draws of its own.
        draws: how many at each step.
        rng: source of randomness.
    """
    directions = Directions.of(directions)
    defined = directions.defined()
    shape = (draws, len(steps), len(defined))
    along = rng.standard_normal(shape)
    across = rng.chisquare(defined.vectors.shape[1] - 1, shape)
    return NullDraws("isotropic", along / np.sqrt(along**2 + across), tuple(steps), defined.layers)


def covariance_matched(
    directions: Directions,
    samples: Float[np.ndarray, "sample layer d_model"],
    *,
    steps: Sequence[int],
    draws: int,
    rng: np.random.Generator,
    name: str = "covariance_matched",
    centred: bool = True,
) -> NullDraws:
    """Drifts from N(0, Σ), Σ the Ledoit–Wolf covariance of some states or drifts: random, but where states vary.

    Shrinkage makes the null narrower than it should be where the samples are few for their participation ratio
    (docs/nulls.md): then `sample_covariance` is the one to believe.

    Args:
        directions: one direction per layer.
        samples: the anchor's states, or per-prompt drifts, residual units; one column per direction (undefined ones may
            be left out).
        steps: the steps that it serves; each has draws of its own.
        draws: how many at each step.
        rng: source of randomness.
        name: of the null.
        centred: Σ about the samples' mean; False for drifts, where Σ is their second moment.

    Returns:
        Cosines [draw, step, layer]; the layers of one draw are correlated as the samples' are.
        GravlensError for samples of other layers, fewer than two, or not finite.
    """
    defined, columns = defined_columns(Directions.of(directions), samples)
    drawn = draws_by_layer(columns, draws=draws * len(steps), rng=rng, centred=centred)
    return _null_of_draws(name, drawn, defined, steps)


def sample_covariance(
    directions: Directions,
    samples: Float[np.ndarray, "sample layer d_model"],
    *,
    steps: Sequence[int],
    draws: int,
    rng: np.random.Generator,
    name: str = "sample_covariance",
    centred: bool = True,
) -> NullDraws:
    """`covariance_matched` without shrinkage: random mixtures Σ_i g_i x_i of the samples, g standard normal.

    Arguments, what is returned and what is refused: see `covariance_matched`, like all that is not named here.
    """
    defined, columns = defined_columns(Directions.of(directions), samples)
    drawn = draws_by_layer(columns, draws=draws * len(steps), rng=rng, centred=centred, shrunk=False)
    return _null_of_draws(name, drawn, defined, steps)


def sign_flips(trajectory: Trajectory, *, prompts: str = "held_out", draws: int, rng: np.random.Generator) -> NullDraws:
    """The runs' mean cosine, had each run gone the other way with probability ½: exact where runs are independent.

    All steps and layers of a run flip together. Up to 12 runs every pattern but the true one is a draw, so that the
    p-value of `compare` is the exact k / 2ⁿ; its least value is 2⁻ⁿ.

    Args:
        trajectory: the runs.
        prompts: `held_out` or `given`: which of its rows.
        draws: how many; not read up to 12 runs.
        rng: source of randomness, for more than 12 runs.

    Returns:
        Draws of the mean over runs (`of="mean"`), at the steps that all runs have.
        GravlensError where there is none.
    """
    table = rows_on(check_trajectory(trajectory).table, prompts)
    steps = sorted(set.intersection(*(set(rows.step) for _, rows in table.groupby("run")))) if len(table) else []
    if not steps:
        raise GravlensError(
            f"The runs {sorted(trajectory.table.run.unique())} have no {prompts} step in common.",
            "The mean over runs is taken step by step.",
            "runs that were saved at the same steps, or the other set of prompts.",
        )
    rows = table[table.step.isin(steps)].sort_values(["run", "step", "layer"])
    layers = tuple(int(layer) for layer in sorted(rows.layer.unique()))
    alignment = rows.alignment.to_numpy(dtype=np.float64).reshape(-1, len(steps), len(layers))
    cosines = mean_under_signs(alignment, draws, rng)
    return NullDraws("sign_flips", cosines, tuple(map(int, steps)), layers, of="mean")


def swapped_labels(
    probes: Residuals, held_out: Residuals, *, run: str, draws: int, rng: np.random.Generator
) -> NullDraws:
    """v_rev from probes on which witness and anchor change places with probability ½, one probe at a time.

    The drift is that of other prompts and stays. A draw is mean_i ε_i ⟨drift, w_i − a_i⟩ / (‖drift‖ · distance): the
    drift's projection in units of the true distance, which with every ε_i = 1 is the alignment with the difference of
    means. Up to 12 probes every pattern but the true one is a draw.

    Args:
        probes: residuals with `witness` and `anchor`, that v_rev is located on.
        held_out: residuals with `anchor` and the run, on other prompts.
        run: name of the run.
        draws: how many.
        rng: source of randomness.

    Raises:
        GravlensError: both sets are of the same prompts, or the run is not among the held-out residuals.
    """
    check_states(probes)
    _check_apart(probes, held_out, "v_rev and the drift")
    drift = drifts(held_out, run, probes.layers)
    apart = probes.of("witness").astype(np.float64) - probes.of("anchor")
    along = einsum(drift, apart, "step layer d, prompt layer d -> prompt step layer")
    scale = np.linalg.norm(drift, axis=-1) * np.linalg.norm(apart.mean(0), axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = mean_under_signs(along, draws, rng) / scale
    return NullDraws("swapped_labels", cosines, held_out.runs[run], probes.layers, run)


def other_prompts(
    held_out: Residuals,
    others: Residuals,
    directions: Directions,
    *,
    run: str,
    draws: int,
    rng: np.random.Generator,
    name: str = "other_prompts",
) -> NullDraws:
    """The run's cosine on random prompts out of two sets together: exact where the sets are exchangeable.

    A small p says that the drift on the held-out prompts points to v_rev more than that on the others does, not that it
    does so at all (a permutation test over prompts: docs/nulls.md).

    Args:
        held_out: residuals with `anchor` and the run, on the prompts that the run is judged on.
        others: the same on other prompts (harmless ones, random text).
        directions: one direction per layer.
        run: name of the run.
        draws: how many subsets, each as large as the held-out set.
        rng: source of randomness.
        name: of the null.

    Raises:
        GravlensError: both sets are of the same prompts, or have no step of the run in common.
    """
    _check_apart(held_out, others, "The two sets")
    defined, size = directions.defined(), held_out.values.shape[1]
    steps = tuple(step for step in held_out.runs.get(run, ()) if step in others.runs.get(run, ()))
    if not steps:
        raise GravlensError(
            f"{run} has steps {held_out.runs.get(run)} on one set of prompts, {others.runs.get(run)} on the other.",
            "A step is compared on both.",
            f"residuals of the same checkpoints; here are the runs {list(held_out.runs)} and {list(others.runs)}.",
        )
    n_all = size + others.values.shape[1]
    chosen = rng.permuted(np.tile(np.arange(n_all) < size, (draws, 1)), axis=1) / size
    cosines = np.empty((draws, len(steps), len(defined)))
    for column, step in enumerate(steps):
        sets = [drift_per_prompt(one, f"{run}/{step}", defined.layers) for one in (held_out, others)]
        cosines[:, column] = _cosines_of_mixtures(chosen, np.concatenate(sets), defined)
    return NullDraws(name, cosines, steps, defined.layers, run)


def p_value(drawn: Float[np.ndarray, " draw"], alignment: float) -> float:
    """(1 + k) / (1 + n), k of n draws at least as large as the alignment, ties included; one-sided."""
    # not `>=`: a run or a draw without drift has no cosine, and must not count as significant
    return (1 + int((~(drawn < alignment - TIED_WITHIN)).sum())) / (1 + len(drawn))


def compare(trajectory: Trajectory, null: NullDraws, *, prompts: str = "held_out") -> ByLayer:
    """Compare every run at every step with a null distribution, at each layer and for the mean over layers.

    For the layer mean the layers of each draw are averaged first, so that it has a null of its own. Draws that belong
    to one run are compared with that run alone, draws of the mean over runs with that mean (rows of the run `mean`).

    Args:
        trajectory: the runs.
        null: draws of the cosine, at the trajectory's steps and layers.
        prompts: prompt set, `held_out` or `given`.

    Returns:
        `.table` with columns `null, run, step, layer, alignment, p99, p_value, above`, `.layer_mean` without `layer`;
        p = (1 + k)/(1 + n), one-sided. `above`: the alignment exceeds the p99 and p is at most .01, which takes 99
        draws.

    Raises:
        GravlensError: the trajectory has no such rows at the null's steps.
    """
    check_trajectory(trajectory)
    of_kind(
        null, NullDraws, "Draws of a null distribution are needed.", "isotropic(directions, steps=…, draws=…, rng=…)."
    )
    _check_layers(trajectory, null)
    rows, means = (_observed(table, null, prompts) for table in (trajectory.table, trajectory.layer_mean))
    draws = null.data
    over = draws.sel(layer=list(trajectory.layers_in_mean)).mean("layer", skipna=False)
    return ByLayer(
        _compared(rows, [draws.sel(step=step, layer=layer) for step, layer in zip(rows.step, rows.layer, strict=True)]),
        _compared(means, [over.sel(step=step) for step in means.step]),
    )


def _check_layers(trajectory: Trajectory, null: NullDraws) -> None:
    wanted = {*trajectory.data["layer"].values.tolist(), *trajectory.layers_in_mean}
    if missing := sorted(wanted - {*null.layers}):
        raise GravlensError(
            f"The null {null.name} has no draws of layer {', '.join(map(str, missing))}.",
            f"It is drawn for the layers {list(null.layers)}, and each layer is compared with its own draws.",
            "the null and the trajectory with the same directions.",
        )


def _compared(rows: pd.DataFrame, draws: Sequence[xarray.DataArray]) -> pd.DataFrame:
    p99 = np.array([np.quantile(drawn, 0.99) for drawn in draws])
    p = np.array([p_value(drawn.to_numpy(), value) for drawn, value in zip(draws, rows.alignment, strict=True)])
    # fewer than 99 draws have no p99 of their own: the quantile then lies below the largest of them
    return rows.assign(p99=p99, p_value=p, above=(rows.alignment > p99) & (p <= ABOVE))


def _observed(table: pd.DataFrame, null: NullDraws, prompts: str) -> pd.DataFrame:
    """`null, run, step, layer, alignment` of the rows that a null's draws are compared with."""
    table = rows_on(table, prompts)
    table = table[table.step.isin(null.steps)]
    table = table if null.run is None else table[table.run == null.run]
    if table.empty:
        of_run = "" if null.run is None else f" of {null.run}"
        raise GravlensError(
            f"The trajectory has no {prompts} rows{of_run} at the steps {list(null.steps)}.",
            "A null is compared step by step.",
            "draws for the trajectory's runs and steps.",
        )
    places = [name for name in ("step", "layer") if name in table]
    if null.of == "mean":
        # a run without drift has no cosine, and the mean has none either
        means = table.groupby(places, sort=False).alignment.agg(lambda runs: runs.mean(skipna=False))
        table = means.reset_index().assign(run="mean")
    return table.assign(null=null.name)[["null", "run", *places, "alignment"]].reset_index(drop=True)


def _null_of_draws(
    name: str, drawn: Iterable[Float[np.ndarray, "draw d_model"]], directions: Directions, steps: Sequence[int]
) -> NullDraws:
    """Cosines of draws that come layer by layer, shared out among the steps."""
    pairs = zip(drawn, directions, strict=True)
    cosines = [measure_drift(drift[:, None], Directions((one,)))["alignment"][:, 0] for drift, one in pairs]
    shape = (-1, len(steps), len(directions))
    return NullDraws(name, np.stack(cosines, axis=1).reshape(shape), tuple(steps), directions.layers)


def _cosines_of_mixtures(
    weights: Float[np.ndarray, "draw prompt"], drift: Float[np.ndarray, "prompt layer d_model"], directions: Directions
) -> Float[np.ndarray, "draw layer"]:
    """Cosines of weighted sums of drifts, from their Gram matrices: no [draw, layer, d_model] is made."""
    projection = weights @ measure_drift(drift, directions)["projection"]
    by_layer = drift.transpose(1, 0, 2)
    grams = by_layer @ by_layer.transpose(0, 2, 1)
    squares = np.stack([((weights @ gram) * weights).sum(1) for gram in grams], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return projection / np.sqrt(squares)


def _check_apart(one: Residuals, other: Residuals, what: str) -> None:
    if one.prompts == other.prompts:
        raise GravlensError(
            f"{what} are of the same prompts ({one.prompts}).",
            "This null is between two sets of prompts.",
            "residuals of other prompts for the one or the other.",
        )
