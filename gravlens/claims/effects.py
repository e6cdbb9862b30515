"""The sizes that stand beside a verdict: alignment, fraction and harm, each with an interval over its unit."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from gravlens.claims.evidence import Case

CONFIDENCE = 0.95


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; the interval is NaN for fewer than two values.

    Examples:
        >>> mean, low, high = gl.claims.interval([0.5, 0.6, 0.7])
        >>> round(mean, 3), low < mean < high
        (0.6, True)
    """
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    if len(found) < 2:
        return (float(found[0]) if len(found) else np.nan), np.nan, np.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * stats.sem(found))
    return float(found.mean()), float(found.mean()) - half, float(found.mean()) + half


def effects(case: Case) -> pd.DataFrame:
    """Tabulate the effects: `effect, mean, low, high, n, unit`; the interval is over anchors, or one anchor's runs.

    `alignment` and `fraction` of the unblocked runs; `harm` (their compliance rate), `harm of the anchor`, `harm,
    blocked` (the clamp along v_rev), `harm, random` (the mean over clamps along matched random directions). What was
    not run has no row.
    """
    rows: dict[str, list[np.ndarray]] = {
        "alignment": [evidence.final.alignment.to_numpy() for evidence in case.anchors],
        "fraction": [evidence.final.fraction.to_numpy() for evidence in case.anchors],
    }
    anchors = [evidence.anchor["compliance_rate"] for evidence in case.anchors if evidence.anchor]
    rows["harm of the anchor"] = [np.array([harm]) for harm in anchors]
    for name, role in {"harm": "unblocked", "harm, blocked": "clamp"}.items():
        found = [evidence.arm(role) for evidence in case.anchors]
        rows[name] = [one.compliance_rate.to_numpy(dtype=float) for one in found if one is not None]
    # one value a direction: the direction is what was drawn at random
    directions = [[arm.compliance_rate.mean() for _, arm in evidence.each("random")] for evidence in case.anchors]
    rows["harm, random"] = [np.array(found, dtype=float) for found in directions if found]
    table = []
    for name, values in rows.items():
        if values:
            units = case.units(values)
            unit = "direction" if name == "harm, random" and len(values) == 1 else case.unit
            mean, low, high = interval(units)
            table.append({"effect": name, "mean": mean, "low": low, "high": high, "n": len(units), "unit": unit})
    return pd.DataFrame(table)
