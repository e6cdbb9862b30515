"""Trajectories along v_rev (alignment, projection, fraction of each run's drift), and of concepts located again."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float

from gravlens.activations.positions import Positions
from gravlens.activations.residuals import (
    Residuals,
    cache_sets,
    check_states,
    noise_floor,
    prepare,
    read_together,
    run_and_step,
)
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, of_kind
from gravlens.directions.direction import Direction, Directions
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.models.placement import Placement

# A cosine of a drift shorter than this share of the distance, or than the dtype's noise, is marked as not judged.
JUDGED_FROM = 0.02
SHOWN = 6  # undefined layers, and twice as many steps, that a repr tells
MEASURES = ("alignment", "projection", "fraction", "drift_norm")
AXES = ("run", "prompts", "step", "layer")
# Facts of a reading that directions and states have in common, and how to make it so.
READ_ALIKE = {
    "positions": "cache_residuals(…, positions=…) with those of the directions.",
    "chat_template": "one sequence for both, or chat_template = … in SEQUENCE.toml.",
    "chat_template_kwargs": "the same chat_template_kwargs for both, in the tokenizer or SEQUENCE.toml.",
}


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
    __repr__ = html.brief

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
            distance: 0 the anchor, 1 all the way back), `drift_norm` (residual units), `judged` (the drift is longer
            than 2 % of the distance, and than the dtype's noise). `prompts` is `given` (the directions' own) or
            `held_out`. NaN where a run has no such step.
        layers_in_mean: layers of the mean; undefined ones are excluded.
        undefined: layer -> why it has no direction.

    Examples:
        >>> tr.summary().index.tolist()  # alignment and fraction by step: mean, SEM and number of runs
        [1, 5, 20]
        >>> tr.table.shape[0]  # runs × prompt sets × steps × layers
        36
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
        return self._tables["layers"].copy()

    @property
    def layer_mean(self) -> pd.DataFrame:
        """The mean over `layers_in_mean`, one row per run × prompt set × step; `judged`: at all these layers."""
        return self._tables["mean"].copy()

    @cached_property
    def _tables(self) -> dict[str, pd.DataFrame]:
        # copied for each reader, who may add columns: a verdict reads them a hundred times
        return {"layers": _measured(self.data), "mean": _measured(over_layers(self.data, self.layers_in_mean))}

    def summary(self, prompts: str | None = None) -> pd.DataFrame:
        """Mean ± SEM over runs of `alignment, fraction` of the layer mean by step: (measure, mean|sem|count).

        `count` is the number of runs that the mean is over: fewer where a run has no such step, or did not move (it has
        no alignment then). `prompts` is `held_out` or `given`; default: `held_out`, else `given`.
        """
        rows = self._rows(prompts)
        return rows.groupby("step")[["alignment", "fraction"]].agg(["mean", "sem", "count"])

    def _rows(self, prompts: str | None = None) -> pd.DataFrame:
        default = "held_out" if "held_out" in self.data["prompts"] else "given"
        return rows_on(self.layer_mean, default if prompts is None else prompts)

    def _notes(self) -> list[str]:
        """Say which layers and runs the summary's means are over."""
        rows, layers = self._rows(), html.listed(self.layers_in_mean)
        names = html.listed(rows["run"].unique())
        notes = [f"runs: {names}", f"mean over the layers {layers}, ± over runs (SEM)"]
        notes += [f"layer {layer} is undefined: {html.cell(why)}" for layer, why in [*self.undefined.items()][:SHOWN]]
        if len(self.undefined) > SHOWN:
            notes.append(f"all undefined layers: {html.listed(self.undefined)}")
        n, measured = rows["run"].nunique(), rows.groupby("step")
        if lacking := _steps_below(measured["fraction"].count(), n):
            notes.append(f"not every run has every step, so means are over different runs: {lacking} of {n} runs")
        if "judged" in rows and (small := _steps_below(measured["judged"].sum(), measured["judged"].count())):
            notes.append(f"the drift is long enough to judge the alignment of only some runs: {small}")
        return notes

    def __repr__(self) -> str:
        if self.table.empty:  # of a monitor before the first step
            return "Trajectory without a measurement"
        return "\n".join(["Trajectory", *self._notes(), self.summary().round(3).to_string(max_rows=2 * SHOWN)])

    def _repr_html_(self) -> str:
        return html.of_frame(self.summary().reset_index(), title="Trajectory", notes=self._notes(), rest=".summary()")


