"""How far and how straight each run moves along v_rev: alignment, projection, fraction over runs × steps × layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, cache_residuals, check_states
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, of_kind
from gravlens.directions.direction import Direction, Directions
from gravlens.history.sequence import ModelSequence

# A cosine of a drift shorter than this share of the distance is noise, and is marked as not judged.
JUDGED_FROM = 0.02
MEASURES = ("alignment", "projection", "fraction", "drift_norm")
AXES = ("run", "prompts", "step", "layer")


# --- two tables: each layer, and the mean over layers --------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class ByLayer:
    """A result at each layer and for the mean over layers, as two tidy tables.

    The mean has a table of its own: it is not a layer, and quantiles or standard deviations of it cannot be computed
    from the rows of the layers.

    Attributes:
        table: one row per layer, with a column `layer`.
        layer_mean: the mean over layers, the same columns without `layer`.
    """

    table: pd.DataFrame
    layer_mean: pd.DataFrame

    @classmethod
    def of(cls, data: xarray.Dataset, layers: Sequence[int] | None = None) -> "ByLayer":
        """Tables of a dataset with the axis `layer`; the mean is over `layers` (default: all)."""
        return cls(tidy(data), tidy(over_layers(data, layers)))

    @classmethod
    def split(cls, axes: Mapping[str, Sequence[Any]], values: Mapping[str, np.ndarray]) -> "ByLayer":
        """Tables of arrays [*axes, layer] that hold the mean after the last layer; `axes` ends with `layer`."""
        *outer, _ = axes
        each = xarray.Dataset({name: (tuple(axes), one[..., :-1]) for name, one in values.items()}, axes)
        mean = {name: (tuple(outer), one[..., -1]) for name, one in values.items()}
        return cls(tidy(each), tidy(xarray.Dataset(mean, {name: axes[name] for name in outer})))

    @classmethod
    def concat(cls, parts: Iterable["ByLayer"]) -> "ByLayer":
        """Concatenate the rows of several results."""
        pairs = zip(*((part.table, part.layer_mean) for part in parts), strict=True)
        # an empty table has no dtypes of its own, and pandas warns that it may soon change those of the others
        full = ([table for table in tables if len(table)] or tables for tables in pairs)
        return cls(*(pd.concat(tables, ignore_index=True) for tables in full))

    def assign(self, columns: Mapping[str, Any]) -> "ByLayer":
        """Add columns to both tables."""
        return ByLayer(self.table.assign(**columns), self.layer_mean.assign(**columns))

    def _repr_html_(self) -> str:
        return html.of_frame(self.table, title="By layer", notes=["the mean over layers: .layer_mean"])


def over_layers(data: xarray.Dataset, layers: Sequence[int] | None = None) -> xarray.Dataset:
    """Mean over layers; a flag holds where it holds at all of them, NaN at one layer makes the mean NaN."""
    chosen = data if layers is None else data.sel(layer=list(layers))

    def reduced(values: xarray.DataArray) -> xarray.DataArray:
        if "layer" not in values.dims:
            return values
        return values.all("layer") if values.dtype == bool else values.mean("layer", skipna=False)

    return chosen.map(reduced).drop_vars("layer", errors="ignore")


def tidy(data: xarray.Dataset) -> pd.DataFrame:
    """One row per cell; the axes are the first columns, in the order of the first variable's."""
    return data.to_dataframe(list(next(iter(data.values())).dims)).reset_index()


# --- trajectories --------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Trajectory:
    """The drift of every run, measured along one direction per layer.

    Attributes:
        data: the measures [run, prompts, step, layer]: `alignment` (cosine), `projection` (residual units), `fraction`
            (projection / distance: 0 the anchor, 1 all the way back), `drift_norm` (residual units) and `judged` (the
            drift is longer than 2 % of the distance). `prompts` is `given` (the directions were estimated on these) or
            `held_out` (others). NaN, and not judged, where a run has no such step.
        layers_in_mean: the layers that means are taken over; undefined ones are excluded and listed in `undefined`.
        undefined: layer -> why it has no direction.
    """

    data: xarray.Dataset
    layers_in_mean: tuple[int, ...]
    undefined: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: pd.DataFrame, *, layers_in_mean: Sequence[int] | None = None) -> "Trajectory":
        """Build a trajectory from its `.table`, for example from CSV; by default the mean is over all layers."""
        measures = [name for name in (*MEASURES, "judged") if name in table]
        data = table.set_index(list(AXES))[measures].to_xarray()
        if "judged" in data:  # bool with missing cells comes back as object
            data["judged"] = data["judged"].where(data["judged"].notnull(), False).astype(bool)
        return cls(data, tuple(data["layer"].values.tolist() if layers_in_mean is None else layers_in_mean))

    @property
    def table(self) -> pd.DataFrame:
        """One row per run × prompt set × step × layer that was measured, a column per measure."""
        return _measured(self.data)

    @property
    def layer_mean(self) -> pd.DataFrame:
        """The mean over `layers_in_mean`, one row per run × prompt set × step; `judged` at every layer of the mean."""
        return _measured(over_layers(self.data, self.layers_in_mean))

    def summary(self, prompts: str | None = None) -> pd.DataFrame:
        """Mean ± SEM over runs of the layer mean's `alignment, fraction`, a row per step: (measure, mean|sem|count).

        Args:
            prompts: `held_out` or `given`; default: `held_out`, or `given` where there is no other.

        Raises:
            GravlensError: a set that the table has no rows of.
        """
        default = "held_out" if "held_out" in self.data["prompts"] else "given"
        rows = rows_on(self.layer_mean, default if prompts is None else prompts)
        return rows.groupby("step")[["alignment", "fraction"]].agg(["mean", "sem", "count"])

    def _repr_html_(self) -> str:
        runs, layers = html.listed(self.data["run"].values), html.listed(self.layers_in_mean)
        notes = [f"runs: {runs}", f"mean over the layers {layers}, ± over runs (SEM)"]
        notes += [f"layer {layer} is undefined: {why}" for layer, why in self.undefined.items()]
        return html.of_frame(self.summary().reset_index(), title="Trajectory", notes=notes, rest=".summary()")


