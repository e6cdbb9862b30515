"""The one exception of gravlens, checks of arguments that raise it, and files of other programs, whose faults do."""

import json
import os
import re
import tomllib
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Integral
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, TypeVar

T = TypeVar("T")
STATUS = re.compile(r"\d{3} (Client|Server) Error")  # a hub's first line: a status and a request id
# Lines further down that say what to do about it.
HELPFUL = re.compile(r"log(ging)? in|authenticat|restricted|gated|licen[cs]e|pip install", re.IGNORECASE)
SAVED = "A file of .save() is needed.", "save it again."  # as in `reading`
LONGEST = 400  # characters of another program's message


class GravlensError(ValueError):
    """Invalid input: what was given and what was expected (sentences), and how to fix it (shown after "Try:").

    Examples:
        >>> try:
        ...     gl.locate_vrev(seq, layer=12)
        ... except gl.GravlensError as error:
        ...     print(error.remedy)
        a layer between 0 and 2; there is no -1.
    """

    def __init__(self, given: str, wanted: str, remedy: str) -> None:
        super().__init__(f"{given} {wanted} Try: {remedy}")
        self.given, self.wanted, self.remedy = given, wanted, remedy

    def __reduce__(self) -> tuple[type["GravlensError"], tuple[str, str, str]]:
        """Pickle by the three arguments: by default an exception is unpickled from its one message."""
        return type(self), (self.given, self.wanted, self.remedy)


@contextmanager
def reading(path: object, wanted: str, remedy: str) -> Generator[None]:
    """Raise whatever the block raises as a `GravlensError` that names the file.

    Other libraries document few of the exceptions of their parsers, and broken files find the rest. Errors of gravlens
    pass, with the file's name before them if they lack it, and so does what is no `Exception`, such as Ctrl-C.
    """
    try:
        yield
    except GravlensError as error:
        if str(path) in str(error):
            raise
        raise GravlensError(f"{path}: {error.given}", error.wanted, error.remedy) from error
    except Exception as error:
        raise GravlensError(f"{path} cannot be read ({said(error)}).", wanted, remedy) from error


def read_object(path: Path, remedy: str = "write or copy it again.") -> dict[str, Any]:
    """Read a JSON file that holds one object."""
    wanted = "A file of one JSON object, as UTF-8, is needed."
    with reading(path, wanted, remedy):
        found = json.loads(path.read_bytes().decode("utf-8"))
    if isinstance(found, dict):
        return found
    raise GravlensError(f"{path} holds a {type(found).__name__}.", wanted, remedy)


def said(error: BaseException) -> str:
    """Return what matters of another program's message, on one line: what happened, and a hint such as "log in"."""
    match error:
        case KeyError():
            text = f"there is no {error}"
        case RecursionError() | MemoryError():
            text = "it is nested too deeply" if isinstance(error, RecursionError) else "there is too little memory"
        case OSError(strerror=str(reason)):  # without errno and path, which str() adds
            text = reason
        case json.JSONDecodeError() | UnicodeDecodeError() | tomllib.TOMLDecodeError():
            text = f"it is not valid {type(error).__name__.removesuffix('DecodeError')}: {error}"
        case TypeError() | AttributeError() | ArithmeticError() | AssertionError():  # they speak of code
            text = f"{type(error).__name__}: {error}"
        case _:
            text = str(error)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not STATUS.match(line)] or lines or [type(error).__name__]
    # "Error(s) in loading state_dict for …:" is a heading.
    first = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)
    kept = lines[: first + 1] + [line for line in lines[first + 1 :] if HELPFUL.search(line)]
    return " ".join(kept)[:LONGEST].rstrip(".:")


def at_home(path: Path | str) -> Path:
    """Return a path with a leading `~` replaced by the home folder; without one, and of an unknown user, as it is."""
    if not isinstance(path, str | PathLike):
        raise wrong_kind(path, "A path is needed.", "a text or a pathlib.Path.")
    return Path(os.path.expanduser(path))  # Path.expanduser raises RuntimeError


def wrong_kind(given: object, wanted: str, remedy: str) -> GravlensError:
    """Return the error for an argument of the wrong type; `wanted` and `remedy` as in `GravlensError`."""
    shown = f" ({str(given)[:60]!r})" if isinstance(given, str | PurePath) else ""
    return GravlensError(f"A {type(given).__name__} was given{shown}.", wanted, remedy)


def of_kind(given: T, kind: type, wanted: str, remedy: str) -> T:
    """Return `given` if it is an instance of `kind`, else raise the error of `wrong_kind`."""
    if isinstance(given, kind):
        return given
    raise wrong_kind(given, wanted, remedy)


def unknown_keys(place: str, names: Iterable[str], known: Collection[str], remedy: str) -> GravlensError:
    """Return the error for keys of a file that nothing reads, each with the nearest known one."""
    told = []
    for name in sorted(names):
        near = get_close_matches(name.strip("[]"), known, 1)
        told.append(f"{name}: did you mean {name.replace(name.strip('[]'), near[0])}?" if near else f"{name}.")
    return GravlensError(f"{place} has the unknown key {' '.join(told)}", f"Known keys: {', '.join(known)}.", remedy)


def as_list(given: T | Iterable[T]) -> list[T]:
    """Return a list of items, or of the one item that was given; a string is one item."""
    return [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [given]  # pyright: ignore


def check_layer(layer: int, n_layers: int) -> int:
    """Return `layer` where `blocks.{layer}.hook_resid_post` exists, else raise `GravlensError`."""
    # Integral admits numpy's integers; True would pass as layer 1; -1 would index another layer in every depth.
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < n_layers:
        wanted = f"Layers are whole numbers from 0 to {n_layers - 1}: layer l is blocks.l.hook_resid_post."
        remedy = f"a layer between 0 and {n_layers - 1}; there is no -1."
        raise GravlensError(f"Layer {layer!r} is out of range.", wanted, remedy)
    return int(layer)
