"""Heatmaps: one value over two of a table's columns, such as the fraction over layer × position."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pandas.api.types import is_numeric_dtype

from gravlens.plot.lines import need
from gravlens.plot.style import LABELS, axes_of, styled, words

NAMES = LABELS | {
    "share": "share of the drift",
    "share_along_vrev": r"share of the drift along $v_\mathrm{rev}$",
    "way": "share of the way to the source's score",
    "refit_angle": r"refitted direction's angle with $v_\mathrm{rev}$ (degrees)",
}
WRITTEN = 80  # cells; more cannot be read as numbers
DARK = 0.6  # of the scale, from which on white letters are read
FAINT = 0.05  # of the scale, up to which a cell is as good as white


@styled()
def plot_heatmap(
    table: pd.DataFrame,
    *,
    value: str = "fraction",
    rows: str = "layer",
    columns: str = "position",
    limit: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Mean of `value` at each place of `rows` × `columns`, red above 0 and blue below; grey: not measured.

    Numeric rows ascend from the bottom, names keep the table's order; rows without a place (<NA>) are dropped. Colours
    end at `limit` (default: the largest number). Few cells carry their number; of many, those below 0 carry a dash,
    which grey print keeps. GravlensError where there is nothing to draw.

    Examples:
        >>> axes = gl.plot.plot_heatmap(tr.table, columns="step")
    """
    table = need(table, (value, rows, columns))
    table = need(table.dropna(subset=[rows, columns]), ())
    upward = is_numeric_dtype(table[rows])
    grid = table.groupby([rows, columns], sort=False)[value].mean().unstack().sort_index(axis=1)
    grid = grid.sort_index() if upward else grid.loc[table[rows].unique()]
    cells, ax = grid.to_numpy(dtype=float), axes_of(ax)
    reach = limit or float(np.nanmax(np.abs(cells), initial=0)) or 1.0
    ax.set_facecolor("0.9")
    # symmetric about 0: white is no effect
    look = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach, "origin": "lower" if upward else "upper"}
    image = ax.imshow(cells, aspect="auto", **look)
    (_write_numbers if cells.size <= WRITTEN else _dash_negative)(ax, cells, reach)
    every = 1 + len(grid) // 30  # more labels than about 30 overlap
    ax.set_yticks(range(0, len(grid), every), [_signed(name) for name in grid.index[::every]])
    ax.set_xticks(range(len(grid.columns)), [_signed(name) for name in grid.columns])
    ax.set(xlabel=words(columns), ylabel=words(rows))
    ax.figure.colorbar(image, ax=ax, label=NAMES.get(value, words(value)))
    return ax


def _write_numbers(ax: Axes, cells: np.ndarray, reach: float) -> None:
    for row, column in np.argwhere(np.isfinite(cells)):
        number = float(cells[row, column])
        colour = "white" if abs(number) > DARK * reach else "black"
        text = _signed(f"{round(number, 2) + 0.0:.2f}")  # + 0.0: no −0.00
        ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)


def _dash_negative(ax: Axes, cells: np.ndarray, reach: float) -> None:
    row, column = np.nonzero(cells < -FAINT * reach)
    ax.plot(column, row, ls="", marker="_", color="black", ms=3, mew=0.7)


def _signed(name: Any) -> str:
    """A number with a true minus sign, a name in words."""
    return words(name).replace("-", "−") if str(name).lstrip("-")[:1].isdigit() else words(name)