def _steps_below(counts: pd.Series, wanted: pd.Series | int) -> str:
    """Name the steps where a count is below what is wanted: `step 1: 2, step 5: 0`."""
    return html.listed(f"step {step}: {count}" for step, count in counts[counts < wanted].items())


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
    GravlensError without a run or a defined direction, or where directions and states were read at different positions
    or with different chat templates.

    Args:
        residuals: of one or several prompt sets (the directions' own is called `given`), or a sequence, of which probes
            and held-out prompts are read at the directions' layers.
        directions: one or several.
        layers_in_mean: layers of the mean (default: all of the directions').

    Examples:
        >>> tr = gl.follow(seq, vs, layers_in_mean=[0, 1])
        >>> tr.layer_mean.run.unique().tolist(), tr.layers_in_mean
        (['seed0', 'seed1'], (0, 1))
        >>> bool((tr.layer_mean.query("step == 20").fraction > 0).all())
        True
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
    check_comparable(defined, sets)
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
    return read_together(requests)


def check_trajectory(given: Trajectory) -> Trajectory:
    """Return the trajectory; GravlensError for another type."""
    return of_kind(given, Trajectory, "A Trajectory is needed.", "follow(residuals, directions).")


def check_comparable(directions: Directions, sets: Sequence[Residuals]) -> None:
    """GravlensError where directions and states differ in geometry, token position or chat template."""
    located = {direction.made_from.get("geometry", "raw") for direction in directions}
    states = {one.meta.get("geometry", "raw") for one in sets}
    if len(located | states) > 1:
        given = f"Geometry of the directions: {', '.join(sorted(located))}; of the states: {', '.join(sorted(states))}."
        raise GravlensError(given, "Both must be in one geometry.", "geometry.apply(residuals) with the directions'.")
    own = {direction.prompts for direction in directions}
    read = [_read_as(direction.made_from) for direction in directions]
    for one in sets:
        # the same token ids are the same states, whichever template wrote them
        alike = {"positions"} if one.prompts in own else set(one.meta)
        read.append(_read_as({fact: value for fact, value in one.meta.items() if fact in alike}))
    for fact, remedy in READ_ALIKE.items():
        if len(apart := dict.fromkeys(one[fact] for one in read if fact in one)) > 1:
            given = f"Directions and states were read with different {fact.replace('_', ' ')}: {', '.join(apart)}."
            raise GravlensError(given, "A drift is followed along a direction of the same kind of state.", remedy)


def _read_as(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of `READ_ALIKE` that are known: nothing is, of a vector of your own."""
    known = {fact: facts[fact] for fact in READ_ALIKE if fact in facts}
    if known.get("positions") == "last":
        known["positions"] = -1
    if "chat_template" in known:
        known.setdefault("chat_template_kwargs", {})  # left out where there are none
    return {fact: json.dumps(value, sort_keys=True, default=str) for fact, value in known.items()}


def runs_of(residuals: Residuals) -> dict[str, tuple[int, ...]]:
    """Run -> steps; GravlensError where there is no run."""
    if not residuals.runs:
        given = f"These residuals hold no run ({', '.join(residuals.checkpoints)})."
        raise GravlensError(given, "A drift needs a run.", 'runs={"seed0": "ft/checkpoint-*"} in the sequence.')
    return residuals.runs


def check_same_steps(runs: Mapping[str, Sequence[int | None]]) -> None:
    """GravlensError where runs (run -> steps) have different steps, and so no mean over runs at each."""
    if len({tuple(steps) for steps in runs.values()}) > 1:
        given = (
            f"The runs have different steps ({'; '.join(f'{run}: {html.listed(own)}' for run, own in runs.items())})."
        )
        wanted = "A mean over runs is over the same runs at every step."
        raise GravlensError(given, wanted, "each run by itself (no --mean), or runs saved at the same steps.")


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
        runs.append(as_dataset(run, prompts, steps, measures, directions, judged_from(directions, residuals)))
    return _joined(runs, "run")


def judged_from(directions: Directions, noise: Residuals | Float[np.ndarray, " layer"]) -> Float[np.ndarray, " layer"]:
    """Length from which a mean drift's cosine is judged: 2 % of the distance and the dtype's noise, residual units."""
    if isinstance(noise, Residuals):
        noise = np.array([noise_floor(noise, layer) for layer in directions.layers])
    return np.maximum(JUDGED_FROM * directions.distances, noise)


def as_dataset(
    run: str,
    prompts: str,
    steps: Sequence[int],
    measures: Mapping[str, np.ndarray],
    directions: Directions,
    least: Float[np.ndarray, " layer"],
) -> xarray.Dataset:
    """One run's measures [step, layer] and `judged` (drift above `least`) as [run, prompts, step, layer]."""
    judged = measures["drift_norm"] > least  # NaN compares false: not judged
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


# --- concepts: a direction located again at each checkpoint ---------------------------------------------------------
CONCEPT_MEASURES = ("cosine", "auroc_frozen", "auroc_refit")
FEWEST_PAIRS = 4  # two to locate the direction on, two to separate


class Pairs(Protocol):
    """Two sets of prompts in pairs, such as `gravlens.activations.contrasts.Contrast`."""

    def __len__(self) -> int:
        """Number of pairs."""
        ...

    @property
    def both(self) -> PromptSet:
        """The first set's prompts, then the second's."""
        ...


def follow_concepts(
    sequence: ModelSequence | Path | str,
    concepts: Mapping[str, Pairs],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "last",
    placement: Placement = Placement(),
) -> ByLayer:
    """Locate the direction of each concept again at every checkpoint, and compare it with the anchor's, kept frozen.

    A concept is a contrast of two sets of prompts; its direction at a checkpoint is unit(mean(first) − mean(second)) of
    that checkpoint's states on the even pairs. The odd pairs are held out: the AUROC is the probability that a prompt
    of the first set lies further along the direction than one of the second.

    Args:
        sequence: the checkpoints: witness, anchor and all runs.
        concepts: name -> contrast; take one that has nothing to do with safety for comparison (formal, informal).
        layers: as in `cache_residuals`, like `positions` and `placement`.

    Returns:
        One row per concept × checkpoint × layer: `concept, run, step, layer`; `cosine` of the direction located again
        to the anchor's; `auroc_frozen` of the anchor's and `auroc_refit` of the one located again, both on this
        checkpoint's states. `run` is `witness` and `anchor` for these two, with step 0. NaN where a difference of
        means is within the dtype's noise.

    Raises:
        GravlensError: a concept of fewer than four pairs; what `cache_residuals` raises.

    Examples:
        >>> harmless = gl.PromptSet(tuple(example.prompt for example in examples[:6]))
        >>> table = gl.directions.follow_concepts(seq, {"refusal": gl.contrasts.Contrast(prompts, harmless)}).table
        >>> table.concept.unique().tolist()
        ['refusal']
    """
    if not concepts:
        raise GravlensError("No concept was given.", "A concept is a contrast.", 'concepts={"refusal": Contrast.of(…)}')
    for name, contrast in concepts.items():
        check_pairs(name, contrast)
    sets = {name: contrast.both for name, contrast in concepts.items()}
    read = cache_sets(sequence, sets, layers=layers, positions=positions, placement=placement)
    return ByLayer.concat(_follow_concept(name, states) for name, states in read.items())


def check_pairs(name: str, contrast: Pairs) -> None:
    """GravlensError for a concept of too few pairs."""
    if len(contrast) < FEWEST_PAIRS:
        given = f"The concept {name!r} has {len(contrast)} pairs of prompts."
        wanted = "Its direction is located on the even pairs and judged on the odd ones."
        raise GravlensError(given, wanted, f"{FEWEST_PAIRS} pairs at least, better 32.")


def concept_direction(
    states: Float[np.ndarray, "prompt layer d_model"], noise: Float[np.ndarray, " layer"]
) -> Float[np.ndarray, "layer d_model"]:
    """unit(mean(first half) − mean(second half)) over the even pairs in fp64; NaN where it is within the noise."""
    first, second = (half[::2].mean(0, dtype=np.float64) for half in np.split(states, 2))
    length = np.linalg.norm(first - second, axis=-1)
    return (first - second) / np.where(length > noise, length, np.nan)[:, None]


def measure_concept(
    states: Float[np.ndarray, "prompt layer d_model"],
    frozen: Float[np.ndarray, "layer d_model"],
    noise: Float[np.ndarray, " layer"],
) -> dict[str, Float[np.ndarray, " layer"]]:
    """The `CONCEPT_MEASURES` of one checkpoint's states (first set, then second) against a frozen direction."""
    refit = concept_direction(states, noise)

    def separation(direction: Float[np.ndarray, "layer d_model"]) -> Float[np.ndarray, " layer"]:
        along = einsum(states.astype(np.float64), direction, "prompt layer d, layer d -> prompt layer")
        first, second = (half[1::2] for half in np.split(along, 2))
        # AUROC: the share of pairs in this order, ties counted half (scipy.stats would take longer to import).
        return (np.sign(first[:, None] - second) + 1).mean(axis=(0, 1)) / 2

    values = (np.sum(refit * frozen, axis=-1), separation(frozen), separation(refit))
    return dict(zip(CONCEPT_MEASURES, values, strict=True))


def _follow_concept(name: str, residuals: Residuals) -> ByLayer:
    noise = np.array([noise_floor(residuals, layer) for layer in residuals.layers])
    frozen = concept_direction(residuals.of("anchor"), noise)
    measured = [measure_concept(residuals.of(one), frozen, noise) for one in residuals.checkpoints]
    values = {key: np.stack([one[key] for one in measured]) for key in CONCEPT_MEASURES}
    places = [run_and_step(one) or (one, 0) for one in residuals.checkpoints]
    return concept_table(name, places, residuals.layers, values)


def concept_table(
    name: str,
    places: Sequence[tuple[str, int]],
    layers: Sequence[int],
    values: Mapping[str, Float[np.ndarray, "checkpoint layer"]],
) -> ByLayer:
    """Tabulate a concept's measures at each (run, step); the mean is over the layers with a direction of the anchor."""
    known = ~np.isnan(values["auroc_frozen"]).all(0)
    runs, steps = [run for run, _ in places], [step for _, step in places]
    mean = {key: one[:, known].mean(-1) if known.any() else np.full(len(one), np.nan) for key, one in values.items()}
    mean_rows = pd.DataFrame({"concept": name, "run": runs, "step": steps, **mean})
    each = {"concept": name, "run": np.repeat(runs, len(layers)), "step": np.repeat(steps, len(layers))}
    rows = {"layer": np.tile(layers, len(places)), **{key: one.ravel() for key, one in values.items()}}
    return ByLayer(pd.DataFrame(each | rows), mean_rows)
