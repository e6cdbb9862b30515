"""Checkpoints in turn: while one is read the next is fetched, and what was downloaded for it goes behind it."""

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from gravlens.core.errors import GravlensError
from gravlens.history.hub import evict, snapshots_here
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import lineage
from gravlens.history.weight_files import weight_files

Turns: TypeAlias = Generator[tuple[Checkpoint, tuple[Path, ...]], None, None]


@dataclass(frozen=True)
class Fetched:
    """A checkpoint's folders (`lineage`), and the snapshot that was downloaded for it, if any."""

    folders: tuple[Path, ...]
    downloaded: Path | None = None


def in_turn(checkpoints: Iterable[Checkpoint], *, keep: int | None) -> Turns:
    """Each checkpoint with its folders (none for a model in memory), the next one's files being fetched meanwhile.

    A hub's revision is downloaded ahead in one background thread, and what goes wrong there is raised in its turn; of
    local files the kernel is asked to read ahead. Revisions that were downloaded here go again, except for the last
    `keep`, so that at most `keep` + 1 of them lie on disk at a time; however the reading ends, `keep` stay.
    """
    rows, ours = list(checkpoints), dict[Path, Any]()
    stays = _never_evicted(rows)
    ahead: tuple[Checkpoint, Future[Fetched]] | None = None
    worker = ThreadPoolExecutor(1, "gravlens-ahead")  # one: nothing is evicted while something is downloaded
    try:
        for number, checkpoint in enumerate(rows):
            fetched = _fetched(checkpoint, ahead[1] if ahead else worker.submit(_fetch, checkpoint))
            ahead = None
            _note(ours, checkpoint, fetched, stays)
            _trim(ours, keep, needed={later.source for later in rows[number:]})
            if number + 1 < len(rows):
                ahead = rows[number + 1], worker.submit(_fetch, rows[number + 1])
            yield checkpoint, fetched.folders
    finally:
        worker.shutdown(cancel_futures=True)  # a download that is under way ends first, else it would be nobody's
        if ahead is not None and keep is not None:
            _drop_unread(*ahead, stays)
        _trim(ours, keep, needed=set())


def _never_evicted(rows: Sequence[Checkpoint]) -> set[Any]:
    """Sources of witness, anchor and bases, which other calls read again: a run's checkpoints alone have a step."""
    bases = {row.base.source for row in rows if row.base is not None}
    return bases | {row.source for row in rows if row.step is None}


def _note(ours: dict[Path, Any], checkpoint: Checkpoint, fetched: Fetched, stays: set[Any]) -> None:
    """Remember in `ours`, the last read last, what may be evicted; what stays may be there under another name."""
    *bases, own = fetched.folders or (None,)
    source = None if own is None else ours.pop(own, checkpoint.source if own == fetched.downloaded else None)
    for base in bases:
        ours.pop(base, None)
    if own is not None and source is not None and checkpoint.source not in stays:
        ours[own] = checkpoint.source


def _trim(ours: dict[Path, Any], keep: int | None, *, needed: set[Any]) -> None:
    """Evict the oldest downloads beyond `keep`, but none whose source is needed."""
    evictable = [] if keep is None else [one for one, source in ours.items() if source not in needed]
    for snapshot in evictable[: max(0, len(ours) - (keep or 0))]:
        del ours[snapshot]
        evict(snapshot)


def _drop_unread(checkpoint: Checkpoint, ahead: Future[Fetched], stays: set[Any]) -> None:
    """Evict what was fetched ahead for a checkpoint whose turn never came."""
    fetched = None if ahead.cancelled() or ahead.exception() else ahead.result().downloaded
    if fetched is not None and checkpoint.source not in stays:
        evict(fetched)


def _fetched(checkpoint: Checkpoint, ahead: Future[Fetched]) -> Fetched:
    """What was fetched; a local folder is looked at anew, for it may have been written meanwhile."""
    return ahead.result() if _on_a_hub(checkpoint) else Fetched(_folders(checkpoint))


def _fetch(checkpoint: Checkpoint) -> Fetched:
    here = snapshots_here(str(checkpoint.source)) if _on_a_hub(checkpoint) else None
    folders = _folders(checkpoint)
    for folder in folders:
        _read_ahead(folder)
    return Fetched(folders, folders[-1] if here is not None and folders[-1] not in here else None)


def _folders(checkpoint: Checkpoint) -> tuple[Path, ...]:
    return () if isinstance(checkpoint.source, nn.Module) else tuple(lineage(checkpoint))


def _on_a_hub(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.source, str) and not Path(checkpoint.source).exists()


def _read_ahead(folder: Path) -> None:
    """Ask the kernel for the weights' pages; a hint, which fails nothing and is not to be had everywhere."""
    with suppress(OSError, GravlensError, AttributeError):
        for path in weight_files(folder):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
