"""Plots of results: matplotlib Axes out; only means over runs are computed here.

Every function draws into `ax`, or into a new figure, and leaves rcParams alone. A notebook shows the figure once, and
so does `plt.show()` where pyplot was imported before; `save_figure(ax, "name")` saves it for print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, groupby
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gravlens.core.errors import GravlensError, as_list, of_kind
from gravlens.plot.style import BLUE, CYCLE, DASHES, GREY, LABELS, MARKERS, SHARES, axes_of, change_of, styled, words

WHITE_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # no line crosses the text
NOT_RUN: dict[str, Any] = {"va": "center", "color": GREY, "style": "italic", "bbox": WHITE_BOX}
THIN: dict[str, Any] = {"color": BLUE, "alpha": 0.4, "lw": 0.7, "marker": ".", "ms": 2}
HOLLOW: dict[str, Any] = {"marker": "o", "ls": "", "mfc": "white", "zorder": 4}
WITHOUT_ZERO = ("task_loss", "seconds_per_step")
OVER_TICKS = -0.14  # in widths of the axes: where a legend on the left begins
UNJUDGED = "drift too small to judge"


class HasTable(Protocol):
    """A result with a tidy `table`, such as an Effect."""

    @property
    def table(self) -> pd.DataFrame:
        """Columns such as `run, step, layer, prompts, alignment`; each figure names those it needs."""
        ...


class HasLayerMean(HasTable, Protocol):
    """A result with a mean over layers, such as a Trajectory or the result of `compare`."""

    @property
    def layer_mean(self) -> pd.DataFrame:
        """The columns of `table` without `layer`."""
        ...


@styled()
def plot_alignment(
    table: pd.DataFrame | HasLayerMean,
    *,
    value: str = "alignment",
    nulls: pd.DataFrame | HasLayerMean | Sequence[HasLayerMean] | None = None,
    prompts: str = "held_out",
    mean: bool = True,
    kinds: Mapping[str, Sequence[str]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the layer mean against step: each run thin, mean ± SEM over runs bold, a null's p99 dashed.

    `mean=False` leaves the mean out and names each run. `kinds` (kind -> its runs, such as harmless and blocked ones)
    gives each kind a mean, colour and dashes of its own; runs that it does not name are the kind "other".

    `table` is a Trajectory or its `.layer_mean`, `value` one of the measures ("fraction", "projection", …), `prompts`
    one of its sets. `nulls`: one or several results of `compare`, or a table of null, step, p99; where runs differ the
    highest is drawn. Points with a drift that is not judged are hollow. GravlensError where there is nothing to draw.

    Examples:
        >>> null = gl.nulls.isotropic(vs, steps=[1, 5, 20], draws=200, rng=rng)
        >>> axes = gl.plot_alignment(tr, nulls=gl.compare(tr, null))
        >>> axes.get_xlabel()
        'fine-tuning step'
    """
    rows = _chosen(_layer_mean(table), prompts, value)
    if nulls is not None and value != "alignment":
        raise GravlensError(f"nulls came with value={value!r}.", "Their p99 is one of alignment.", "nulls=None.")
    ax = axes_of(ax)
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)  # steps grow by factors, and step 0 has no logarithm
    ax.axhline(0, color="black", lw=0.7, zorder=0)
    for number, (kind, part) in enumerate(_by_kind(rows, kinds, mean)):
        look = {"color": CYCLE[number % len(CYCLE)], "ls": ("-", *DASHES)[number % (1 + len(DASHES))]}
        _draw_runs(ax, part, value, named=not mean, color=look["color"])
        if mean:
            _draw_mean(ax, part, value, name=kind, look=look | {"marker": MARKERS[number % len(MARKERS)]})
    if several := [] if nulls is None else nulls if isinstance(nulls, Sequence) else [nulls]:
        limits = need(pd.concat([_layer_mean(one) for one in several]), ("null", "step", "p99"))
        _draw_nulls(ax, limits, (GREY,) if kinds else CYCLE[1:])
    _mark_steps(ax, rows["step"].unique())
    ax.set(xlabel="fine-tuning step", ylabel=LABELS.get(value, words(value)))
    return legend(ax)


