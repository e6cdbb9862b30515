"""Arms at equal task loss: what a blocker gains over simply stopping early or training less."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from gravlens.core.errors import GravlensError


def at_equal_task_loss(
    table: pd.DataFrame,
    *,
    measure: str = "harmfulness",
    reference: str | Sequence[str] = "unblocked",
    by: Sequence[str] = ("run",),
) -> pd.DataFrame:
    """Compare each arm with the reference arm at the arm's own task loss.

    The reference's points (its steps, which are early stops, or the same run at lower rates) are joined by straight
    lines in the order of their task loss, points of equal loss at their mean; nothing is read beyond their ends
    (docs/comparison.md).

    Args:
        table: one row a checkpoint, with columns `arm`, `task_loss`, the measure, and those of `by`.
        measure: the column that is compared.
        reference: the arm, or several whose points make one frontier, such as `("unblocked", "lower_rate")`.
        by: columns that pair an arm's run with the reference's, such as `("organism", "run")`.

    Returns:
        The rows of the other arms, in their order: `arm`, those of `by`, `task_loss`, the measure, `at_reference` (the
        reference's measure at that task loss), `difference` (the arm's less the reference's), and `reason`, why both
        are NaN, or "".

    Raises:
        GravlensError: a column is missing, or no row is the reference's.
    """
    references = [reference] if isinstance(reference, str) else list(reference)
    columns = ["arm", *by, "task_loss", measure]
    _check(table, columns, references)
    ours = table["arm"].isin(references)
    frontiers = dict(list(table[ours].groupby(list(by))))
    found = table.loc[~ours, columns].reset_index(drop=True)
    read = [
        _read(frontiers.get(tuple(row[name] for name in by)), row["task_loss"], measure) for _, row in found.iterrows()
    ]
    found["at_reference"] = [value for value, _ in read]
    found["difference"] = found[measure] - found["at_reference"]
    found["reason"] = [reason for _, reason in read]
    return found


def _read(frontier: pd.DataFrame | None, loss: float, measure: str) -> tuple[float, str]:
    """The frontier's measure at a task loss, or NaN and why."""
    if frontier is None:
        return np.nan, "the reference has no such run"
    points = frontier[["task_loss", measure]].dropna().groupby("task_loss")[measure].mean()  # ascending in task loss
    if len(points) < 2:
        return np.nan, f"the reference has {len(points)} point of task loss, and a line needs two"
    low, high = points.index[0], points.index[-1]
    if not low <= loss <= high:
        return np.nan, f"task loss {loss:.4g} lies outside the reference's, {low:.4g} to {high:.4g}"
    return float(np.interp(loss, points.index, points)), ""


def _check(table: pd.DataFrame, columns: Sequence[str], references: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in table]:
        raise GravlensError(
            f"The table has no column {missing[0]!r}.",
            f"It needs {', '.join(columns)}.",
            "measure= and by= with names of this table's columns.",
        )
    if absent := [name for name in references if not (table["arm"] == name).any()]:
        raise GravlensError(
            f"No row is of the reference {absent[0]!r}.",
            f"The arms here are {', '.join(map(str, table['arm'].unique()))}.",
            "reference= with one of these.",
        )
