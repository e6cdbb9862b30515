"""Claim a folder for one fine-tuning run: a lock while it is written, a marker that describes the run."""

import hashlib
import json
import re
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from gravlens.core.errors import GravlensError
from gravlens.core.files import without_nan, write_json

MARKER = "finetune.json"
RESUME = ".resume"


@contextmanager
def claimed(out: Path, description: Mapping[str, Any]) -> Generator[Path | None]:
    """Lock `out` for one run; yield the newest complete state of the same run stopped earlier, or None.

    Args:
        out: the run's folder.
        description: of the run, as JSON; written to `out/finetune.json`.
    """
    _check_owner(out, description)  # before anything is written into someone else's folder
    states = out / RESUME
    states.mkdir(parents=True, exist_ok=True)
    with _locked(states / "lock", out):
        _check_owner(out, description)  # again: another process may have finished in between
        write_json(out / MARKER, description)
        yield _newest(states)
        # With the lock in it, while it is held: filelock tries again where a locked file was unlinked.
        shutil.rmtree(states, ignore_errors=True)


def digest(value: Any) -> str:
    """Return the SHA-256 of a value, including the numbers in its arrays, weights and dataclasses."""
    found = hashlib.sha256()
    for part in _bytes_of(value):
        found.update(part)
    return found.hexdigest()


def _locked(path: Path, out: Path) -> AbstractContextManager[Any]:
    try:
        return FileLock(path).acquire(timeout=0)  # the system releases it when a process is killed
    except Timeout as error:
        given = f"Another process is training into {out}."
        raise GravlensError(given, "A folder holds one run.", "another out=, or wait until that run ends.") from error


def _check_owner(out: Path, description: Mapping[str, Any]) -> None:
    states = (*out.glob("checkpoint-*"), *out.glob(f"{RESUME}/checkpoint-*"))
    if not states:
        return
    try:
        kept = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # written by another program, or by hand
        kept = None
    if isinstance(kept, dict):
        changed = [name for name, value in without_nan(description).items() if kept.get(name) != value]
        if not changed:
            return
        # The first alone: data and start are hashed as the run sees them, after its recipe and seed.
        given = f"{out} holds another run: its {changed[0]} differs."
    else:
        names = ", ".join(sorted(str(path.relative_to(out)) for path in states)[:3])
        given = f"{out} holds another run: {names}, and no {MARKER} that describes them."
    raise GravlensError(given, "A folder holds one run; nothing is overwritten.", "another out=, or move that folder.")


def _newest(states: Path) -> Path | None:
    # Trainer writes trainer_state.json last, so a state that was cut short has none.
    whole = [path.parent for path in states.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _bytes_of(value: Any) -> Iterator[bytes | memoryview]:
    # Part by part: the `repr` of an array abbreviates its numbers, that of a module leaves them out.
    value = value.state_dict() if isinstance(value, nn.Module) else value
    yield type(value).__name__.encode()  # else an empty list and an empty tuple would be alike
    match value:
        case Tensor():  # as bytes: numpy has no bf16
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        case np.ndarray():
            yield value.tobytes()
        case Mapping():
            yield from _bytes_of([*value.items()])
        case list() | tuple():
            for part in value:
                yield from _bytes_of(part)
        case _ if is_dataclass(value) and not isinstance(value, type):
            yield from _bytes_of([(one.name, getattr(value, one.name)) for one in fields(value)])
        case _:
            yield re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()  # addresses change from process to process
