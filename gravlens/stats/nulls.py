"""Null distributions of the alignment: a null is a function that returns draws; `compare` gives p-values of runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float
from numpy.random import Generator
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

__all__ = ["covariance_matched", "isotropic", "other_prompts", "sample_covariance", "sign_flips", "swapped_labels"]


TIED_WITHIN = 1e-9  # closer cosines are equal but for the order of summation
ABOVE = 0.01 + 1e-9  # 1/100 of 99 draws, and its rounding


@dataclass(frozen=True, eq=False)
class NullDraws:
    """Draws of the cosine with v_rev under a null hypothesis.

    Attributes:
        cosines: [draw, step, layer]; the layers of one draw belong together.
        run: the only run that the draws serve, or None for every run.
        of: `run`, or `mean`: each draw is a mean over runs, to compare with the runs' mean.

    Examples:
        >>> null = gl.NullDraws("chance", rng.uniform(-0.1, 0.1, (200, 1, 3)), steps=(20,), layers=(0, 1, 2))
        >>> gl.compare(tr, null).layer_mean.run.tolist()
        ['seed0', 'seed1']
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
        layers = f"cosine with v_rev, mean over the layers {html.listed(self.layers)}"
        notes = [f"{len(self.cosines):,} draws for {served}", layers]
        quantiles = np.quantile(self.cosines.mean(-1), (0.01, 0.5, 0.99), axis=0).round(3) + 0.0  # no −0
        rows = list(zip(self.steps, *quantiles, strict=True))
        return html.table(("step", "p1", "median", "p99"), rows, title=f"NullDraws: {self.name}", notes=notes)


def isotropic_p_value(cosine: float, d_model: int) -> float:
    """P(cos > c) of a uniformly random direction: ½ P(Beta(½, (d − 1)/2) > c²), mirrored for c < 0."""
    tail = 0.5 * float(stats.beta.sf(cosine**2, 0.5, (d_model - 1) / 2))
    return tail if cosine >= 0 else 1 - tail


def isotropic_quantile(probability: float, d_model: int) -> float:
    """Quantile of the cosine of a uniformly random direction with a fixed one, in closed form."""
    # cos² ~ Beta(½, (d − 1)/2), symmetric in sign
    magnitude = float(np.sqrt(stats.beta.ppf(abs(2 * probability - 1), 0.5, (d_model - 1) / 2)))
    return magnitude if probability >= 0.5 else -magnitude


def isotropic(
    directions: Directions, *, steps: Sequence[int], draws: int, rng: Generator, coherent: bool = True
) -> NullDraws:
    """Uniformly random drifts. Nearly vacuous: real drifts are anything but isotropic.

    The p99 of one layer is about 2.33 / √d_model, that of the layer mean depends on how layers hang together
    (docs/nulls.md). The draws are those of each step in `steps`; undefined directions are left out.

    Args:
        coherent: one random drift for all layers, as a residual stream carries it on: its cosines are as correlated as
            the directions are, and the mean over layers has a wide null. False: a drift per layer, all independent,
            called `isotropic_independent`; the p99 of the mean is smaller by up to √layers.

    Examples:
        >>> null = gl.nulls.isotropic(vs, steps=[1, 5, 20], draws=200, rng=rng)
        >>> null.cosines.shape  # draw, step, layer
        (200, 3, 3)
    """
    defined = Directions.of(directions).defined()
    vectors, shape = defined.vectors.astype(np.float64), (draws, len(steps))
    if coherent:
        # Coordinates along the directions' span are all that a cosine needs: nothing of size d_model is drawn.
        left, sizes, _ = np.linalg.svd(vectors, full_matrices=False)
        drawn = rng.standard_normal((*shape, len(sizes)))
        along, square = drawn @ (left * sizes).T, (drawn**2).sum(-1, keepdims=True)
    else:
        along = rng.standard_normal((*shape, len(defined)))
        square = along**2
    rest = vectors.shape[1] - (min(vectors.shape) if coherent else 1)  # squared length of the other normals
    across = rng.chisquare(rest, square.shape) if rest else 0.0
    name = "isotropic" if coherent else "isotropic_independent"
    return NullDraws(name, along / np.sqrt(square + across), tuple(steps), defined.layers)


