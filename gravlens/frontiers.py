"""The frontier of blockers: harm against what the task pays for it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gravlens.arms import UNBLOCKED
from gravlens.errors import GravlensError
from gravlens.plots import BLUE, CYCLE, GREY, LABELS, SHARES, STYLE, PictureAxes

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
    missing = [name for name in ("blocker", cost, measure) if name not in table.columns]
    if missing or table.empty:
        raise GravlensError(
            f"The table lacks {', '.join(missing) or 'rows'}.", f"It has {list(table.columns)}.", "compare_arms(…)."
        )
    if ax is None:
        ax = Figure(figsize=(6.4, 5.6), dpi=200, layout="constrained").add_subplot(axes_class=PictureAxes)
    spread = table.groupby("blocker", sort=False)[[cost, measure]].agg(["mean", "sem"]).dropna(subset=[(cost, "mean")])
    for number, (blocker, row) in enumerate(spread.iterrows(), 1):
        colour = "black" if blocker == UNBLOCKED else GREY if blocker in twins else CYCLE[number % len(CYCLE)]
        at = (row[cost, "mean"], row[measure, "mean"])
        errors = np.nan_to_num([row[cost, "sem"], row[measure, "sem"]])
        label = f"{number}  {str(blocker).replace('_', ' ')}"
        ax.errorbar(*at, xerr=errors[0], yerr=errors[1], fmt="o", ms=3, lw=0.6, color=colour, capsize=1, label=label)
        place = OFFSETS[number % len(OFFSETS)]  # blockers of like effect lie on each other
        ax.annotate(str(number), at, place, textcoords="offset points", fontsize=6, color=colour)
        if blocker == UNBLOCKED:
            ax.axhline(at[1], color=BLUE, lw=0.7, ls="--", zorder=0)
            ax.axvline(at[0], color=BLUE, lw=0.7, ls="--", zorder=0)
    if measure in SHARES:
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
    ax.set(xlabel=LABELS.get(cost, cost), ylabel=LABELS.get(measure, measure))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=6.5, handletextpad=0.3)
    return ax
