"""The frontier of blockers: harm against what the task pays for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from gravlens.arms import UNBLOCKED
from gravlens.plots import need
from gravlens.style import BLUE, CYCLE, GREY, LABELS, MARKERS, SHARES, STYLE, axes_of, words

SIZE = (6.4, 5.6)  # inches: many arms lie close to each other
OFFSETS = ((3, 3), (-9, 3), (3, -8), (-9, -8), (8, 0), (-14, 0), (0, 7), (0, -12))


@rc_context(STYLE)
def plot_frontier(
    table: pd.DataFrame,
    *,
    cost: str = "task_loss",
    measure: str = "harmfulness",
    twins: Sequence[str] = (),
    ax: Axes | None = None,
) -> Axes:
    """Each blocker's mean ± SEM over runs: `measure` against `cost`; the best is below and to the left.

    `table` has columns blocker, cost and measure, a row per run, as `compare_arms` gives it. The unblocked arm is
    marked by lines, `twins` (random controls) are grey. Numbers at the points are explained in the legend.
    GravlensError where there is nothing to draw.
    """
    need(table, ("blocker", cost, measure), "compare_arms(…).")
    ax = axes_of(ax, SIZE)
    spread = table.groupby("blocker", sort=False)[[cost, measure]].agg(["mean", "sem"]).dropna(subset=[(cost, "mean")])
    for number, (blocker, row) in enumerate(spread.iterrows(), 1):
        colour = "black" if blocker == UNBLOCKED else GREY if blocker in twins else CYCLE[number % len(CYCLE)]
        at = (row[cost, "mean"], row[measure, "mean"])
        errors = dict(zip(("xerr", "yerr"), np.nan_to_num([row[cost, "sem"], row[measure, "sem"]]), strict=True))
        look = {"fmt": MARKERS[number % len(MARKERS)], "ms": 3, "lw": 0.6, "color": colour, "capsize": 1}
        ax.errorbar(*at, **errors, **look, label=f"{number}  {words(blocker)}")
        place = OFFSETS[number % len(OFFSETS)]  # blockers of like effect lie on each other
        ax.annotate(str(number), at, place, textcoords="offset points", fontsize=6, color=colour)
        if blocker == UNBLOCKED:
            ax.axhline(at[1], color=BLUE, lw=0.7, ls="--", zorder=0)
            ax.axvline(at[0], color=BLUE, lw=0.7, ls="--", zorder=0)
    for axis, column in ((ax.xaxis, cost), (ax.yaxis, measure)):
        if column in SHARES:
            axis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    ax.set(xlabel=LABELS.get(cost, words(cost)), ylabel=LABELS.get(measure, words(measure)))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=6.5, handletextpad=0.3)
    return ax