def covariance_matched(
    directions: Directions,
    samples: Float[np.ndarray, "sample layer d_model"],
    *,
    steps: Sequence[int],
    draws: int,
    rng: Generator,
    name: str = "covariance_matched",
    centred: bool = True,
) -> NullDraws:
    """Drifts from N(0, Σ), Σ the Ledoit–Wolf covariance of states or drifts: random, but where states vary.

    Shrinkage makes the null too narrow where samples are few for their participation ratio (docs/nulls.md): then use
    `sample_covariance`. GravlensError for samples of other layers, fewer than two, or not finite.

    Args:
        directions: one direction per layer.
        samples: the anchor's states, or per-prompt drifts; one column per direction (undefined ones may be left out).
        steps: the steps that the null serves; each has its own draws.
        draws: per step.
        centred: Σ about the samples' mean; False for drifts, where Σ is their second moment.

    Examples:
        >>> null = gl.nulls.covariance_matched(vs, given.of("anchor"), steps=[20], draws=200, rng=rng)
        >>> null.cosines.shape
        (200, 1, 3)
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
    rng: Generator,
    name: str = "sample_covariance",
    centred: bool = True,
) -> NullDraws:
    """`covariance_matched` without shrinkage: random mixtures Σ_i g_i x_i of the samples, g standard normal.

    Examples:
        >>> null = gl.nulls.sample_covariance(vs, given.of("anchor"), steps=[20], draws=200, rng=rng)
        >>> gl.compare(tr, null).layer_mean.run.tolist()
        ['seed0', 'seed1']
    """
    defined, columns = defined_columns(Directions.of(directions), samples)
    drawn = draws_by_layer(columns, draws=draws * len(steps), rng=rng, centred=centred, shrunk=False)
    return _null_of_draws(name, drawn, defined, steps)


def sign_flips(trajectory: Trajectory, *, prompts: str = "held_out", draws: int, rng: Generator) -> NullDraws:
    """The runs' mean cosine, had each run gone the other way with probability ½: exact for independent runs.

    All steps and layers of a run flip together. Up to 12 runs every pattern but the true one is a draw (`draws` and
    `rng` are unused), so that `compare` gives the exact p = k / 2ⁿ, at least 2⁻ⁿ. The draws are of the mean over runs,
    at the steps that all runs have; GravlensError where there is none.

    Examples:
        >>> null = gl.nulls.sign_flips(tr, draws=999, rng=rng)
        >>> gl.compare(tr, null).layer_mean.query("step == 20").p_value.tolist()  # of two runs, 2⁻² at least
        [0.25]
    """
    table = rows_on(check_trajectory(trajectory).table, prompts)
    # a run that stopped early has fewer
    steps = sorted(set.intersection(*(set(rows.step) for _, rows in table.groupby("run")))) if len(table) else []
    if not steps:
        given = f"The runs {sorted(trajectory.table.run.unique())} have no {prompts} step in common."
        raise GravlensError(given, "The mean over runs is taken by step.", "runs saved at the same steps.")
    rows = table[table.step.isin(steps)].sort_values(["run", "step", "layer"])  # the order of the axes that follow
    layers = tuple(int(layer) for layer in sorted(rows.layer.unique()))
    alignment = rows.alignment.to_numpy(dtype=np.float64).reshape(-1, len(steps), len(layers))
    cosines = mean_under_signs(alignment, draws, rng)
    return NullDraws("sign_flips", cosines, tuple(map(int, steps)), layers, of="mean")


def swapped_labels(probes: Residuals, held_out: Residuals, *, run: str, draws: int, rng: Generator) -> NullDraws:
    """v_rev from probes on which witness and anchor swap places with probability ½, one probe at a time.

    The drift is of other prompts and stays. A draw is mean_i ε_i ⟨drift, w_i − a_i⟩ / (‖drift‖ · distance): the drift's
    projection in true distances, with every ε_i = 1 the alignment with the difference of means. Up to 12 probes every
    pattern but the true one is a draw. GravlensError where both sets are of the same prompts.

    Examples:
        >>> null = gl.nulls.swapped_labels(given, held_out, run="seed0", draws=999, rng=rng)
        >>> null.cosines.shape  # of six probes every pattern but the true one
        (63, 3, 3)
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
    rng: Generator,
    name: str = "other_prompts",
) -> NullDraws:
    """The run's cosine on random prompts out of two sets together: exact where the sets are exchangeable.

    A small p says that the drift on the held-out prompts points to v_rev more than that on the others (harmless ones,
    random text) does, not that it does so at all (a permutation test over prompts: docs/nulls.md). Each draw is a
    subset as large as the held-out set. GravlensError where both sets are of the same prompts, or share no step of the
    run.

    Examples:
        >>> null = gl.nulls.other_prompts(held_out, given, vs, run="seed0", draws=99, rng=rng)
        >>> null.cosines.shape
        (99, 3, 3)
    """
    _check_apart(held_out, others, "The two sets")
    defined, size = directions.defined(), held_out.values.shape[1]
    steps = tuple(step for step in held_out.runs.get(run, ()) if step in others.runs.get(run, ()))
    if not steps:
        given = f"{run} has steps {held_out.runs.get(run)} on one prompt set, {others.runs.get(run)} on the other."
        remedy = f"residuals of the same checkpoints; here are the runs {list(held_out.runs)} and {list(others.runs)}."
        raise GravlensError(given, "Both need a common step.", remedy)
    n_all = size + others.values.shape[1]
    # the same subsets at every step: the steps of a draw belong together
    chosen = rng.permuted(np.tile(np.arange(n_all) < size, (draws, 1)), axis=1) / size
    cosines = np.empty((draws, len(steps), len(defined)))
    for column, step in enumerate(steps):
        sets = [drift_per_prompt(one, f"{run}/{step}", defined.layers) for one in (held_out, others)]
        cosines[:, column] = _cosines_of_mixtures(chosen, np.concatenate(sets), defined)
    return NullDraws(name, cosines, steps, defined.layers, run)