@styled()
def plot_layers(
    table: pd.DataFrame | HasTable,
    *,
    step: int | Sequence[int] | None = None,
    prompts: str = "held_out",
    value: str = "alignment",
    ax: Axes | None = None,
) -> Axes:
    """Plot `value` by layer, mean ± SEM over runs, one line per step (all, or those in `step`), late ones light.

    Undefined layers are named under the axis; `table` and `prompts` as in `plot_alignment`. GravlensError for an
    unmeasured step.

    Examples:
        >>> axes = gl.plot.plot_layers(tr, step=[1, 20])
        >>> axes.get_xlabel()
        'layer'
    """
    rows = _chosen(need(table, ("layer",)), prompts, value)
    defined = rows.groupby("layer")[value].transform(lambda column: column.notna().any()).astype(bool)
    undefined, rows = {*rows.loc[~defined, "layer"], *getattr(table, "undefined", ())}, rows[defined]
    steps = _steps(rows, step)
    ax = axes_of(ax)
    ax.axhline(0, color="black", lw=0.7, zorder=0)
    colours = colormaps["viridis"](np.linspace(0, 0.88, len(steps)))  # not to 1: its yellow end vanishes on white
    for at, colour, marker in zip(steps, colours, cycle(MARKERS), strict=False):  # cycle never ends
        look = {"color": colour, "marker": marker}
        _draw_layers(ax, rows[rows["step"] == at], value, label=f"step {at}", look=look)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # one layer alone would get fractional ticks
    ax.set(xlabel="layer" + _left_out(undefined), ylabel=LABELS.get(value, words(value)))
    return legend(ax, columns=3)


@styled()
def plot_effect(table: pd.DataFrame | HasTable, *, ax: Axes | None = None) -> Axes:
    """Plot each intervention's effect on the score: difference with 95 % interval, on the range of random directions.

    `table`, or an Effect: condition, layer (<NA>: several at once), difference, low, high, random_low, random_high;
    attrs["score"] names the axis. Several layers are drawn side by side, one has a row per condition.

    Examples:
        >>> effect = gl.causal_effect(model, gl.Ablate(vs[1]), score=gl.refusal_log_odds, prompts=prompts, n_random=2)
        >>> axes = gl.plot.plot_effect(effect)
    """
    table = need(table, ("condition", "layer", "difference", "low", "high", "random_low", "random_high"))
    ax = axes_of(ax)
    draw = _effect_by_layer if table["layer"].nunique(dropna=False) > 1 else _effect_by_condition
    draw(ax, table, change_of(table.attrs.get("score", "the score")))
    ax.plot([], [], color=GREY, alpha=0.35, lw=6, label="random directions")
    return legend(ax, side="right" if draw is _effect_by_condition else "left")


