"""How far and how straight each run moves along v_rev: alignment, projection, fraction over runs × steps × layers."""

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The drift of every run, measured along one direction a layer.

    Attributes:
        table: one row per run × step × layer × prompt set: `run`, `step`, `layer` (`<NA>` is the mean over
            `layers_in_mean`), `prompts` (`given`: those the directions were estimated on; `held_out`: others),
            `alignment` (cosine), `projection` (residual units), `fraction` (projection / distance: 0 the anchor, 1 all
            the way back), `drift_norm` (residual units), `judged` (the drift is longer than 2 % of the distance).
        layers_in_mean: layers that the mean is taken over; undefined ones are left out and stand in `undefined`.
        undefined: layer -> why it has no direction.
    """

    table: pd.DataFrame
    layers_in_mean: tuple[int, ...]
    undefined: Mapping[int, str] = field(default_factory=dict)

    def summary(self, prompts: str | None = None) -> pd.DataFrame:
        """Mean ± SEM over runs of the layer mean's `alignment, fraction`, a row a step: (measure, mean|sem|count).

        Args:
            prompts: `held_out` or `given`; default: `held_out`, or `given` where there is no other.

        Raises:
            GravlensError: a set that the table has no rows of.
        """
        default = "held_out" if (self.table.prompts == "held_out").any() else "given"
        rows = rows_on(self.table, default if prompts is None else prompts)
        return rows[rows.layer.isna()].groupby("step")[["alignment", "fraction"]].agg(["mean", "sem", "count"])

    def to_xarray(self) -> xarray.Dataset:
        """The measures [run, prompts, step, layer], NaN where a run lacks a step; without the mean over layers."""
        rows = self.table[self.table.layer.notna()].astype({"layer": int})
        return rows.set_index(["run", "prompts", "step", "layer"])[list(MEASURES)].to_xarray()

    def _repr_html_(self) -> str:
        runs, layers = html.listed(self.table.run.unique()), html.listed(self.layers_in_mean)
        notes = [f"runs: {runs}", f"mean over the layers {layers}, ± over runs (SEM)"]
        notes += [f"layer {layer} is undefined: {why}" for layer, why in self.undefined.items()]
        return html.of_frame(self.summary().reset_index(), title="Trajectory", notes=notes, rest=".summary()")


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
        directions: one direction a layer, or a single one.
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
    table = pd.concat([_follow_set(one, defined, mean) for one in sets], ignore_index=True)
    undefined = {d.layer: d.undefined for d in directions if d.undefined is not None}
    return Trajectory(table, tuple(mean), undefined)


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


def _follow_set(residuals: Residuals, directions: Directions, mean: list[int]) -> pd.DataFrame:
    if not residuals.runs:
        raise GravlensError(
            f"These residuals hold no run ({', '.join(residuals.checkpoints)}).",
            "A trajectory needs the checkpoints of at least one run.",
            'runs={"seed0": "ft/checkpoint-*"} in the sequence.',
        )
    label = "given" if residuals.prompts == directions.directions[0].prompts else "held_out"
    frames = []
    for run, steps in residuals.runs.items():
        measures = measure_drift(drifts(residuals, run, directions.layers), directions)
        frames.append(tabulate(run, steps, measures, directions, mean))
    return pd.concat(frames, ignore_index=True).assign(prompts=label)


def tabulate(
    run: str,
    steps: Sequence[int],
    measures: Mapping[str, Float[np.ndarray, "step layer"]],
    directions: Directions,
    mean: Sequence[int],
) -> pd.DataFrame:
    """One run's measures and whether they are judged, one row a step and layer, and of the mean over some layers."""
    layers = directions.layers
    columns = [layers.index(layer) for layer in mean]
    judged = measures["drift_norm"] > JUDGED_FROM * directions.distances
    per_layer = {name: values.ravel() for name, values in {**measures, "judged": judged}.items()}
    table = pd.DataFrame(
        {"run": run, "step": np.repeat(steps, len(layers)), "layer": list(layers) * len(steps), **per_layer}
    )
    means = {name: values[:, columns].mean(1) for name, values in measures.items()}
    means["judged"] = judged[:, columns].all(1)
    layer_mean = pd.DataFrame(
        {"run": run, "step": list(steps), "layer": pd.array([pd.NA] * len(steps), "Int64"), **means}
    )
    return pd.concat([table.astype({"layer": "Int64"}), layer_mean], ignore_index=True)


def _columns(residuals: Residuals, layers: Sequence[int]) -> list[int]:
    missing = [layer for layer in layers if layer not in residuals.layers]
    if missing:
        raise GravlensError(
            f"The residuals hold no layer {missing}.", f"They hold {list(residuals.layers)}.", "cache those layers too."
        )
    return [residuals.layers.index(layer) for layer in layers]