def p_value(drawn: Float[np.ndarray, " draw"], alignment: float) -> float:
    """One-sided (1 + k) / (1 + n), k of n draws at least as large as the alignment, ties included."""
    # not `>=`: a run or a draw without drift has no cosine, and must not count as significant
    return (1 + int((~(drawn < alignment - TIED_WITHIN)).sum())) / (1 + len(drawn))


def compare(trajectory: Trajectory, null: NullDraws, *, prompts: str = "held_out") -> ByLayer:
    """Compare every run at every step with a null distribution, at each layer and for the mean over layers.

    For the layer mean the layers of each draw are averaged first. Draws of one run are compared with that run, draws of
    the mean over runs with that mean (rows of the run `mean`). GravlensError where the trajectory has no rows on
    `prompts` at the null's steps and layers.

    Returns:
        Columns `null, run, step, layer, alignment, p99, p_value` ((1 + k)/(1 + n), one-sided), `above`: the alignment
        exceeds the p99 and p is at most .01, which takes 99 draws.

    Examples:
        >>> null = gl.nulls.isotropic(vs, steps=[1, 5, 20], draws=200, rng=rng)
        >>> gl.compare(tr, null).layer_mean.columns.tolist()
        ['null', 'run', 'step', 'alignment', 'p99', 'p_value', 'above']
    """
    check_trajectory(trajectory)
    of_kind(null, NullDraws, "NullDraws are needed.", "isotropic(directions, steps=…, draws=…, rng=…).")
    wanted = {*trajectory.data["layer"].values.tolist(), *trajectory.layers_in_mean}
    if missing := sorted(wanted - {*null.layers}):
        given = f"The null {null.name} has no draws of layer {', '.join(map(str, missing))}."
        raise GravlensError(given, f"It has the layers {list(null.layers)}.", "one set of directions for both.")
    rows, means = (_observed(table, null, prompts) for table in (trajectory.table, trajectory.layer_mean))
    draws = null.data  # by name: the null may have more steps and layers, in another order
    # not the mean of the layers' quantiles: layers are correlated
    over = draws.sel(layer=list(trajectory.layers_in_mean)).mean("layer", skipna=False)
    each = [draws.sel(step=step, layer=layer) for step, layer in zip(rows.step, rows.layer, strict=True)]
    return ByLayer(_compared(rows, each), _compared(means, [over.sel(step=step) for step in means.step]))


