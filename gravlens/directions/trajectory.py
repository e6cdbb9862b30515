"""Trajectories along v_rev: alignment, projection and fraction of each run's drift, by step and layer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, check_states, prepare
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, of_kind
from gravlens.directions.direction import Direction, Directions
from gravlens.history.sequence import ModelSequence

# A cosine of a drift shorter than this share of the distance is noise, and is marked as not judged.
JUDGED_FROM = 0.02
MEASURES = ("alignment", "projection", "fraction", "drift_norm")
AXES = ("run", "prompts", "step", "layer")


@dataclass(frozen=True, eq=False)
class ByLayer:
    """A result as two tidy tables: each layer, and the mean over layers.

    The mean has its own table: its quantiles and standard deviations cannot be computed from the layers' rows.

    Attributes:
        table: one row per layer, with a column `layer`.
        layer_mean: the mean over layers, the same columns without `layer`.
    """

    table: pd.DataFrame
    layer_mean: pd.DataFrame

    @classmethod
    def of(cls, data: xarray.Dataset, layers: Sequence[int] | None = None) -> "ByLayer":
        """Tabulate a dataset with the axis `layer`; the mean is over `layers` (default: all)."""
        return cls(tidy(data), tidy(over_layers(data, layers)))

    @classmethod
    def split(cls, axes: Mapping[str, Sequence[Any]], values: Mapping[str, np.ndarray]) -> "ByLayer":
        """Tabulate arrays [*axes, layer + 1] with the mean after the last layer; `axes` ends with `layer`."""
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
    """Average over layers; flags hold where they hold at all layers, NaN propagates."""
    chosen = data if layers is None else data.sel(layer=list(layers))

    def reduced(values: xarray.DataArray) -> xarray.DataArray:
        if "layer" not in values.dims:
            return values
        # skipna would silently average another set of layers at each step
        return values.all("layer") if values.dtype == bool else values.mean("layer", skipna=False)

    return chosen.map(reduced).drop_vars("layer", errors="ignore")


def tidy(data: xarray.Dataset) -> pd.DataFrame:
    """One row per cell; the axes come first, in the order of the first variable's dimensions."""
    return data.to_dataframe(list(next(iter(data.values())).dims)).reset_index()


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The drift of every run, measured along one direction per layer.

    Attributes:
        data: [run, prompts, step, layer]: `alignment` (cosine), `projection` (residual units), `fraction` (projection /
            distance: 0 the anchor, 1 all the way back), `drift_norm` (residual units), `judged` (drift longer than 2 %
            of the distance). `prompts` is `given` (the directions' own) or `held_out`. NaN where a run has no such
            step.
        layers_in_mean: layers of the mean; undefined ones are excluded.
        undefined: layer -> why it has no direction.
    """

    data: xarray.Dataset
    layers_in_mean: tuple[int, ...]
    undefined: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: pd.DataFrame, *, layers_in_mean: Sequence[int] | None = None) -> "Trajectory":
        """Rebuild a trajectory from its `.table`, e.g. from CSV; by default the mean is over all layers."""
        measures = [name for name in (*MEASURES, "judged") if name in table]
        data = table.set_index(list(AXES))[measures].to_xarray()  # missing cells become NaN
        if "judged" in data:  # bool with missing cells comes back as object
            data["judged"] = data["judged"].where(data["judged"].notnull(), False).astype(bool)
        return cls(data, tuple(data["layer"].values.tolist() if layers_in_mean is None else layers_in_mean))

    @property
    def table(self) -> pd.DataFrame:
        """One row per measured run × prompt set × step × layer, one column per measure."""
        return _measured(self.data)

    @property
    def layer_mean(self) -> pd.DataFrame:
        """The mean over `layers_in_mean`, one row per run × prompt set × step; `judged`: at all these layers."""
        return _measured(over_layers(self.data, self.layers_in_mean))

    def summary(self, prompts: str | None = None) -> pd.DataFrame:
        """Mean ± SEM over runs of `alignment, fraction` of the layer mean by step: (measure, mean|sem|count).

        `prompts` is `held_out` or `given`; default: `held_out`, else `given`.
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
    """Drop the cells of steps that a run does not have; a step without drift has a norm and stays."""
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
    GravlensError without a run or a defined direction.

    Args:
        residuals: of one or several prompt sets (the directions' own is called `given`), or a sequence, of which probes
            and held-out prompts are read at the directions' layers.
        directions: one or several.
        layers_in_mean: layers of the mean (default: all of the directions').
    """
    directions = Directions.of(directions)
    sets = _sets_of(residuals, directions)
    defined = directions.defined()
    wanted = directions if layers_in_mean is None else directions.at(layers_in_mean)
    mean = [direction.layer for direction in wanted if direction.undefined is None]
    if not mean:
        found = f"No direction of the layers {list(wanted.layers)} is defined."
        raise GravlensError(found, f"Defined: {list(defined.layers)}.", "layers_in_mean with one of these.")
    given = [one.prompts == defined.directions[0].prompts for one in sets]  # by digest, not by name
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
    """Select a trajectory table's rows on one prompt set; GravlensError where it has none."""
    rows = table[table.prompts == prompts]
    if rows.empty:
        known = sorted(table.prompts.unique()) or ["none"]
        given = f"The runs {sorted(table.run.unique())} have no rows on the prompt set {prompts!r}."
        raise GravlensError(given, f"Prompt sets: {', '.join(known)}.", f"prompts={known[0]!r}, or follow(…) on it.")
    return rows


def _sets_of(source: Residuals | Sequence[Residuals] | ModelSequence, directions: Directions) -> list[Residuals]:
    """The given residuals, or those of a sequence's probes and held-out prompts."""
    if not isinstance(source, ModelSequence):
        return [check_states(one) for one in as_list(source)]
    first = directions.directions[0]
    reading: dict[str, Any] = {
        "layers": directions.layers,
        "positions": first.made_from.get("positions", "last"),
        # the witness has no drift to follow, and is often the largest download
        "checkpoints": [one for one in source if one is not source.witness],
    }
    # v_rev's own prompts share its noise, so both are read
    sets = [one for one in (source.probes, source.held_out) if one is not None] or [source.require_probes()]
    requests = [prepare(source, prompts, **reading) for prompts in sets]
    if first.prompts not in {one.prompts for one in requests}:  # else both would be held out, and each run count twice
        requests = requests[-1:]
    return [request.read() for request in requests]


def check_trajectory(given: Trajectory) -> Trajectory:
    """Return the trajectory; GravlensError for another type."""
    return of_kind(given, Trajectory, "A Trajectory is needed.", "follow(residuals, directions).")


def check_geometry(directions: Directions, sets: Sequence[Residuals]) -> None:
    """GravlensError where directions and states are in different geometries."""
    located = {direction.made_from.get("geometry", "raw") for direction in directions}
    states = {one.meta.get("geometry", "raw") for one in sets}
    if len(located | states) > 1:
        given = f"Geometry of the directions: {', '.join(sorted(located))}; of the states: {', '.join(sorted(states))}."
        raise GravlensError(given, "Both must be in one geometry.", "geometry.apply(residuals) with the directions'.")


def runs_of(residuals: Residuals) -> dict[str, tuple[int, ...]]:
    """Run -> steps; GravlensError where there is no run."""
    if not residuals.runs:
        given = f"These residuals hold no run ({', '.join(residuals.checkpoints)})."
        raise GravlensError(given, "A drift needs a run.", 'runs={"seed0": "ft/checkpoint-*"} in the sequence.')
    return residuals.runs


def mean_state(residuals: Residuals, checkpoint: str, layers: Sequence[int]) -> Float[np.ndarray, "layer d_model"]:
    """h_l of a checkpoint: the mean over prompts in fp64."""
    return residuals.of(checkpoint).mean(0, dtype=np.float64)[_columns(residuals, layers)]


def drifts(residuals: Residuals, run: str, layers: Sequence[int]) -> Float[np.ndarray, "step layer d_model"]:
    """h_l(θ_t) − h_l(anchor) of a run: means over prompts in fp64."""
    if run not in residuals.runs:
        raise GravlensError(f"There is no run {run!r} here.", f"Runs: {list(residuals.runs)}.", "one of these.")
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
    """The `MEASURES` of drifts along directions; the cosine of a zero drift is NaN."""
    # fp64: a short drift is not far above the 1e-7 of a state's length that fp32 rounds away
    projection = einsum(drift, directions.vectors.astype(np.float64), "... layer d, layer d -> ... layer")
    norm = np.linalg.norm(drift, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):  # a first step may not have moved at all
        alignment = projection / norm
    fraction = projection / directions.distances
    return dict(zip(MEASURES, (alignment, projection, fraction, norm), strict=True))


def _follow_set(residuals: Residuals, directions: Directions) -> xarray.Dataset:
    prompts = "given" if residuals.prompts == directions.directions[0].prompts else "held_out"
    runs = []
    for run, steps in runs_of(residuals).items():
        measures = measure_drift(drifts(residuals, run, directions.layers), directions)
        runs.append(as_dataset(run, prompts, steps, measures, directions))
    return _joined(runs, "run")


def as_dataset(
    run: str, prompts: str, steps: Sequence[int], measures: Mapping[str, np.ndarray], directions: Directions
) -> xarray.Dataset:
    """One run's measures [step, layer] and `judged` on one prompt set, as [run, prompts, step, layer]."""
    judged = measures["drift_norm"] > JUDGED_FROM * directions.distances  # NaN compares false: not judged
    variables = {name: (AXES, values[None, None]) for name, values in {**measures, "judged": judged}.items()}
    places = ([run], [prompts], list(steps), list(directions.layers))
    return xarray.Dataset(variables, dict(zip(AXES, places, strict=True)))


def _joined(parts: Iterable[xarray.Dataset], axis: str) -> xarray.Dataset:
    missing = {"judged": False}  # NaN would turn the flags into objects
    return xarray.concat(list(parts), axis, join="outer", fill_value=missing)


def _columns(residuals: Residuals, layers: Sequence[int]) -> list[int]:
    if missing := [layer for layer in layers if layer not in residuals.layers]:
        given = f"The residuals hold no layer {', '.join(map(str, missing))}."
        raise GravlensError(given, f"They hold {list(residuals.layers)}.", "cache those layers too.")
    return [residuals.layers.index(layer) for layer in layers]
