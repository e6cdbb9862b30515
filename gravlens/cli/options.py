"""Options shared by the commands and the scripts of analyses/: one name, one meaning."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import gravlens as gl
from gravlens.core.errors import GravlensError, at_home

SEPARATOR = "|"  # between texts in an environment variable: "I'm sorry, but" contains blanks and commas


def writable_file(path: Path | None) -> Path | None:
    """Fail before any computation if the --out file cannot be written."""
    if path is not None:
        if path.is_dir():
            remedy = f"--out {path / 'out'}."
            raise GravlensError(f"--out {path} is a folder.", "The name of a file is expected.", remedy)
        _check_writable(path, path.parent)
    return path


def writable_folder(path: Path | None) -> Path | None:
    """Fail before any computation if the --out folder cannot be created or written to."""
    if path is not None:
        _check_writable(path, path)
    return path


def _check_writable(path: Path, folder: Path) -> None:
    # The folder may not exist yet: what counts is its nearest existing parent. A dangling link counts as existing,
    # since mkdir would fail there.
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists() or one.is_symlink())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "is not writable" if existing.is_dir() else "is not a folder"
        raise GravlensError(f"--out {path}: {existing} {why}.", "A writable folder is expected.", "another --out.")


def texts(context: typer.Context, parameter: typer.CallbackParam, value: list[str]) -> list[str]:
    """Split the value of an environment variable at |; leave texts from the command line as they are."""
    if not from_environment(context, parameter):
        return value
    return [text.strip() for text in os.environ[variable(context, parameter)].split(SEPARATOR)]


def from_environment(context: Any, parameter: Any) -> bool:
    """Whether the value of an option comes from its environment variable."""
    # Compared by name: typer may ship its own copy of click, with its own ParameterSource.
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == "ENVIRONMENT"


def variable(context: Any, parameter: Any) -> str:
    """Return the name of an option's environment variable."""
    return f"{context.auto_envvar_prefix}_{parameter.name.upper()}"


def flag(name: str, help: str) -> Any:
    """An option without a value."""
    return typer.Option(name, metavar="", help=help)


def number(help: str, *, least: int = 0, metavar: str = "N") -> Any:
    """An option that takes a number of at least `least`."""
    return typer.Option(min=least, metavar=metavar, help=help)


def place(metavar: str, help: str, *, check: Callable[[Path | None], Path | None] | None = None) -> Any:
    """An option that takes the path of a file or folder."""
    # a shell leaves the ~ of --out=~/results as it is
    return typer.Option(metavar=metavar, help=help, callback=check, parser=at_home)


def repeated_text(help: str) -> Any:
    """An option that takes a text and may be repeated."""
    return typer.Option(callback=texts, metavar="TEXT", help=help)


def repeated_layer(help: str) -> Any:
    """The option --layer, which may be repeated."""
    return typer.Option("--layer", metavar="N", help=help)


def described(panel: str | None, line: str) -> dict[str, Any]:
    """The heading of a command in --help, and an example as the last line of its own --help."""
    return {"rich_help_panel": panel, "epilog": f"Example: {line}"}


# input
SEQUENCE = Annotated[
    Path,
    typer.Argument(
        metavar="SEQUENCE.toml",
        parser=at_home,
        help="File of the history: witness (base model), anchor (aligned model), runs and prompts (docs/sequence.md).",
    ),
]
PROMPTS = Annotated[
    Path | None, place("FILE", "Prompts to evaluate on. Default: the held-out prompts, or else the probes.")
]
READ_PROMPTS = Annotated[Path | None, place("FILE", "Prompts to read activations on. Default: the probes.")]
COLUMN = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of the prompts in the file of --prompts. Default: by its columns."),
]
MAX_PROMPTS = Annotated[int | None, number("Use at most N prompts, evenly spaced over the file.", least=1)]
LAYERS = Annotated[list[int], repeated_layer("Layer, counted from 0; repeat for several. Default: all layers.")]
EVERY_LAYER = Annotated[bool, flag("--all-layers", "All layers with a defined v_rev (the default).")]
CHECKPOINT = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="RUN/STEP, anchor or witness. Default: last checkpoint of the first run."),
]
OPENINGS = Annotated[
    list[str],
    repeated_text("How a refusal of this model begins; repeat for several. Default: common English openings."),
]
COMPLIANCES = Annotated[
    list[str],
    repeated_text(
        "How a compliant answer begins; repeat for several. If given, the score compares whole openings of both kinds."
    ),
]
N_RANDOM = Annotated[int, number("Random directions per layer; the smallest possible p-value is 1/(N + 1).", least=1)]
# computation
DEVICE = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto (a GPU if there is one).")]
DTYPE = Annotated[
    str, typer.Option(metavar="NAME", help="float32, bf16, fp16, or stored (the dtype each checkpoint was saved in).")
]
KEEP = Annotated[int, number("Keep at most N downloaded run checkpoints on disk; 0: keep all.")]
STORE = Annotated[Path | None, place("FOLDER", "Cache activations in this folder, and reuse those cached there.")]
# output
JSON = Annotated[bool, flag("--json", "Print only JSON on stdout; notes go to stderr.")]
OUT_FOLDER = Annotated[Path, place("FOLDER", "Folder for the table and the figure.", check=writable_folder)]


def asked(file: Path | None, column: str | None) -> Any:
    """Return the file of --prompts, or the prompts in the column that --column names."""
    if column is None:
        return file
    if file is None:
        given = f"--column {column} was given without --prompts."
        remedy = "--prompts FILE, or probes = {file = …, column = …} in SEQUENCE.toml."
        raise GravlensError(given, "It names a column of that file.", remedy)
    return gl.read_prompts(file, column=column)


def chosen_layers(layers: Sequence[int], all_layers: bool) -> tuple[int, ...]:
    """Return the layers given by --layer; empty means all layers."""
    if layers and all_layers:
        given = "Both --layer and --all-layers were given."
        raise GravlensError(given, "They exclude each other.", "only one of them.")
    return tuple(layers)
