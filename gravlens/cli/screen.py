"""Files that a command or a script leaves: a table, and its figure beside it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gravlens import core, plot

if TYPE_CHECKING:
    import pandas as pd


def write_effect(table: "pd.DataFrame", path: Path) -> list[Path]:
    """Write a table of effects as `path`.csv, its figure as `path`.pdf and `path`.png; the paths."""
    written = core.files.write_table(path.with_suffix(".csv"), table)
    return [written, *plot.style.save_figure(plot.lines.plot_effect(table), path)]


WIDE = 160
console = Console(emoji=False)  # a path is no place for pictures
messages = Console(emoji=False, stderr=True)


def print_json(content: Any) -> None:
    """JSON alone on stdout, NaN as null."""
    typer.echo(json.dumps(core.files.without_nan(content), allow_nan=False))


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a pandas table, NaN as None."""
    return json.loads(table.to_json(orient="records", date_format="iso", double_precision=15))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    caption: str | None = None,
    wide: bool = False,
) -> None:
    """A table; a `wide` one may wrap its lines in a narrow terminal, which would else cut names short."""
    table = Table(*columns, title=title and escape(title), caption=caption and escape(caption))
    for row in rows:
        table.add_row(*(escape(core.display.cell(value)) for value in row))
    (Console(emoji=False, width=max(console.width, WIDE)) if wide else console).print(table)


def tell(text: str) -> None:
    """A line of the result."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line beside the result."""
    messages.print(text, markup=False, highlight=False, soft_wrap=True)


def wrote(path: Any, json: bool) -> None:
    """Say that a file was written, beside the JSON or below the table."""
    (say if json else tell)(f"written to {path}")


def fail(text: str) -> None:
    """The one line of a command that failed."""
    messages.print(f"[bold red]gravlens:[/] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)
