"""One kind of progress bar for all that takes long: tqdm's, gone when it is done, silent under TQDM_DISABLE=1."""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

AFTER = 1.0  # seconds: what is done by then shows no bar
_COUNTING: list[str] = []  # what is being done, the outermost first


def silent() -> bool:
    """Whether TQDM_DISABLE asks for no bars. tqdm reads it when it is imported, this whenever a bar is made."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0")


@contextmanager
def progress(
    what: str, things: Iterable[Any] | None = None, *, total: int | None = None, unit: str = "it", leave: bool = False
) -> Generator["tqdm[Any]"]:
    """A bar over things, or over `total` steps that its `update` counts.

    One bar at a time: what is called while a bar of gravlens is counting is a part of what that counts.

    Args:
        what: is done, in a word or two.
        things: are gone through.
        total: how many, where the things cannot say.
        unit: of a step.
        leave: keep the finished bar on the screen.
    """
    hidden = bool(_COUNTING) or silent()
    _COUNTING.append(what)
    try:
        with tqdm(things, what, total, unit=unit, leave=leave, delay=AFTER, disable=hidden) as bar:
            yield bar
    finally:
        _COUNTING.remove(what)
