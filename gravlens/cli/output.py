"""Terminal output of the commands: tables and JSON on stdout, notes and one-line errors on stderr, exit codes."""

import json
import re
import sys
import textwrap
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperCommand, TyperGroup

from gravlens import core, plot
from gravlens.cli.options import from_environment, variable
from gravlens.core.errors import GravlensError

if TYPE_CHECKING:
    import pandas as pd

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
# click's UsageError; typer may ship its own copy of click, so `click.UsageError` is not always this class.
USAGE_ERROR: Any = typer.BadParameter.__base__
BUILT_IN = ("version", "help", "install_completion", "show_completion")
GLUE = "\N{NO-BREAK SPACE}"
NUMBERS = re.compile(r"[-+±\d.,%\[\] ]+(to [-+\d. ]+)?")  # "-0.14 [-0.32, +0.05]", "-0.38 to +0.14", "0.2 ± 0.1"
UNIT = re.compile(r"(?<=\d) (?=[A-Za-z%/]{1,6}\b)")
console = Console(emoji=False)  # ":bomb:" in a path would be printed as a pictogram
messages = Console(emoji=False, stderr=True)


def print_json(content: Any) -> None:
    """Print JSON on stdout, with NaN as null."""
    typer.echo(json.dumps(core.files.without_nan(content), allow_nan=False))


def records(table: Any) -> list[dict[str, Any]]:
    """Convert a pandas table to a list of rows, with NaN as None."""
    # `to_dict` would keep NaN, numpy scalars and Timestamps, which json.dumps refuses; 15 digits are its most.
    return json.loads(table.to_json(orient="records", date_format="iso", double_precision=15))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    caption: str | None = None,
    least: Sequence[str] = (),
) -> None:
    """Print a table: in full to a pipe or file, fitted to a terminal without breaking a word or a number.

    A terminal that is too narrow drops the columns `least` in this order; of these an empty one is never shown.
    """
    texts = [[_unbroken(core.display.cell(value)) for value in row] for row in rows]
    cells = {name: [row[place] for row in texts] for place, name in enumerate(columns)}
    cells = {name: column for name, column in cells.items() if any(column) or name not in least}
    room, dropped = console.width if console.is_terminal else sys.maxsize, list[str]()
    for name in least:
        if name in cells and _total(_widths(cells, room)) > room:
            dropped.append(name)
            del cells[name]
    widths = _widths(cells, room)
    table = Table(*(Column(escape(name), width=width) for name, width in widths.items()))
    fitted = ([escape(_fitted(text, widths[name])) for text in column] for name, column in cells.items())
    for row in zip(*fitted, strict=True):
        table.add_row(*row)
    if title:
        print_prose(title)
    Console(emoji=False, width=max(console.width, _total(widths))).print(table)
    left_out = f"not shown at this width, but in --json: {', '.join(dropped)}" if dropped else None
    for line in filter(None, (caption, left_out)):
        print_prose(line)


def shortened(digest: str) -> str:
    """Return the beginning of a digest for a terminal, all of it for a pipe or file."""
    return digest[:12] if console.is_terminal else digest


def _unbroken(text: str) -> str:
    """Put no-break spaces where a line must not end: in a path, in a cell of numbers, before a unit."""
    whole = NUMBERS.fullmatch(text) or text.startswith(("/", "~", "hf://"))
    return text.replace(" ", GLUE) if whole else UNIT.sub(GLUE, text)


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + 3 * len(widths) + 1  # a line and two blanks for each column