@styled()
def plot_arms(
    table: pd.DataFrame,
    *,
    measure: str = "compliance_rate",
    reference: Mapping[str, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot one `measure` per arm: every run as a small point, mean ± SEM above it, arms in the table's order.

    `table` has columns arm, run and the measure, one row per run; an arm without a value reads "not run". `reference`
    maps a label (witness, anchor) to the value of a dashed line. GravlensError without rows.

    Examples:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"arm": ["unblocked", "penalty"], "run": ["a", "a"], "compliance_rate": [0.9, 0.1]})
        >>> axes = gl.plot.plot_arms(table, reference={"anchor": 0.05})
    """
    need(table, ("arm", measure))
    ax = axes_of(ax)
    if measure not in WITHOUT_ZERO:
        ax.axvline(0, color="black", lw=0.7, zorder=0)
    for place, (_, rows) in enumerate(table.groupby("arm", sort=False)):  # sort=False: the table's order
        _draw_arm(ax, place, rows[measure].dropna())
    for (label, at), dash, colour in zip((reference or {}).items(), DASHES, CYCLE[1:], strict=False):
        ax.axvline(at, ls=dash, color=colour, lw=1, zorder=0.5, label=label)
    name_rows(ax, table["arm"].unique())
    if measure in SHARES:
        ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    ax.set(xlabel=LABELS.get(measure, words(measure)), ylabel="arm")
    return legend(ax, side="right")


def need(
    table: pd.DataFrame | HasTable, columns: Iterable[str], remedy: str = "a table of measured results."
) -> pd.DataFrame:
    """The table of a result; GravlensError if it has no rows or not these columns."""
    found: Any = table if isinstance(table, pd.DataFrame) else getattr(table, "table", table)
    sources = "follow(residuals, directions), compare(trajectory, null), causal_effect(model, …), or their .table."
    found = of_kind(found, pd.DataFrame, "A table or a result is needed.", sources)
    missing = ", ".join(name for name in columns if name not in found.columns)
    if missing:
        raise GravlensError(f"The table has no column {missing}.", f"It has {list(found.columns)}.", "one of those.")
    if found.empty:
        raise GravlensError("The table has no rows.", "At least one is drawn.", remedy)
    return found


def _layer_mean(table: pd.DataFrame | HasLayerMean) -> pd.DataFrame:
    """The mean over layers of a result; a table by layer would be averaged over the wrong layers."""
    table = need(table if isinstance(table, pd.DataFrame) else getattr(table, "layer_mean", table), ())
    if "layer" in table:
        remedy = "the result's .layer_mean, or plot_layers."
        raise GravlensError("The table has a row per layer.", "The layer mean is drawn.", remedy)
    return table


def _chosen(table: pd.DataFrame | HasTable, prompts: str, value: str) -> pd.DataFrame:
    """The rows that were measured on `prompts`."""
    table = need(table, ("run", "step", "prompts", value))
    rows = table[table["prompts"] == prompts]
    if rows.empty:
        known = sorted(table["prompts"].unique())
        raise GravlensError(f"prompts={prompts!r} has no row.", f"Known: {known}.", f"prompts={known[0]!r}.")
    return rows


def _steps(rows: pd.DataFrame, step: int | Sequence[int] | None) -> list[int]:
    known = sorted({int(at) for at in rows["step"]})  # NumPy integers would print as np.int64(5)
    wanted = known if step is None else as_list(step)
    if not wanted or not {*wanted} <= {*known}:
        raise GravlensError(f"step={step!r} was asked for.", f"Steps with a value: {known}.", "one of those.")
    return wanted


def _over_runs(rows: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Mean and SEM over runs; a single run gets no bar."""
    return rows.groupby(by)[value].agg(["mean", "sem", "count"]).dropna(subset="mean")


