"""Lay out the parts of the report that can be explored: heat maps of layer × step, and the residual plane."""

from typing import Any

import numpy as np
import pandas as pd

MEASURES = ("alignment", "fraction", "judged")
COLUMNS = ("arm", "run", "step", "layer", "prompts", *MEASURES)  # that a heat map is made of
P99 = ("isotropic", "weight_noise", "covariance_of_states")  # nulls that are drawn for every layer
MOST_NUMBERS = 60_000  # in the page, about half a megabyte: beyond it the arms' means alone
WIDTH, PAD = 640.0, 0.08  # of a drawing of the plane: units, and its margin as a share of the span


def layer_grid(rows: pd.DataFrame, nulls: pd.DataFrame | None = None) -> dict[str, Any]:
    """Return alignment and fraction by layer and step, on held-out prompts, of every arm's mean and of every run.

    Args:
        rows: `trajectory.csv`; a column `organism` goes into the runs' names where there are several.
        nulls: `nulls.csv`.

    Returns:
        `layers` (from the last), `steps` (of the unblocked runs), `series` (dicts of `arm`, `name`, and a list
        [layer × step] for each of `MEASURES`; `judged` is the share of runs whose drift is long enough), `p99` (null ->
        such a list, for the unblocked mean), `limit` (of each scale), `cut` (whether single runs were left out).
    """
    rows = rows[rows.prompts == "held_out"]
    if "organism" in rows and rows.organism.nunique() > 1:
        rows = rows.assign(run=rows.organism + "/" + rows.run)
    layers = sorted(map(int, rows.layer.unique()), reverse=True)
    # an arm may be read at further steps, as one that is released: columns that all others would leave empty
    usual = rows[rows.arm == "unblocked"]
    steps = sorted(map(int, (rows if usual.empty else usual).step.unique()))
    places = pd.MultiIndex.from_product([layers, steps])
    wide = rows.astype({"judged": float}).groupby(["arm", "run", "layer", "step"], sort=False)[list(MEASURES)].mean()
    by_run = {one: wide[one].unstack(["layer", "step"]).reindex(columns=places) for one in MEASURES}
    cut = wide.size > MOST_NUMBERS
    series = []
    for arm, table in by_run["alignment"].groupby(level="arm", sort=False):
        runs = [([index], index[1]) for index in table.index]
        mean = [([*table.index], f"{str(arm).replace('_', ' ')}: mean of {len(table)} runs")] * (len(table) > 1)
        for index, name in [*mean, *([] if cut and mean else runs)]:
            values = {one: _listed(by_run[one].loc[index].mean()) for one in MEASURES}
            series.append({"arm": str(arm), "name": str(name), **values})
    series.sort(key=lambda one: one["arm"] != "unblocked")  # stable: the others stay in their order
    reach = max((abs(value) for value in series[0]["fraction"] if value is not None), default=1.0)
    limit = {"alignment": 1.0, "fraction": max(round(reach, 2), 0.01)}
    found = {} if nulls is None else {name: one for name, one in nulls.groupby("null") if name in P99}
    p99 = {name: _listed(one.groupby(["layer", "step"]).p99.mean().reindex(places)) for name, one in found.items()}
    return {"layers": layers, "steps": steps, "series": series, "p99": p99, "limit": limit, "cut": cut}


def _listed(values: pd.Series) -> list[float | None]:
    """Round to what is shown; JSON has no NaN."""
    return [round(value, 3) if np.isfinite(value) else None for value in values.astype(float).tolist()]


def planes(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a drawing of the residual plane for each organism of `plane.csv`, in the units of an SVG.

    Each has `name`, `layer`, `share` (of the rest's variance that is shown; None if unknown), `height`, `origin` and
    `zero` (x and y of the anchor), `points`, `arms` and `paths` (each the `d` of a run's way from the anchor).
    """
    names = rows.organism if "organism" in rows else pd.Series("", rows.index)
    return [_plane(str(name), table) for name, table in rows.groupby(names, sort=False)]


def _plane(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    # Equal scales: an angle on the page is the angle in the plane.
    low, high = rows[["along", "across"]].min(), rows[["along", "across"]].max()
    pad = PAD * max((high - low).max(), 1e-9)
    unit = WIDTH / (high.along - low.along + 2 * pad)
    zero = (max(high.across, 0.15) + pad) * unit
    height = zero - (min(low.across, -0.15) - pad) * unit
    drawn = rows.assign(x=((rows.along - low.along + pad) * unit).round(1), y=(zero - rows.across * unit).round(1))
    drawn["hot"] = drawn.arm == "unblocked"
    facts = ["x", "y", "kind", "arm", "run", "step", "checkpoint", "along", "across", "hot"]
    points = drawn[facts].astype(object).to_dict("records")
    start = next((f"M{one['x']} {one['y']}" for one in points if one["kind"] == "anchor"), "M")
    ways = drawn[drawn.kind == "run"].sort_values("step").groupby(["arm", "run"], sort=False)
    d = {way: start + "".join(f"L{x} {y}" for x, y in one[["x", "y"]].to_numpy()) for way, one in ways}
    share = float(rows.across_share.iloc[0]) if "across_share" in rows else np.nan
    return {
        **{"name": name, "layer": int(rows.layer.iloc[0]), "share": None if np.isnan(share) else share},
        **{"height": round(height, 1), "zero": round(zero, 1), "origin": round((pad - low.along) * unit, 1)},
        **{"points": points, "arms": list(dict.fromkeys(arm for arm, _ in d))},
        "paths": [{"arm": arm, "hot": arm == "unblocked", "d": way} for (arm, _), way in d.items()],
    }
