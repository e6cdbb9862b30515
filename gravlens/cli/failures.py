"""How a command ends: 0 done, 1 a check failed, 2 bad input, 130 interrupted; each failure is one line on stderr."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gravlens.cli.options import from_environment, variable
from gravlens.cli.screen import fail
from gravlens.core.errors import GravlensError

CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
USAGE: Any = typer.BadParameter.__base__  # click's UsageError, which typer keeps under different roofs
OWN = ("version", "help", "install_completion", "show_completion")


class OneMessage:
    """A command whose failures are one message on stderr, never a traceback where the input was bad."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options."""
        with one_message():
            return super().parse_args(ctx, args)  # pyright: ignore[reportAttributeAccessIssue]

    def invoke(self, ctx: Any) -> Any:
        """Run it; of a group, read the options of one of its commands and run that."""
        with one_message():
            return super().invoke(ctx)  # pyright: ignore[reportAttributeAccessIssue]


class Script(OneMessage, TyperCommand):
    """A command by itself, as the scripts of analyses/ are."""


class Commands(OneMessage, TyperGroup):
    """Commands whose options have environment variables."""

    def get_params(self, ctx: Any) -> list[Any]:
        """GRAVLENS_VERSION and the like are no options: whoever sets such a variable means something else."""
        params = super().get_params(ctx)
        for param in params:
            if param.name in OWN:
                param.allow_from_autoenv = False  # pyright: ignore[reportAttributeAccessIssue]
        return params


@contextmanager
def one_message() -> Generator[None]:
    """Turn what a user can mend, or did, into one message and an exit code."""
    try:
        yield
    except GravlensError as error:
        fail(str(error))
        raise typer.Exit(BAD_INPUT) from None
    except USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        fail(_misused(error))
        raise typer.Exit(BAD_INPUT) from None
    except BrokenPipeError:  # `gravlens … | head`
        raise
    except OSError as error:
        place = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(f"{place.rstrip('.')}. Try: check that path, who may read and write it, and the room on its disk.")
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        fail("Interrupted. Files that were written are whole. Try: the same command again.")
        raise typer.Exit(INTERRUPTED) from None


def _misused(error: Any) -> str:
    """A wrong option or value, the environment variable that it came from, and where help is."""
    context, parameter = error.ctx, getattr(error, "param", None)
    said = error.format_message().rstrip(".")
    if context and parameter and from_environment(context, parameter):
        said += f" (set by {variable(context, parameter)})"
    return f"{said}{'' if said.endswith('?') else '.'} Try: {context.command_path if context else 'gravlens'} --help."