def _unjudged(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Rows to mark as noise: the cosine of almost no drift; other measures need no mark."""
    return rows[~rows["judged"].astype(bool)] if value == "alignment" and "judged" in rows else rows[:0]


def _by_kind(
    rows: pd.DataFrame, kinds: Mapping[str, Sequence[str]] | None, mean: bool
) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each kind of runs; without kinds all are of one, whose name is not told."""
    if kinds is None:
        return [("mean ± SEM", rows)]
    kinds = of_kind(kinds, Mapping, "Kinds are a dict from each to its runs.", 'kinds={"harmless": ["seed0"]}.')
    kinds = {kind: as_list(runs) for kind, runs in kinds.items()}
    known, named = [*rows["run"].unique()], [run for runs in kinds.values() for run in runs]
    if not mean or {*named} - {*known} or len({*named}) < len(named):
        given = f"kinds={dict(kinds)!r} and mean={mean} were given."
        raise GravlensError(given, f"Each run is of one kind, which has a mean; runs: {known}.", "one of these names.")
    every = {**kinds, "other": [*kinds.get("other", ()), *(run for run in known if run not in named)]}
    return [(kind, rows[rows["run"].isin(runs)]) for kind, runs in every.items() if runs]


def _draw_runs(ax: Axes, rows: pd.DataFrame, value: str, *, named: bool, color: str) -> None:
    there = ax.get_legend_handles_labels()[1]  # of another kind of runs
    for number, (name, run) in enumerate(rows.sort_values("step").groupby("run")):
        own: dict[str, Any] = {"color": CYCLE[number % len(CYCLE)], "marker": MARKERS[number % len(MARKERS)], "ms": 3}
        label = words(name) if named else "_" if number or there else "one run"
        look: dict[str, Any] = own if named else {**THIN, "color": color}
        ax.plot(run["step"], run[value], **look, label=label)
    small = _unjudged(rows, value)
    if len(small):
        label = "_" if UNJUDGED in there else UNJUDGED
        ax.plot(small["step"], small[value], **HOLLOW, color=color, ms=3, mew=0.7, label=label)


def _draw_mean(ax: Axes, rows: pd.DataFrame, value: str, *, name: str, look: dict[str, Any]) -> None:
    mean = _over_runs(rows, "step", value)
    fewest, most = min(mean["count"], default=0), max(mean["count"], default=0)  # a run may lack a step
    label = f"{words(name)}, runs: {fewest}" + (f"–{most}" if most > fewest else "")
    ax.errorbar(mean.index, mean["mean"], mean["sem"], **look, lw=2, capsize=2, zorder=3, label=label)


def _draw_nulls(ax: Axes, nulls: pd.DataFrame, colours: Sequence[str]) -> None:
    for number, (name, null) in enumerate(nulls.groupby("null", sort=False)):
        p99 = null.groupby("step")["p99"].max()  # where each run has its own draws: the strictest
        look = {"color": colours[number % len(colours)], "ls": DASHES[number % len(DASHES)]}
        marker = "_" * (len(p99) == 1)  # one step makes no line
        ax.plot(p99.index, p99, marker=marker, ms=12, mew=1.5, label=f"{words(name)}, p99", **look)


def _mark_steps(ax: Axes, steps: np.ndarray) -> None:
    """Ticks at the measured steps, thinned from the last one down so that labels do not overlap."""
    steps = np.sort(steps)
    shown = _apart([int(step) for step in steps], ax.xaxis.get_transform().transform(steps.astype(float)))
    ax.set_xticks(shown, [str(step) for step in shown])
    ax.set_xticks([], minor=True)  # symlog marks steps that nobody measured


def _apart(labels: Sequence[int], places: Sequence[float] | np.ndarray) -> list[int]:
    """Those of ascending labels that can stand side by side, a dozen at most: the last, and from there down."""
    gap, kept = 0.085 * (places[-1] - places[0]), [len(places) - 1]
    for index in range(len(places) - 2, -1, -1):
        if places[kept[-1]] - places[index] > gap:
            kept.append(index)
    return [labels[index] for index in reversed(kept)]


def _draw_layers(ax: Axes, rows: pd.DataFrame, value: str, *, label: str, look: dict[str, Any]) -> None:
    mean = _over_runs(rows, "layer", value)
    ax.errorbar(mean.index, mean["mean"], mean["sem"], capsize=2, label=label, **look)
    small = mean.loc[mean.index.isin(_unjudged(rows, value)["layer"]), "mean"]
    if len(small):
        known = UNJUDGED in ax.get_legend_handles_labels()[1]
        ax.plot(small.index, small, **{**HOLLOW, **look}, label="_" if known else UNJUDGED)


def _left_out(layers: set[int]) -> str:
    """A line under the axis: 0, 1, 2, 7 reads 0–2, 7 (within a range, layer − place is constant)."""
    stretches = groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0])
    spans = [[layer for _, layer in stretch] for _, stretch in stretches]
    names = ", ".join(f"{span[0]}–{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
    return f"\nundefined, left out: {shorten(names, 40, placeholder=' …')}" if names else ""


def _effect_by_layer(ax: Axes, table: pd.DataFrame, score: str) -> None:
    """Layers along x, conditions side by side; <NA> comes after the last layer."""
    groups = list(table.groupby("condition", sort=False))
    layers = sorted(table["layer"].dropna().astype(int).unique())
    beyond = layers[-1] + max(1, (layers[-1] - layers[0]) / 10)  # nearer, its label and the last layer's overlap
    ax.axhline(0, color="black", lw=0.7, zorder=0)
    for number, (name, rows) in enumerate(groups):
        at = rows["layer"].astype("Float64").fillna(beyond).to_numpy(float) + 0.6 * (number + 0.5) / len(groups) - 0.3
        colour, marker = CYCLE[number % len(CYCLE)], MARKERS[number % len(MARKERS)]
        ax.vlines(at, rows["random_low"], rows["random_high"], color=GREY, alpha=0.35, lw=5)
        ax.vlines(at, rows["low"], rows["high"], color=colour)
        ax.plot(at, rows["difference"], marker, color=colour, label=words(name))
    ticks = {layer: str(layer) for layer in _apart(layers, layers)}
    ticks |= {beyond: "all"} if table["layer"].isna().any() else {}
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.set(xlabel="layer", ylabel=score)


def _effect_by_condition(ax: Axes, table: pd.DataFrame, score: str) -> None:
    places = np.arange(len(table))
    ax.axvline(0, color="black", lw=0.7, zorder=0)
    ax.hlines(places, table["random_low"], table["random_high"], color=GREY, alpha=0.35, lw=8)
    ax.hlines(places, table["low"], table["high"], color=BLUE)
    ax.plot(table["difference"], places, "o", color=BLUE, label="difference, 95 % interval")
    name_rows(ax, table["condition"])
    ax.set(xlabel=score, ylabel="intervention")


def _draw_arm(ax: Axes, place: int, values: pd.Series) -> None:
    """Draw the mean a little above the row's runs, so that neither hides the other."""
    if values.empty:
        ax.text(0.02, place, "not run", transform=ax.get_yaxis_transform(), **NOT_RUN)
        return
    # a label that begins with "_" stays out of the legend
    runs, mean = ("_", "_") if "one run" in ax.get_legend_handles_labels()[1] else ("one run", "mean ± SEM")
    ax.plot(values, np.full(len(values), place + 0.18), "o", color=BLUE, alpha=0.4, ms=3, mew=0, label=runs)
    center, sem = values.agg(["mean", "sem"])
    ax.errorbar(center, place - 0.12, xerr=sem, color=BLUE, fmt="o", ms=5, capsize=2.5, label=mean)


def name_rows(ax: Axes, names: Iterable[Any]) -> None:
    """Rows are read from the top."""
    labels = [words(name) for name in names]
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def legend(ax: Axes, *, columns: int = 2, side: str = "left") -> Axes:
    """Above the axes, where no line can pass behind it, means first; it has the room over the ticks or row names."""
    handles, labels = ax.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: not isinstance(handles[index], Container))
    handles, labels = [handles[index] for index in order], [labels[index] for index in order]
    place = {"loc": f"lower {side}", "bbox_to_anchor": (1.0 if side == "right" else OVER_TICKS, 1.0)}
    ax.legend(handles, labels, ncols=columns, borderaxespad=0.3, columnspacing=1.2, **place)
    return ax