def _widths(cells: Mapping[str, Sequence[str]], room: int) -> dict[str, int]:
    """Return the widths of the columns: the widest shrinks first, and none below its longest word."""
    texts = {name: (name, *column) for name, column in cells.items()}
    widths = {name: max(map(cell_len, column)) for name, column in texts.items()}
    lines = {name: "\n".join(_fitted(text, 1) for text in column).split("\n") for name, column in texts.items()}
    least = {name: max(map(cell_len, words)) for name, words in lines.items()}
    while _total(widths) > room and (wide := [name for name in widths if widths[name] > least[name]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _fitted(text: str, width: int) -> str:
    """Wrap a cell by words, and cut the front of a path: two of the same folder differ in the end."""
    words = " ".join(_end_of(word, width) for word in text.split(" "))
    return _filled(words, width).replace(GLUE, " ")


def _end_of(path: str, width: int) -> str:
    """Return as many of the last names of a path as fit, at least two."""
    names = path.split("/")
    if len(path) <= width or len(names) < 4:
        return path
    ends = ["/".join(["…", *names[-n:]]) for n in range(len(names) - 1, 1, -1)]
    return next((end for end in ends if len(end) <= width), ends[-1])


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def write_effect(table: "pd.DataFrame", path: Path) -> list[Path]:
    """Write a table of effects to `path`.csv and its figure to `path`.pdf and `path`.png; return the paths."""
    written = core.files.write_table(path.with_suffix(".csv"), table)
    return [written, *plot.style.save_figure(plot.lines.plot_effect(table), path)]


def print_answer(text: str, json: bool, **tables: Any) -> None:
    """Print what a script found: its sentences, or as JSON these (`summary`) and the rows of its tables."""
    if json:
        print_json({"summary": text.splitlines(), **{name: records(table) for name, table in tables.items()}})
    else:
        print_prose(text)


def print_line(text: str, *, width: int | None = None) -> None:
    """Print a line of the result on stdout, prose wrapped to a width."""
    # without a width nothing is wrapped: a path in two parts cannot be copied
    lines = text if width is None else _filled(text, min(width, console.width))
    console.print(lines, markup=False, highlight=False, soft_wrap=True)


def print_prose(text: str) -> None:
    """Print sentences on stdout: wrapped by words on a terminal, as they are in a pipe or file."""
    print_line(_wrapped(text, console))


def _wrapped(text: str, to: Console) -> str:
    return "\n".join(_filled(line, to.width) for line in text.split("\n")) if to.is_terminal else text


def print_note(text: str) -> None:
    """Print a note on stderr."""
    messages.print(_wrapped(text, messages), markup=False, highlight=False, soft_wrap=True)


def print_written(path: Any, json: bool) -> None:
    """Report a written file: on stdout below a table, on stderr with --json."""
    (print_note if json else print_line)(f"written to {path}")


def print_error(text: str) -> None:
    """Print an error on stderr: as one line, which a terminal wraps by words."""
    _, _, line = _wrapped(f"gravlens: {' '.join(text.split())}", messages).partition(":")
    messages.print(f"[bold red]gravlens:[/]{escape(line)}", highlight=False, soft_wrap=True)


class OneLineErrors:
    """A command that reports invalid input as one line on stderr; a traceback means a bug of gravlens."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # an ASCII terminal shows "–" as \u2013
                stream.reconfigure(errors="backslashreplace")
        with errors_as_one_line():
            return super().parse_args(ctx, args)  # pyright: ignore[reportAttributeAccessIssue]

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""  # a group parses and runs one of its commands here
        with errors_as_one_line():
            return super().invoke(ctx)  # pyright: ignore[reportAttributeAccessIssue]


class Script(OneLineErrors, TyperCommand):
    """A single command, as in the scripts of analyses/."""


class Commands(OneLineErrors, TyperGroup):
    """A group of commands with an environment variable for each option."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Give --version, --help and the like no environment variable."""
        params = super().get_params(ctx)
        for param in params:
            # With GRAVLENS_VERSION=0.1 in the environment, every command would print the version and exit.
            if param.name in BUILT_IN:
                param.allow_from_autoenv = False  # pyright: ignore[reportAttributeAccessIssue]
        return params

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, the paragraphs of whose help are wrapped by the terminal."""
        found = super().get_command(ctx, cmd_name)
        if found is not None and found.help:  # typer breaks a line wherever the docstring does, and at the edge as well
            found.help = re.sub(r"(?<!\n)\n(?!\n)", " ", found.help)
        return found


@contextmanager
def errors_as_one_line() -> Generator[None]:
    """Turn invalid input, file errors and Ctrl-C into one line on stderr and an exit code."""
    try:
        yield
    except GravlensError as error:
        message, code = str(error), BAD_INPUT
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not an error: click prints the help
            raise
        message, code = _usage_error(error), BAD_INPUT
    except BrokenPipeError:  # `gravlens … | head` closes stdout early: click exits silently
        raise
    except OSError as error:
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        hint = "Try: check that the path exists, its permissions and the free disk space."
        message, code = f"{place.rstrip('.')}. {hint}", BAD_INPUT
    except KeyboardInterrupt:
        # Files are written atomically, and what is complete is found again by its content.
        message, code = "Interrupted. No file is half-written. Try: the same command again.", INTERRUPTED
    else:
        return
    print_error(message)
    raise typer.Exit(code)


def _usage_error(error: Any) -> str:
    """Describe a wrong option or value, and the environment variable that set it."""
    context, parameter = error.ctx, getattr(error, "param", None)
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's prefix
    if hasattr(error.__cause__, "errors"):  # pydantic says "Input should be a valid integer", but not what was given
        message = message.replace("Input", repr(error.__cause__.errors()[0]["input"]), 1).partition(", unable to")[0]
    if context and parameter and from_environment(context, parameter):
        message += f" (set by {variable(context, parameter)})"
    end = "" if message.endswith("?") else "."  # click may end with "Did you mean --layer?"
    return f"{message}{end} Try: {context.command_path if context else 'gravlens'} --help."
