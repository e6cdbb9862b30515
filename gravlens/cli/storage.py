"""gravlens store list, verify, prune: maintain an on-disk cache of activations."""

from pathlib import Path
from typing import Annotated

import typer

from gravlens import activations, core
from gravlens.cli import options as opt
from gravlens.cli.output import CHECK_FAILED, print_json, print_line, print_prose, print_table, records, shortened

commands = typer.Typer(
    help="List, verify and prune an on-disk cache of activations (as written by gravlens trajectory --store).",
    no_args_is_help=True,
)
FOLDER = Annotated[
    Path, typer.Argument(metavar="FOLDER", parser=opt.at_home, help="The folder given as --store or store=.")
]


@commands.command(name="list", **opt.described(None, "gravlens store list states"))
def list_command(folder: FOLDER, json: opt.JSON = False) -> None:
    """List the cached checkpoints: number of prompts and layers, size, last use."""
    found = activations.store.list_store(folder)
    rows = records(found)
    if json:
        print_json(rows)
        return
    shown = [
        {**row, "states": shortened(row["states"]), "mib": f"{row['mib']:.1f}", "used": row["used"][:19]}
        for row in rows
    ]
    whole = sum(row["mib"] for row in rows)
    print_prose(
        f"{whole:.1f} MiB, {len({row['checkpoint'] for row in rows if row['prompts']})} checkpoints in {folder}"
    )
    cells = ([_integer(value) for value in row.values()] for row in shown)
    print_table([*found.columns], cells, least=("files", "states", "layers", "prompts", "used"))


def _integer(value: object) -> str:
    # pandas makes floats of a column of counts with missing values
    return core.display.cell(int(value) if isinstance(value, float) else value)


@commands.command(**opt.described(None, "gravlens store verify states"))
def verify(folder: FOLDER, json: opt.JSON = False) -> None:
    """Verify checksums and list corrupt and unreadable files (exit code 1). Deletes nothing."""
    found = activations.store.verify_store(folder)
    corrupt = [str(path) for path, fault in found.items() if fault == "corrupt"]
    if json:
        print_json({"corrupt": corrupt, "unreadable": [str(path) for path in found if str(path) not in corrupt]})
    else:
        lines = [f"{path}: {fault}" for path, fault in found.items()]
        print_line("\n".join([f"{len(found)} corrupt or unreadable" if found else "no corrupt files", *lines]))
    raise typer.Exit(CHECK_FAILED if found else 0)


@commands.command(**opt.described(None, "gravlens store prune states --unused-days 30 --dry-run"))
def prune(
    folder: FOLDER,
    unused_days: Annotated[
        float | None, opt.number("Also delete activations not used for this many days.", metavar="DAYS")
    ] = None,
    dry_run: Annotated[bool, opt.flag("--dry-run", "List the files without deleting them.")] = False,
    json: opt.JSON = False,
) -> None:
    """Delete corrupt files, temporary files of killed processes, and assembled results (rebuilt when needed)."""
    store = activations.store.check_store(folder)
    found = activations.store.prune_store(store, unused_days=unused_days, dry=dry_run)
    if json:
        print_json({"files": [str(path) for path in found], "deleted": not dry_run})
        return
    print_line("\n".join([f"{len(found)} files {'would be ' if dry_run else ''}deleted", *map(str, found)]))