def beside_random_drifts(trajectory: Trajectory, directions: Directions, *, draws: int = 20_000) -> pd.DataFrame:
    """Compare every run at every step with `isotropic` drifts, mean over layers; draws are seeded with 0.

    Held-out prompts if there are any. Returns the columns of `compare`, `fraction`, `judged` and `prompts`.
    """
    prompts = "held_out" if "held_out" in trajectory.data["prompts"] else "given"
    steps = tuple(map(int, trajectory.data["step"].values))
    null = isotropic(directions, steps=steps[:1], draws=draws, rng=np.random.default_rng(0))
    # random drifts know no steps: the same draws serve all of them
    cosines = np.broadcast_to(null.cosines, (draws, len(steps), len(null.layers)))
    found = compare(trajectory, replace(null, cosines=cosines, steps=steps), prompts=prompts).layer_mean
    columns = ["run", "step", "fraction", "judged", "prompts"]
    return found.merge(rows_on(trajectory.layer_mean, prompts)[columns], on=["run", "step"])


def _compared(rows: pd.DataFrame, draws: Sequence[xarray.DataArray]) -> pd.DataFrame:
    p99 = np.array([np.quantile(drawn, 0.99) for drawn in draws])
    p = np.array([p_value(drawn.to_numpy(), value) for drawn, value in zip(draws, rows.alignment, strict=True)])
    # fewer than 99 draws have no p99 of their own: the quantile then lies below the largest of them
    return rows.assign(p99=p99, p_value=p, above=(rows.alignment > p99) & (p <= ABOVE))


def _observed(table: pd.DataFrame, null: NullDraws, prompts: str) -> pd.DataFrame:
    """`null, run, step, layer, alignment` of the rows to compare with a null."""
    table = rows_on(table, prompts)
    table = table[table.step.isin(null.steps)]
    table = table if null.run is None else table[table.run == null.run]
    if table.empty:
        of_run = "" if null.run is None else f" of {null.run}"
        given = f"The trajectory has no {prompts} rows{of_run} at the steps {list(null.steps)}."
        raise GravlensError(given, "A null is compared by step.", "draws for the trajectory's runs and steps.")
    places = [name for name in ("step", "layer") if name in table]
    if null.of == "mean":
        # a run without drift has no cosine, and the mean has none either
        means = table.groupby(places, sort=False).alignment.agg(lambda runs: runs.mean(skipna=False))
        table = means.reset_index().assign(run="mean")
    return table.assign(null=null.name)[["null", "run", *places, "alignment"]].reset_index(drop=True)


def _null_of_draws(
    name: str, drawn: Iterable[Float[np.ndarray, "draw d_model"]], directions: Directions, steps: Sequence[int]
) -> NullDraws:
    """Cosines of draws given layer by layer, divided among the steps."""
    pairs = zip(drawn, directions, strict=True)
    # one layer at a time is in memory
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
        given = f"{what} are of the same prompts ({one.prompts})."
        raise GravlensError(given, "This null is between two prompt sets.", "other residuals for one of the two.")