def _measured(data: xarray.Dataset) -> pd.DataFrame:
    """Rows without the cells of steps that a run does not have; a step without drift has a norm and stays."""
    table = tidy(data)
    return table.dropna(how="all", subset=[name for name in MEASURES if name in table]).reset_index(drop=True)


def follow(
    residuals: Residuals | Sequence[Residuals] | ModelSequence,
    directions: Directions | Direction,
    *,
    layers_in_mean: int | Sequence[int] | None = None,
) -> Trajectory:
    """Follow the drift h(θ_t) − h(anchor) of every run along the directions.

    alignment = cos(drift, v), projection = ⟨drift, v⟩, fraction = projection / distance (docs/trajectory.md).

    Args:
        residuals: of one prompt set or of several; a set is called `given` where it is the directions' own. Of a
            sequence, its probes and held-out prompts are read, at the directions' layers.
        directions: one direction per layer, or a single one.
        layers_in_mean: layers of the mean (default: all of the directions').

    Raises:
        GravlensError: the residuals hold no run, or no direction is defined.
    """
    directions = Directions.of(directions)
    sets = _sets_of(residuals, directions)
    defined = directions.defined()
    wanted = directions if layers_in_mean is None else directions.at(layers_in_mean)
    mean = [direction.layer for direction in wanted if direction.undefined is None]
    if not mean:
        raise GravlensError(
            f"No direction of the layers {list(wanted.layers)} is defined.",
            f"Defined: {list(defined.layers)}.",
            "layers_in_mean with one of these.",
        )
    given = [one.prompts == defined.directions[0].prompts for one in sets]
    if len(set(given)) < len(sets):
        raise GravlensError(
            f"{len(sets)} sets of residuals were given, {sum(given)} of them on the directions' own prompts.",
            "One set is given (the directions' own prompts), one held out; two of a kind would count a run twice.",
            "follow(…) for each set by itself.",
        )
    check_geometry(defined, sets)
    data = _joined((_follow_set(one, defined) for one in sets), "prompts")
    undefined = {d.layer: d.undefined for d in directions if d.undefined is not None}
    return Trajectory(data, tuple(mean), undefined)


def rows_on(table: pd.DataFrame, prompts: str) -> pd.DataFrame:
    """The rows of a trajectory's table on one prompt set; GravlensError where it has none."""
    rows = table[table.prompts == prompts]
    if rows.empty:
        known = sorted(table.prompts.unique()) or ["none"]
        raise GravlensError(
            f"The runs {sorted(table.run.unique())} have no rows on the prompt set {prompts!r}.",
            f"Prompt sets of this trajectory: {', '.join(known)}.",
            f"prompts={known[0]!r}, or follow(…) on residuals of that set too.",
        )
    return rows


def _sets_of(source: Residuals | Sequence[Residuals] | ModelSequence, directions: Directions) -> list[Residuals]:
    """The residuals that were given, or those of a sequence's probes and held-out prompts."""
    if not isinstance(source, ModelSequence):
        return [check_states(one) for one in as_list(source)]
    sets = [one for one in (source.probes, source.held_out) if one is not None] or [source.require_probes()]
    first = directions.directions[0]
    if first.prompts not in {one.digest for one in sets}:  # else both would count as held out, and each run twice
        sets = sets[-1:]
    reading: dict[str, Any] = {
        "layers": directions.layers,
        "positions": first.made_from.get("positions", "last"),
        "checkpoints": [one for one in source if one is not source.witness],
    }
    return [cache_residuals(source, prompts, **reading) for prompts in sets]


