"""Options that several commands have, and the scripts of analyses/: one name and one meaning everywhere."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gravlens.core.errors import GravlensError

SEPARATOR = "|"  # of texts in one environment variable


def writable_file(path: Path | None) -> Path | None:
    """Raise before any work where a file could not be written."""
    if path is not None:
        if path.is_dir():
            raise GravlensError(f"--out {path} is a folder.", "A file is written there.", f"--out {path / 'out'}.")
        _check_place(path, path.parent)
    return path


def writable_folder(path: Path | None) -> Path | None:
    """Raise before any work where a folder could not be made or written into."""
    if path is not None:
        _check_place(path, path)
    return path


def _check_place(path: Path, folder: Path) -> None:
    """The nearest folder that is there takes files."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists() or one.is_symlink())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written into" if there.is_dir() else "is no folder"
        raise GravlensError(f"--out {path}: {there} {why}.", "Results are written there.", "another --out.")


def texts(context: typer.Context, parameter: typer.CallbackParam, value: list[str]) -> list[str]:
    """Repeated texts as they are; those of an environment variable stand side by side, with | between them."""
    if not from_environment(context, parameter):
        return value
    return [text.strip() for text in os.environ[variable(context, parameter)].split(SEPARATOR)]


def from_environment(context: Any, parameter: Any) -> bool:
    """Whether an option has its value from its environment variable."""
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == "ENVIRONMENT"


def variable(context: Any, parameter: Any) -> str:
    """The environment variable of an option."""
    return f"{context.auto_envvar_prefix}_{parameter.name.upper()}"


def flag(name: str, help: str) -> Any:
    """An option that takes no value."""
    return typer.Option(name, metavar="", help=help)


def repeated_text(help: str) -> Any:
    """An option that takes texts, one each time that it is given."""
    return typer.Option(callback=texts, metavar="TEXT", help=help)


def example(line: str) -> str:
    """The last line of a command's help."""
    return f"Example: {line}"


# what is read
SEQUENCE = Annotated[
    Path,
    typer.Argument(metavar="SEQUENCE.toml", help="Witness, anchor, runs and prompts (docs/sequence.md)."),
]
PROMPTS = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File of prompts to measure on. Default: held_out, else probes.")
]
READ_PROMPTS = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File of prompts. Default: the sequence's probes.")
]
MAX_PROMPTS = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="At most so many prompts, spread over the file.")
]
LAYERS = Annotated[
    list[int],
    typer.Option("--layer", metavar="N", help="A layer, counted from 0; repeat it for several. Default: all."),
]
EVERY_LAYER = Annotated[bool, flag("--all-layers", "Every layer with a v_rev; the default.")]
CHECKPOINT = Annotated[
    str | None, typer.Option(metavar="NAME", help="RUN/STEP, anchor or witness. Default: the first run's last.")
]
OPENINGS = Annotated[
    list[str], repeated_text("How this model's refusals begin; repeat it. Default: usual English openings.")
]
COMPLIANCES = Annotated[
    list[str],
    repeated_text("How its other answers begin; repeat it. Where given, whole openings of both kinds are weighed."),
]
N_RANDOM = Annotated[
    int, typer.Option(min=1, metavar="N", help="Random directions per row; the smallest p is 1/(1 + this).")
]
# how it is read
DEVICE = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto: a GPU where there is one.")]
DTYPE = Annotated[
    str, typer.Option(metavar="NAME", help="float32, bf16, fp16, or stored: as each checkpoint stores its weights.")
]
KEEP = Annotated[int, typer.Option(min=0, metavar="N", help="Downloaded revisions of runs that stay on disk; 0: all.")]
STORE = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Keep states in this folder, and read what is there.")
]
# what is written
JSON = Annotated[bool, flag("--json", "Print JSON alone on stdout; all else goes to stderr.")]
OUT_FOLDER = Annotated[
    Path, typer.Option(callback=writable_folder, metavar="FOLDER", help="Folder for the table and the figure.")
]


def chosen_layers(layers: Sequence[int], all_layers: bool) -> tuple[int, ...]:
    """The layers that were asked for; none is every layer."""
    if layers and all_layers:
        raise GravlensError(
            "Both --layer and --all-layers were given.", "It is some layers, or all of them.", "one of the two."
        )
    return tuple(layers)
