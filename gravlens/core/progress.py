"""Progress bars: tqdm, removed when done, silent with TQDM_DISABLE=1."""

import os
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

AFTER = 1.0  # seconds; shorter work shows no bar
_COUNTING: list[str] = []  # bars that are counting, the outermost first


class _Bar(tqdm):
    """Without tqdm's monitor thread, and without its lock, which would choose the start method of processes."""

    monitor_interval = 0


_Bar.set_lock(threading.RLock())


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
        with _Bar(things, what, total, unit=unit, leave=leave, delay=AFTER, disable=hidden) as bar:
            yield bar
    finally:
        _COUNTING.remove(what)
