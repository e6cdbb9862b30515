"""Format values for people: numbers, sizes, durations, and the HTML tables that notebooks show."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from numbers import Integral, Real
from typing import Any

import pandas as pd

MAX_ROWS, MAX_LISTED, MAX_LETTERS, MAX_GIST = 20, 10, 300, 150
# No colours: a notebook's theme may be light or dark.
TEXT, NUMBER = ' style="text-align: left"', ' style="text-align: right"'


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str, notes: Iterable[str] = (), rest: str = ""
) -> str:
    """Return an HTML table with a caption; of a long table the first rows are shown and the rest is counted.

    Args:
        columns: names; none for rows of a name and its value.
        notes: sentences below the title.
        rest: where to find the rows that are left out (`.table`).
    """
    cut = len(rows) - MAX_ROWS
    below = [*notes, *([f"{cut:,} of {len(rows):,} rows are left out" + (f": see {rest}" if rest else "")] * (cut > 0))]
    sides = [_side(value) for value in rows[0]] if rows else [TEXT] * len(columns)
    # Everything is escaped: names and prompts are the user's, and a notebook would run a script in them.
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(columns, sides, strict=False))
    body = "".join(f"<tr>{''.join(_cells(row, named=not columns))}</tr>" for row in rows[:MAX_ROWS])
    lines = "".join(f"<br>{escape(line)}" for line in below)
    caption = f'<caption style="caption-side: top; text-align: left"><b>{escape(title)}</b>{lines}</caption>'
    return f"<table>{caption}{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"


def facts(pairs: Sequence[tuple[str, Any]], *, title: str, notes: Iterable[str] = ()) -> str:
    """Return an HTML table of names and values."""
    return table((), pairs, title=title, notes=notes)


def of_frame(frame: pd.DataFrame, *, title: str, notes: Iterable[str] = (), rest: str = ".table") -> str:
    """Return a data frame as an HTML table, without its index; column levels are joined."""
    names = [" ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name) for name in frame.columns]
    rows = list(frame.itertuples(index=False, name=None))
    return table(names, rows, title=title, notes=notes, rest=rest)


def listed(values: Iterable[Any]) -> str:
    """Join values by commas; of many, show the first and the last, and count them."""
    words = [cell(value) for value in values]
    if len(words) <= MAX_LISTED:
        return ", ".join(words)
    return f"{', '.join(words[: MAX_LISTED - 2])}, …, {words[-1]} ({len(words):,} in all)"


def cell(value: Any) -> str:
    """Format a value for a cell of a table, not yet escaped; missing values are empty."""
    if value is None or value is pd.NA:
        return ""
    if not isinstance(value, Real) or isinstance(value, Integral):
        text = str(value)
        return text if len(text) <= MAX_LETTERS else f"{text[:MAX_LETTERS]} … ({len(text):,} letters in all)"
    return "" if value != value else number(float(value))


def brief(self: Any) -> str:
    """Describe a dataclass in one line: a `__repr__` that leaves out empty fields and cuts long ones."""
    values = {one.name: getattr(self, one.name) for one in fields(self) if one.repr}
    told = [f"{name}={gist(value)}" for name, value in values.items() if not _is_empty(value)]
    return f"{type(self).__name__}({', '.join(told)})"


def gist(value: Any, limit: int = MAX_GIST) -> str:
    """Describe a value in about `limit` letters: arrays and tables by shape, of many items the first and how many."""
    kind, shape = type(value).__name__, getattr(value, "sizes", getattr(value, "shape", None))
    if shape is not None and not isinstance(value, Real):
        sizes = [f"{name} {size}" for name, size in shape.items()] if isinstance(shape, Mapping) else map(str, shape)
        return f"{kind}[{' × '.join(sizes)}]"
    if isinstance(value, Mapping):
        names = f"{listed(list(value))}"
        return "{" + (names if len(names) <= limit else f"{gist(next(iter(value)), limit // 2)}, …") + "}"
    if isinstance(value, list | tuple):
        return _gist_of_items(value, limit)
    text = " ".join(repr(value).split())
    if len(text) <= limit:
        return text
    # of others, such as a model with its 3,000 lines, the beginning says no more than the class
    return f"{text[:limit]}…" if isinstance(value, str) or is_dataclass(value) else f"<{kind}>"


def number(value: float) -> str:
    """Format a number with the digits that are worth reading."""
    size = abs(value)
    if size == 0 or 0.01 <= size < 1000:  # cosines, fractions and rates are compared in the third decimal
        return f"{value:.3f}"
    return f"{value:.0f}" if 1000 <= size < 1e6 else f"{value:.3g}"


def amount(size: float) -> str:
    """Format a number of bytes."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)  # powers of 1000, as disks are sold
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Format a number of seconds."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds >= 2 * u), (1, "s"))
    return f"{seconds / unit:.3g} {name}"


def _gist_of_items(values: Sequence[Any], limit: int) -> str:
    told = ", ".join(gist(one, limit // 2) for one in values[:MAX_LISTED])
    if len(values) <= MAX_LISTED and len(told) <= limit:
        return f"({told})"
    return f"({gist(values[0], limit // 2)}, …, {gist(values[-1], limit // 4)}; {len(values):,} in all)"


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | Mapping | list | tuple) and not value)


def _cells(row: Sequence[Any], *, named: bool) -> Iterable[str]:
    for place, value in enumerate(row):
        tag = "th" if named and place == 0 else "td"
        yield f"<{tag}{TEXT if named else _side(value)}>{escape(cell(value))}</{tag}>"


def _side(value: Any) -> str:
    return NUMBER if isinstance(value, Real) and not isinstance(value, bool) else TEXT  # bool is a Real in Python
