"""Files that a command or a script leaves: a table, and its figure beside it."""

from pathlib import Path
from typing import TYPE_CHECKING

from gravlens.cli import rooms

if TYPE_CHECKING:
    import pandas as pd


def write_effect(table: "pd.DataFrame", path: Path) -> list[Path]:
    """Write a table of effects as `path`.csv, its figure as `path`.pdf and `path`.png; the paths."""
    written = rooms.store.write_table(path.with_suffix(".csv"), table)
    return [written, *rooms.style.save_figure(rooms.plots.plot_effect(table), path)]
