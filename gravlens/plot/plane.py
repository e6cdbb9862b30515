"""Plots of a `residual_plane` table: for print, and interactive."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gravlens.core.errors import GravlensError
from gravlens.directions.plane import COLUMNS
from gravlens.directions.plane import residual_plane as residual_plane
from gravlens.plot.lines import need
from gravlens.plot.style import CYCLE, DASHES, GREY, MARKERS, axes_of, styled, words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure
UNIT = "witness–anchor distances"
NAMED_RUNS = 6  # more runs share one colour
ENDS = {"witness": "*", "anchor": "s"}
FAINT: dict[str, Any] = {"alpha": 0.35, "ms": 4, "mew": 0, "zorder": 1}
# plotly's names of the same marks and dashes
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@styled()
def plot_residual_plane(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plot witness, anchor and each run's path on the plane of v_rev and the first component of the rest.

    `table` is that of `residual_plane`; both axes are in witness–anchor distances, at equal scale. Prompts are faint
    points; more than six runs share one look. GravlensError where there is nothing to draw.

    Examples:
        >>> axes = gl.plot.plot_residual_plane(gl.plot.residual_plane(held_out, vs[1]))
    """
    need(table, COLUMNS, "residual_plane(…).")
    ax = axes_of(ax)
    ax.axhline(0, color=GREY, lw=0.7, ls=":", zorder=0)
    clouds, means = table[table["prompt"].notna()], table[table["prompt"].isna()]
    for kind, marker in ENDS.items():
        rows = means[means["kind"] == kind]
        look: dict[str, Any] = {"color": "black", "ms": 7 if marker == "*" else 4, "zorder": 4}
        ax.plot(rows["along"], rows["across"], marker, **look, label=kind)
    runs = list(_runs(means))
    for number, (run, way) in enumerate(runs):
        ax.plot(way["along"], way["across"], **_look(number, len(runs)), label=_name(run, way, number, len(runs)))
    for name, row in means[means["kind"] == "other"].set_index("checkpoint").iterrows():
        ax.plot(row["along"], row["across"], "x", color=GREY, zorder=3)
        ax.annotate(words(name), (row["along"], row["across"]), (3, 3), textcoords="offset points", fontsize=6)
    colours = {"witness": "black"} | {run: _look(number, len(runs))["color"] for number, (run, _) in enumerate(runs)}
    for number, (name, rows) in enumerate(_clouds(clouds)):
        label = "_" if number else "one prompt's drift"
        ax.plot(rows["along"], rows["across"], ".", color=colours[name], **FAINT, label=label)
    ax.set_aspect("equal", adjustable="datalim")  # angles are read off: one distance is equally long on both axes
    ax.set(xlabel=rf"along $v_\mathrm{{rev}}$ ({UNIT})", ylabel=f"{_across(table)}\n({UNIT})")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.3, columnspacing=1.2)
    return ax


def explore_residual_plane(table: pd.DataFrame) -> PlotlyFigure:
    """The same as an interactive plotly figure: zoom, and hover for name, step and coordinates.

    `figure.write_html("plane.html")` writes one page that needs no network. GravlensError where plotly is not installed
    (`pip install 'gravlens[plots]'`), or there is nothing to draw.

    Examples:
        >>> figure = gl.plot.explore_residual_plane(gl.plot.residual_plane(held_out, vs[1]))
        >>> figure.write_html("plane.html")
    """
    go: Any = _plotly()
    need(table, COLUMNS, "residual_plane(…).")
    clouds, means = table[table["prompt"].notna()], table[table["prompt"].isna()]
    figure = go.Figure()
    for kind, symbol in {"witness": "star", "anchor": "square", "other": "x"}.items():
        rows, look = means[means["kind"] == kind], {"marker": {"color": "black", "symbol": symbol, "size": 12}}
        if len(rows):
            figure.add_trace(go.Scatter(**_points(rows, kind), mode="markers", **look))
    colours = {"witness": "black"}
    for number, (run, way) in enumerate(_runs(means)):
        colour, symbol, dash = (looks[number % len(looks)] for looks in (CYCLE, SYMBOLS, PLOTLY_DASHES))
        look = {"marker": {"color": colour, "symbol": symbol, "size": 7}, "line": {"color": colour, "dash": dash}}
        figure.add_trace(go.Scatter(**_points(way, words(run)), mode="lines+markers", **look))
        colours[run] = colour
    for name, rows in _clouds(clouds):
        look = {"marker": {"color": colours[name], "size": 5, "opacity": 0.35}}
        figure.add_trace(go.Scatter(**_points(rows, f"{words(name)}: prompts"), mode="markers", **look))
    # scaleanchor is plotly's equal aspect
    figure.add_hline(0, line={"color": GREY, "dash": "dot", "width": 1}, layer="below")
    figure.update_layout(
        template="simple_white",
        title={"text": f"layer {table['layer'].iloc[0]}"},
        margin={"t": 60},
        xaxis={"title": {"text": f"along v<sub>rev</sub> ({UNIT})"}},
        yaxis={"title": {"text": f"{_across(table)}<br>({UNIT})"}, "scaleanchor": "x"},
    )
    return figure


def _plotly() -> Any:
    try:
        from plotly import graph_objects
    except ImportError as error:
        remedy = "pip install 'gravlens[plots]', or plot_residual_plane, which needs matplotlib alone."
        raise GravlensError("plotly is not installed.", "It draws the interactive view.", remedy) from error
    return graph_objects


def _runs(means: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Each run's path, beginning at the anchor."""
    anchor = means[means["kind"] == "anchor"]
    ways = means[means["kind"] == "run"].sort_values("step").groupby("run", sort=False)
    # sorted: colours must not depend on the order of rows
    return sorted((str(run), pd.concat([anchor, way])) for run, way in ways)


def _clouds(prompts: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The prompts of the witness and of each run."""
    return [(str(name), rows) for name, rows in prompts.groupby(prompts["run"].fillna("witness"), sort=False)]


def _look(number: int, count: int) -> dict[str, Any]:
    if count > NAMED_RUNS:
        return {"color": CYCLE[0], "marker": ".", "ms": 3, "lw": 0.7, "alpha": 0.6}
    dashes = ("-", *DASHES, "-")  # the first run is solid, and six need six
    return {"color": CYCLE[number], "marker": MARKERS[number], "ls": dashes[number], "ms": 3, "zorder": 3}


def _name(run: str, way: pd.DataFrame, number: int, count: int) -> str:
    if count > NAMED_RUNS:
        return "_" if number else f"runs: {count}"
    return f"{words(run)}, to step {way['step'].max()}"


def _across(table: pd.DataFrame) -> str:
    share = table.attrs.get("across_share", np.nan)  # attrs are lost in a round trip through CSV
    return "rest, first component" + ("" if np.isnan(share) else f": {share:.0%} of its variance")


def _points(rows: pd.DataFrame, name: str) -> dict[str, Any]:
    return {
        "x": rows["along"],
        "y": rows["across"],
        "text": [_said(row) for _, row in rows.iterrows()],
        "name": escape(name),
        "hovertemplate": "<b>%{text}</b><br>along v_rev %{x:.3f}<br>across %{y:.3f}<extra></extra>",
    }


def _said(row: pd.Series) -> str:
    """A point in words, escaped: plotly reads some HTML."""
    at = row["checkpoint"] if pd.isna(row["step"]) else f"{row['run']}, step {row['step']}"
    return escape(words(at) + ("" if pd.isna(row["prompt"]) else f", prompt {row['prompt']}"))
