"""Progress bars: tqdm, removed when done, silent with TQDM_DISABLE=1."""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

AFTER = 1.0  # seconds; shorter work shows no bar
_COUNTING: list[str] = []  # bars that are counting, the outermost first


def silent() -> bool:
    """Whether TQDM_DISABLE is set. tqdm reads it only at import; this reads it for every bar."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0")


@contextmanager
def progress(
    what: str, things: Iterable[Any] | None = None, *, total: int | None = None, unit: str = "it", leave: bool = False
) -> Generator["tqdm[Any]"]:
    """Show a progress bar labelled `what` over an iterable, or over `total` steps counted by its `update`.

    Only one bar is shown at a time: work inside a bar of gravlens is part of what that bar counts. `leave` keeps the
    finished bar on screen.
    """
    hidden = bool(_COUNTING) or silent()
    _COUNTING.append(what)
    try:
        with tqdm(things, what, total, unit=unit, leave=leave, delay=AFTER, disable=hidden) as bar:
            yield bar
    finally:
        _COUNTING.remove(what)
