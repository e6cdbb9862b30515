"""Prefetch checkpoints: download the next while the current one is read; evict it afterwards."""

import os
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from gravlens.core.errors import GravlensError
from gravlens.history.hub import evict, is_hub_id, snapshots_here
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Known, Resolved, resolve
from gravlens.history.weight_files import weight_paths

Row: TypeAlias = Checkpoint | Resolved


@dataclass(frozen=True)
class Fetched:
    """A resolved checkpoint and the snapshot that was downloaded for it, if any."""

    resolved: Resolved
    downloaded: Path | None = None


def in_turn(checkpoints: Iterable[Row], *, keep: int | None) -> Generator[Resolved, None, None]:
    """Yield each checkpoint with its weights on disk while the next one is fetched.

    An unresolved checkpoint is resolved in its turn, so that its folder may be written while those before it are read.
    A hub's revision is downloaded in one background thread, and an error there is raised when its turn comes; local
    files are read ahead by the kernel. Of the revisions downloaded here the last `keep` stay, however the iteration
    ends, and at most `keep` + 1 are on disk at a time.
    """
    rows, ours, known = list(checkpoints), dict[Path, Any](), Known()
    given = [_checkpoint(row) for row in rows]
    # Witness, anchor and bases are read again by other calls; only a run's checkpoints have a step.
    stays: set[Any] = {one.base.source for one in given if one.base} | {one.source for one in given if one.step is None}
    ahead: tuple[Row, Future[Fetched | None]] | None = None
    worker = ThreadPoolExecutor(1, "gravlens-ahead")  # one: nothing is evicted while something is downloaded
    try:
        for number, row in enumerate(rows):
            future = ahead[1] if ahead else worker.submit(_fetch, row, known)
            fetched = future.result() or Fetched(resolve(row, known))  # a local folder: it may be written just now
            ahead = None
            _note(ours, fetched, stays)
            _trim(ours, keep, needed={_checkpoint(later).source for later in rows[number:]})
            if number + 1 < len(rows):
                ahead = rows[number + 1], worker.submit(_fetch, rows[number + 1], known)
            yield fetched.resolved
    finally:
        worker.shutdown(cancel_futures=True)  # a running download must end, or nobody would evict it
        if ahead is not None and keep is not None:
            _drop_unread(_checkpoint(ahead[0]), ahead[1], stays)
        _trim(ours, keep, needed=set())


def _checkpoint(row: Row) -> Checkpoint:
    return row.checkpoint if isinstance(row, Resolved) else row


def _note(ours: dict[Path, Any], fetched: Fetched, stays: set[Any]) -> None:
    """Update `ours`, the snapshots that may be evicted, least recently read first."""
    checkpoint = fetched.resolved.checkpoint
    *bases, own = fetched.resolved.paths or (None,)
    # A commit that was downloaded under one name may be read again under another.
    source = None if own is None else ours.pop(own, checkpoint.source if own == fetched.downloaded else None)
    for base in bases:
        ours.pop(base, None)  # a whole model that adapters need again
    if own is not None and source is not None and checkpoint.source not in stays:
        ours[own] = checkpoint.source


def _trim(ours: dict[Path, Any], keep: int | None, *, needed: set[Any]) -> None:
    """Evict the oldest downloads beyond `keep`, except those that are needed."""
    evictable = [] if keep is None else [one for one, source in ours.items() if source not in needed]
    for snapshot in evictable[: max(0, len(ours) - (keep or 0))]:
        del ours[snapshot]
        evict(snapshot)


def _drop_unread(checkpoint: Checkpoint, ahead: Future[Fetched | None], stays: set[Any]) -> None:
    """Evict what was prefetched for a checkpoint that was never read."""
    fetched = None if ahead.cancelled() or ahead.exception() else ahead.result()
    if fetched is not None and fetched.downloaded is not None and checkpoint.source not in stays:
        evict(fetched.downloaded)


def _fetch(row: Row, known: Known) -> Fetched | None:
    """Download a hub's revision, or read local files ahead; None for a local folder that is resolved in its turn."""
    checkpoint = _checkpoint(row)
    on_a_hub = is_hub_id(checkpoint.source)
    if not on_a_hub and isinstance(row, Checkpoint):
        if isinstance(row.source, Path | str):
            _read_ahead(Path(row.source))
        return None
    # What was in the cache before is the user's, and never evicted.
    here = snapshots_here(str(checkpoint.source)) if on_a_hub else None
    resolved = row.fetched() if isinstance(row, Resolved) else resolve(row, known)
    for path in resolved.paths:
        _read_ahead(path)
    own = resolved.paths[-1] if resolved.paths else None
    return Fetched(resolved, own if here is not None and own not in here else None)


def _read_ahead(folder: Path) -> None:
    """Ask the kernel to read the weights ahead: a hint that may fail."""
    with suppress(OSError, GravlensError, AttributeError):  # macOS and Windows have no posix_fadvise
        for path in weight_paths(folder):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
