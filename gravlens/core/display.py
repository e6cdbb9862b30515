"""What a notebook shows of a result: plain HTML tables, all of them text that was escaped, none with a colour.

Colours are left to the notebook's own theme, so that a table is read in the light and in the dark.
"""

from collections.abc import Iterable, Sequence
from html import escape
from numbers import Integral, Real
from typing import Any

import pandas as pd

MOST_ROWS, MOST_LISTED, MOST_LETTERS = 20, 10, 300
TEXT, NUMBER = ' style="text-align: left"', ' style="text-align: right"'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str, notes: Iterable[str] = (), rest: str = ""
) -> str:
    """A table under its title; of many rows the first are shown, and the others counted.

    Args:
        columns: names; none for rows of a name and its value.
        rows: a cell a column, of any kind.
        title: what it is.
        notes: sentences under the title.
        rest: where the rows are that are left out (`.table`).
    """
    cut = len(rows) - MOST_ROWS
    told = [*notes, *([f"{cut:,} of {len(rows):,} rows are left out" + (f": see {rest}" if rest else "")] * (cut > 0))]
    sides = [_side(value) for value in rows[0]] if rows else [TEXT] * len(columns)
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(columns, sides, strict=False))
    body = "".join(f"<tr>{''.join(_cells(row, named=not columns))}</tr>" for row in rows[:MOST_ROWS])
    lines = "".join(f"<br>{escape(line)}" for line in told)
    caption = f'<caption style="caption-side: top; text-align: left"><b>{escape(title)}</b>{lines}</caption>'
    return f"<table>{caption}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def facts(pairs: Sequence[tuple[str, Any]], *, title: str, notes: Iterable[str] = ()) -> str:
    """Names and their values, one under the other."""
    return table((), pairs, title=title, notes=notes)


def of_frame(frame: pd.DataFrame, *, title: str, notes: Iterable[str] = (), rest: str = ".table") -> str:
    """A data frame without its index; columns of several levels are joined."""
    names = [" ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name) for name in frame.columns]
    rows = list(frame.itertuples(index=False, name=None))
    return table(names, rows, title=title, notes=notes, rest=rest)


def listed(values: Iterable[Any]) -> str:
    """Values in a row; of many the first and the last, and how many there are."""
    words = [cell(value) for value in values]
    if len(words) <= MOST_LISTED:
        return ", ".join(words)
    return f"{', '.join(words[: MOST_LISTED - 2])}, …, {words[-1]} ({len(words):,} in all)"


def cell(value: Any) -> str:
    """A value as a cell shows it, not yet escaped."""
    if value is None or value is pd.NA:
        return ""
    if not isinstance(value, Real) or isinstance(value, Integral):
        text = str(value)
        return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} … ({len(text):,} letters in all)"
    if value != value:
        return ""
    number = float(value)
    return f"{number:.3f}" if 0.01 <= abs(number) < 1000 or number == 0 else f"{number:.3g}"


def _cells(row: Sequence[Any], *, named: bool) -> Iterable[str]:
    for place, value in enumerate(row):
        tag = "th" if named and place == 0 else "td"
        yield f"<{tag}{TEXT if named else _side(value)}>{escape(cell(value))}</{tag}>"


def _side(value: Any) -> str:
    return NUMBER if isinstance(value, Real) and not isinstance(value, bool) else TEXT
