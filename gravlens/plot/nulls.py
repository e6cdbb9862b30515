"""Observed alignments beside the draws of their null distributions, one row per null."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from xarray import DataArray

from gravlens.core.errors import GravlensError, as_list
from gravlens.directions.trajectory import Trajectory
from gravlens.plot.lines import legend, name_rows
from gravlens.plot.style import BLUE, GREY, LABELS, axes_of, styled, words
from gravlens.stats.nulls import NullDraws, compare

BINS, HEIGHT, BELOW = 50, 0.7, 0.16  # of a histogram; in rows: its height, and how far below it runs are marked
DOT = {"color": BLUE, "marker": "o", "ls": "", "ms": 4, "zorder": 4}


@styled()
def plot_nulls(
    trajectory: Trajectory,
    nulls: NullDraws | Sequence[NullDraws],
    *,
    step: int | None = None,
    run: str | None = None,
    layer: int | None = None,
    prompts: str = "held_out",
    ax: Axes | None = None,
) -> Axes:
    """Plot each null's draws as a histogram with its p99, and the alignments that `compare` holds against it.

    A run is a dot, hollow where it is not above the p99 (or p > .01); at the right its p-value, of several the range.
    `step`: default the last that null and trajectory share. `layer`: default the mean over layers, averaged draw by
    draw. `run`: default all that the null serves (`mean`: of a null of the mean over runs). GravlensError where a null
    has no such place.
    """
    found = [_compared(trajectory, null, prompts, (step, run, layer)) for null in as_list(nulls)]
    if not found:
        raise GravlensError("No null was given.", "Each has a row.", "plot_nulls(trajectory, [nulls.isotropic(…)]).")
    ax, steps = axes_of(ax), {int(rows.step.iloc[0]) for rows, _ in found}
    ax.axvline(0, color="black", lw=0.7, zorder=0)
    for place, (rows, draws) in enumerate(found):
        _draw_row(ax, place, rows, draws)
    ax.plot([], [], color=GREY, alpha=0.35, lw=6, label="draws of the null")
    # a null may serve fewer steps than another: then each row says its own
    at = ["" if len(steps) == 1 else f", step {rows.step.iloc[0]}" for rows, _ in found]
    name_rows(ax, [words(rows.null.iloc[0]) + when for (rows, _), when in zip(found, at, strict=True)])
    ax.set_ylim(len(found) - 0.6, -HEIGHT - 0.1)  # the first histogram is as high as the others
    where = "mean over layers" if layer is None else f"layer {layer}"
    ax.set(xlabel=f"{LABELS['alignment']}\n{', '.join([where, *(f'step {one}' for one in steps)])}", ylabel="null")
    return legend(ax)


def _compared(
    trajectory: Trajectory, null: NullDraws, prompts: str, place: tuple[int | None, str | None, int | None]
) -> tuple[pd.DataFrame, DataArray]:
    """The compared rows of one place, and the draws that they were compared with."""
    step, run, layer = place
    both = compare(trajectory, null, prompts=prompts)
    rows = both.layer_mean if layer is None else both.table[both.table.layer.isin(as_list(layer))]
    rows = rows if run is None else rows[rows.run.isin(["mean"] * (null.of == "mean") + as_list(run))]
    rows = rows[rows.step.isin(as_list(rows.step.max() if step is None else step))]
    if rows.empty or len(as_list(step)) > 1 or len(as_list(layer)) > 1:  # one of each is drawn
        given = f"The null {null.name} has nothing to compare at step={step}, run={run!r}, layer={layer}."
        known = f"Steps {sorted(set(both.table.step))}, runs {sorted(set(both.table.run))}, layers {list(null.layers)}."
        raise GravlensError(given, known, "one of those.")
    draws = null.data.sel(step=int(rows.step.iloc[0]))
    if layer is not None:
        return rows, draws.sel(layer=layer)
    return rows, draws.sel(layer=list(trajectory.layers_in_mean)).mean("layer", skipna=False)


def _draw_row(ax: Axes, place: int, rows: pd.DataFrame, draws: DataArray) -> None:
    drawn = draws.to_numpy()
    count, edges = np.histogram(drawn[np.isfinite(drawn)], BINS)
    ax.stairs(place - HEIGHT * count / max(count.max(), 1), edges, baseline=place, fill=True, color=GREY, alpha=0.35)
    p99, there = rows.p99.iloc[0], ax.get_legend_handles_labels()[1]
    ax.plot([p99, p99], [place, place - HEIGHT], ls="--", color="black", label="_" if place else "its p99")
    for above, label, face in ((True, "run above it", BLUE), (False, "run not above it", "white")):
        dots, label = rows[rows.above == above], "_" if label in there else label
        if len(dots):
            ax.plot(dots.alignment, np.full(len(dots), place + BELOW), **DOT, mfc=face, label=label)
    low, high = (f"{value:.2g}".removeprefix("0") for value in (rows.p_value.min(), rows.p_value.max()))
    told = f"p = {low}" if low == high else f"p = {low} to {high}"
    ax.text(1.02, place - HEIGHT / 2, told, transform=ax.get_yaxis_transform(), va="center", fontsize=7)
