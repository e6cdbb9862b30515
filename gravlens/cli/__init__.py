"""The command line: parse, call, write."""

from typing import Annotated

import typer

from gravlens import __version__
from gravlens.cli import history, interventions, results, storage
from gravlens.cli.failures import Commands

app = typer.Typer(
    name="gravlens",
    cls=Commands,
    help="Find, follow, test and block the direction along which harmless fine-tuning undoes alignment.",
    epilog="Every option can be set by the environment variable that its help shows. All commands: docs/cli.md",
    context_settings={"auto_envvar_prefix": "GRAVLENS"},
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
for part in (results, history, interventions):
    app.add_typer(part.commands)
app.add_typer(storage.commands, name="store", rich_help_panel="Housekeeping")


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gravlens {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Show the version and exit.", is_eager=True, callback=_tell_version),
    ] = False,
) -> None:
    """Find, follow, test and block the direction along which harmless fine-tuning undoes alignment."""