def check_trajectory(given: Trajectory) -> Trajectory:
    """A trajectory as it is; GravlensError for anything else."""
    return of_kind(
        given, Trajectory, "A Trajectory is needed.", "follow(residuals, directions), or follow(sequence, …)."
    )


def check_geometry(directions: Directions, sets: Sequence[Residuals]) -> None:
    """GravlensError where directions and states are of different geometries."""
    located = {direction.made_from.get("geometry", "raw") for direction in directions}
    states = {one.meta.get("geometry", "raw") for one in sets}
    if len(located | states) > 1:
        raise GravlensError(
            f"Geometry of the directions: {', '.join(sorted(located))}; of the states: {', '.join(sorted(states))}.",
            "A direction is a vector of one geometry, and means nothing in another.",
            "geometry.apply(residuals) with the geometry that the directions were located in.",
        )


def runs_of(residuals: Residuals) -> dict[str, tuple[int, ...]]:
    """Run -> steps; GravlensError where there is no run."""
    if not residuals.runs:
        raise GravlensError(
            f"These residuals hold no run ({', '.join(residuals.checkpoints)}).",
            "A drift needs the checkpoints of at least one run.",
            'runs={"seed0": "ft/checkpoint-*"} in the sequence.',
        )
    return residuals.runs


def mean_state(residuals: Residuals, checkpoint: str, layers: Sequence[int]) -> Float[np.ndarray, "layer d_model"]:
    """h_l of a checkpoint, the mean over the prompts in fp64."""
    return residuals.of(checkpoint).mean(0, dtype=np.float64)[_columns(residuals, layers)]


def drifts(residuals: Residuals, run: str, layers: Sequence[int]) -> Float[np.ndarray, "step layer d_model"]:
    """h_l(θ_t) − h_l(anchor) of a run, means over the prompts in fp64."""
    if run not in residuals.runs:
        raise GravlensError(f"There is no run {run!r} here.", f"Runs here: {list(residuals.runs)}.", "one of these.")
    anchor = mean_state(residuals, "anchor", layers)
    return np.stack([mean_state(residuals, f"{run}/{step}", layers) - anchor for step in residuals.runs[run]])


def drift_per_prompt(
    residuals: Residuals, checkpoint: str, layers: Sequence[int], *, start: str = "anchor"
) -> Float[np.ndarray, "prompt layer d_model"]:
    """h_l(x; checkpoint) − h_l(x; start) of each prompt x, in fp64."""
    columns = _columns(residuals, layers)
    return residuals.of(checkpoint)[:, columns].astype(np.float64) - residuals.of(start)[:, columns]


def measure_drift(
    drift: Float[np.ndarray, "*batch layer d_model"], directions: Directions
) -> dict[str, Float[np.ndarray, "*batch layer"]]:
    """The four measures of drifts along directions; the cosine of no drift is NaN."""
    projection = einsum(drift, directions.vectors.astype(np.float64), "... layer d, layer d -> ... layer")
    norm = np.linalg.norm(drift, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        alignment = projection / norm
    return {
        "alignment": alignment,
        "projection": projection,
        "fraction": projection / directions.distances,
        "drift_norm": norm,
    }


def _follow_set(residuals: Residuals, directions: Directions) -> xarray.Dataset:
    prompts = "given" if residuals.prompts == directions.directions[0].prompts else "held_out"
    runs = []
    for run, steps in runs_of(residuals).items():
        measures = measure_drift(drifts(residuals, run, directions.layers), directions)
        runs.append(as_dataset(run, prompts, steps, measures, directions))
    return _joined(runs, "run")


def as_dataset(
    run: str,
    prompts: str,
    steps: Sequence[int],
    measures: Mapping[str, Float[np.ndarray, "step layer"]],
    directions: Directions,
) -> xarray.Dataset:
    """One run's measures on one prompt set, and whether they are judged [run, prompts, step, layer]."""
    judged = measures["drift_norm"] > JUDGED_FROM * directions.distances
    variables = {name: (AXES, values[None, None]) for name, values in {**measures, "judged": judged}.items()}
    places = ([run], [prompts], list(steps), list(directions.layers))
    return xarray.Dataset(variables, dict(zip(AXES, places, strict=True)))


def _joined(parts: Iterable[xarray.Dataset], axis: str) -> xarray.Dataset:
    # NaN would turn the flags into objects
    missing = {"judged": False}
    return xarray.concat(list(parts), axis, join="outer", fill_value=missing)


def _columns(residuals: Residuals, layers: Sequence[int]) -> list[int]:
    missing = [layer for layer in layers if layer not in residuals.layers]
    if missing:
        raise GravlensError(
            f"The residuals hold no layer {missing}.", f"They hold {list(residuals.layers)}.", "cache those layers too."
        )
    return [residuals.layers.index(layer) for layer in layers]
