"""gravlens store: looking after a folder of states."""

from pathlib import Path
from typing import Annotated

import typer

from gravlens import activations, core
from gravlens.cli.failures import CHECK_FAILED
from gravlens.cli.options import JSON, example, flag
from gravlens.cli.screen import print_json, print_table, records, tell

commands = typer.Typer(
    help="Look after a folder of states, as gravlens trajectory --store keeps it.",
    no_args_is_help=True,
)
FOLDER = Annotated[Path, typer.Argument(metavar="FOLDER", help="The store's folder.")]


@commands.command(name="list", epilog=example("gravlens store list states"))
def list_command(folder: FOLDER, json: JSON = False) -> None:
    """List what a store holds: checkpoints, how many prompts and layers of each, and when they were last asked for."""
    found = activations.store.list_store(folder)
    rows = records(found)
    if json:
        print_json(rows)
        return
    shown = [{**row, "mib": f"{row['mib']:.1f}", "used": str(row["used"]).split(".")[0]} for row in rows]
    print_table([*found.columns], ([_whole(value) for value in row.values()] for row in shown), title=str(folder))


def _whole(value: object) -> str:
    """Counts as whole numbers, which a column with gaps turns into fractions."""
    return core.display.cell(int(value) if isinstance(value, float) else value)


@commands.command(epilog=example("gravlens store verify states"))
def verify(folder: FOLDER, json: JSON = False) -> None:
    """Hold every file against its checksum; name the damaged ones (exit code 1). Nothing is taken away."""
    found = activations.store.damaged_files(folder)
    if json:
        print_json({"damaged": [str(path) for path in found]})
    else:
        for path in found:
            tell(f"damaged: {path}")
        tell(f"{len(found)} damaged" if found else "every file is whole")
    raise typer.Exit(CHECK_FAILED if found else 0)


@commands.command(epilog=example("gravlens store prune states --unused-days 30 --dry-run"))
def prune(
    folder: FOLDER,
    unused_days: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="States too that were not asked for in so many days.")
    ] = None,
    dry_run: Annotated[bool, flag("--dry-run", "Name the files, and keep them.")] = False,
    json: JSON = False,
) -> None:
    """Take away damaged files, scratch of killed runs, and whole answers, which are made again where they lack."""
    store = activations.store.check_store(folder)
    found = activations.store.prune_store(store, unused_days=unused_days, dry=dry_run)
    if json:
        print_json({"files": [str(path) for path in found], "taken_away": not dry_run})
        return
    for path in found:
        tell(str(path))
    tell(f"{len(found)} files {'would be ' if dry_run else ''}taken away")
