"""Progress bars: tqdm, removed when done, silent with TQDM_DISABLE=1; a long call says once how long it will take."""

import os
import sys
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

AFTER = 1.0  # seconds; shorter work shows no bar
TELLING = 3.0  # seconds of work after which the rest can be estimated
LONG = 10.0  # seconds; a call with less left to do is not announced
_COUNTING: list[str] = []  # bars that are counting, the outermost first


class _Bar(tqdm):
    """Without tqdm's monitor thread, and without its lock, which would choose the start method of processes."""

    monitor_interval = 0
    work = ""  # what is done in all; "" once it was announced
    began = 0.0

    def update(self, n: float | None = 1) -> bool | None:
        shown, seconds = super().update(n), time.monotonic() - self.began
        if self.work and self.n and seconds >= TELLING:
            self.announce(seconds / self.n * ((self.total or 0) - self.n), " more")
        return shown

    def announce(self, seconds: float, more: str = "") -> None:
        """Say once what is done and how long it takes, if that is long."""
        work, self.work = self.work, ""
        if work and seconds >= LONG and not self.disable:
            told = f"{seconds / 60:.0f} min" if seconds >= 150 else f"{5 * round(seconds / 5)} s"  # as an estimate has
            self.write(f"{self.desc}: {work}, about {told}{more}", file=sys.stderr)  # it keeps the bar intact


_Bar.set_lock(threading.RLock())


def silent() -> bool:
    """Whether TQDM_DISABLE is set. tqdm reads it only at import; this reads it for every bar."""
    return os.environ.get("TQDM_DISABLE", "") not in ("", "0")


@contextmanager
def progress(
    what: str, things: Iterable[Any] | None = None, *, total: int | None = None, unit: str = "it", leave: bool = False,
    work: str = "", seconds: float | None = None,
) -> Generator["tqdm[Any]"]:  # fmt: skip
    """Show a progress bar labelled `what` over an iterable, or over `total` steps counted by its `update`.

    Only one bar is shown at a time: work inside a bar of gravlens is part of what that bar counts. `leave` keeps the
    finished bar on screen. Where it takes long, one line says what is done (`work`; default: how many units) and how
    long: before the first step if that is known (`seconds`), else as soon as the first steps tell.
    """
    hidden = bool(_COUNTING) or silent()
    _COUNTING.append(what)
    try:
        with _Bar(things, what, total, unit=unit, leave=leave, delay=AFTER, disable=hidden) as bar:
            bar.work, bar.began = work or f"{bar.total} {unit}s", time.monotonic()
            if seconds is not None:
                bar.announce(seconds)
            yield bar
    finally:
        _COUNTING.remove(what)
