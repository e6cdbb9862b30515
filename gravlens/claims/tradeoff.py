"""Compare arms at equal task loss: what a blocker gains over stopping early or training less."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gravlens.core.errors import GravlensError


def at_equal_task_loss(
    table: pd.DataFrame,
    *,
    measure: str = "compliance_rate",
    reference: str | Sequence[str] = "unblocked",
    by: Sequence[str] = ("run",),
) -> pd.DataFrame:
    """Compare each arm with the reference arm at the arm's own task loss.

    The reference's points (its steps, i.e. early stops, or the run at lower rates) are joined by straight lines in
    order of task loss, points of equal loss averaged; there is no extrapolation (docs/comparison.md).

    Args:
        table: one row per checkpoint, with columns `arm`, `task_loss`, the measure, and those of `by`.
        measure: the column that is compared.
        reference: the arm, or several that form one frontier, such as `("unblocked", "lower_rate")`.
        by: columns that pair an arm's run with the reference's, such as `("organism", "run")`.

    Returns:
        The other arms' rows, with `at_reference` (the reference's measure at that task loss), `difference` (arm −
        reference), and `reason`, why both are NaN, or "".

    Examples:
        >>> import pandas as pd
        >>> rows = [("unblocked", "a", 1.0, 0.2), ("unblocked", "a", 0.5, 0.6), ("penalty", "a", 0.75, 0.1)]
        >>> table = pd.DataFrame(rows, columns=["arm", "run", "task_loss", "compliance_rate"])
        >>> found = gl.claims.at_equal_task_loss(table)
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    columns = ["arm", *by, "task_loss", measure]
    _check(table, columns, references)
    ours = table["arm"].isin(references)
    frontiers = dict(list(table[ours].groupby(list(by))))  # a list: its keys are tuples for one column, too
    found = table.loc[~ours, columns].reset_index(drop=True)
    pairs = ((frontiers.get(tuple(row[name] for name in by)), row["task_loss"]) for _, row in found.iterrows())
    read = [_read(*pair, measure) for pair in pairs]
    found["at_reference"] = [value for value, _ in read]
    found["difference"] = found[measure] - found["at_reference"]
    return found.assign(reason=[reason for _, reason in read])


def _read(frontier: pd.DataFrame | None, loss: float, measure: str) -> tuple[float, str]:
    """The frontier's measure at a task loss, or NaN and why."""
    if frontier is None:
        return np.nan, "the reference has no such run"
    points = frontier[["task_loss", measure]].dropna().groupby("task_loss")[measure].mean()  # ascending in task loss
    if len(points) < 2:
        return np.nan, f"the reference has {len(points)} point of task loss, and a line needs two"
    low, high = points.index[0], points.index[-1]
    if not low <= loss <= high:  # np.interp would go on with the end's value
        return np.nan, f"task loss {loss:.4g} lies outside the reference's, {low:.4g} to {high:.4g}"
    return float(np.interp(loss, points.index, points)), ""


def _check(table: pd.DataFrame, columns: Sequence[str], references: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in table]:
        given = f"The table has no column {missing[0]!r}."
        raise GravlensError(given, f"It needs {', '.join(columns)}.", "measure= and by= with its columns.")
    if absent := [name for name in references if not (table["arm"] == name).any()]:
        given = f"The reference {absent[0]!r} has no row."
        raise GravlensError(given, f"Arms: {', '.join(map(str, table['arm'].unique()))}.", "one of these.")