SIZE = (6.4, 5.6)  # inches: many arms lie close to each other
OFFSETS = ((3, 3), (-9, 3), (3, -8), (-9, -8), (8, 0), (-14, 0), (0, 7), (0, -12))


@styled()
def plot_frontier(
    table: pd.DataFrame,
    *,
    cost: str = "task_loss",
    measure: str = "compliance_rate",
    twins: Sequence[str] = (),
    baseline: str = "unblocked",
    ax: Axes | None = None,
) -> Axes:
    """Plot each blocker's mean ± SEM over runs, `measure` against `cost`; the best is at the lower left.

    `table` has columns blocker, cost and measure, one row per run, as from `compare_arms`. Lines mark the `baseline`
    arm; `twins` (random controls) are grey. The legend explains the numbers. GravlensError where there is nothing to
    draw.

    Examples:
        >>> import pandas as pd
        >>> rows = [("unblocked", 1.0, 0.9), ("penalty", 1.1, 0.1)]
        >>> table = pd.DataFrame(rows, columns=["blocker", "task_loss", "compliance_rate"])
        >>> axes = gl.plot.plot_frontier(table)
    """
    need(table, ("blocker", cost, measure), "compare_arms(…).")
    ax = axes_of(ax, SIZE)
    spread = table.groupby("blocker", sort=False)[[cost, measure]].agg(["mean", "sem"]).dropna(subset=[(cost, "mean")])
    for number, (blocker, row) in enumerate(spread.iterrows(), 1):
        colour = "black" if blocker == baseline else GREY if blocker in twins else CYCLE[number % len(CYCLE)]
        at = (row[cost, "mean"], row[measure, "mean"])
        # one run has no SEM
        errors = dict(zip(("xerr", "yerr"), np.nan_to_num([row[cost, "sem"], row[measure, "sem"]]), strict=True))
        look = {"fmt": MARKERS[number % len(MARKERS)], "ms": 3, "lw": 0.6, "color": colour, "capsize": 1}
        ax.errorbar(*at, **errors, **look, label=f"{number}  {words(blocker)}")
        place = OFFSETS[number % len(OFFSETS)]  # blockers of like effect lie on each other
        ax.annotate(str(number), at, place, textcoords="offset points", fontsize=6, color=colour)
        if blocker == baseline:
            ax.axhline(at[1], color=BLUE, lw=0.7, ls="--", zorder=0)
            ax.axvline(at[0], color=BLUE, lw=0.7, ls="--", zorder=0)
    for axis, column in ((ax.xaxis, cost), (ax.yaxis, measure)):
        if column in SHARES:
            axis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    ax.set(xlabel=LABELS.get(cost, words(cost)), ylabel=LABELS.get(measure, words(measure)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=6.5, handletextpad=0.3)
    return ax
