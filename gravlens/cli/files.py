"""Files that a command or a script leaves: a table, and its figure beside it."""

from pathlib import Path
from typing import TYPE_CHECKING

from gravlens.cli import rooms

if TYPE_CHECKING:
    import pandas as pd


def write_table(table: "pd.DataFrame", path: Path) -> Path:
    """Write a table as CSV, in one step."""
    return rooms.store.write_atomically(path, table.to_csv(index=False).encode())


def write_effect(table: "pd.DataFrame", path: Path) -> list[Path]:
    """Write a table of effects as `path`.csv, its figure as `path`.pdf and `path`.png; the paths."""
    written = write_table(table, path.with_suffix(".csv"))
    return [written, *rooms.style.save_figure(rooms.plots.plot_effect(table), path)]
