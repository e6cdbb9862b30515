"""Claim a folder for one fine-tuning run: a lock, a marker that describes the run, states that it resumes from."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from gravlens.core.errors import GravlensError
from gravlens.core.files import CHECKSUMS, checksums, sync_files, without_nan, write_json, writing

MARKER = "finetune.json"
RESUME = ".resume"
KEPT = 2  # states: the newest may be damaged
Checksums = Mapping[str, Mapping[str, str]]  # checkpoint's folder -> file -> SHA-256


@contextmanager
def claimed(out: Path, description: Mapping[str, Any]) -> Generator[Path | None]:
    """Lock `out` for one run; yield the newest whole state of the same run stopped earlier, or None.

    A state that is damaged, or whose run has lost a checkpoint since, is removed with a warning.

    Args:
        out: the run's folder.
        description: of the run, as JSON; written to `out/finetune.json`.
    """
    with writing(out, Exception):  # pathlib raises ValueError of a null byte
        _check_owner(out, description)  # before anything is written into someone else's folder
        (states := out / RESUME).mkdir(parents=True, exist_ok=True)
    with writing(out), _locked(states / "lock", out):
        _check_owner(out, description)  # again: another process may have finished in between
        write_json(out / MARKER, description)
        yield _newest(states)
        for state in _by_step(states):  # what else lies there is the user's
            shutil.rmtree(state, ignore_errors=True)
        with suppress(OSError):  # the lock while it is held: filelock tries again where a locked file was unlinked
            (states / "lock").unlink()
            states.rmdir()


def seal(state: Path, saved: Checksums) -> None:
    """Complete a state with the checksums of its files and of the checkpoints saved before; drop states before it."""
    sync_files(state)
    write_json(state / CHECKSUMS, {"state": checksums(state), "saved": saved})
    for older in _by_step(state.parent)[KEPT:]:
        shutil.rmtree(older)


def saved_before(state: Path | None) -> Checksums:
    """Return the checksums of the checkpoints that were saved before a state of `claimed`."""
    return {} if state is None else json.loads((state / CHECKSUMS).read_text(encoding="utf-8"))["saved"]


def digest(value: Any) -> str:
    """Return the SHA-256 of a value, including the numbers in its arrays, weights and dataclasses."""
    found = hashlib.sha256()
    for part in _bytes_of(value):
        found.update(part)
    return found.hexdigest()


@contextmanager
def _locked(path: Path, out: Path) -> Generator[None]:
    try:
        lock = FileLock(path).acquire(timeout=0)  # the system releases it when a process is killed
    except Timeout as error:
        given = f"Another process is training into {out}."
        raise GravlensError(given, "A folder holds one run.", "another out=, or wait until that run ends.") from error
    with lock:
        yield


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
        state = "damaged" if (out / MARKER).exists() else "missing"
        given = f"{out} holds another run: {names}, and the {MARKER} that would describe it is {state}."
    raise GravlensError(given, "A folder holds one run; nothing is overwritten.", "another out=, or move that folder.")


def _newest(states: Path) -> Path | None:
    found = _by_step(states)
    while found and (fault := _fault(found[0])):
        damaged, *found = found
        shutil.rmtree(damaged)
        what = f"that of step {_step(found[0])} is tried" if found else "the run begins again"
        warnings.warn(
            f"{states.parent}: the state of step {_step(damaged)} is not whole ({fault}); {what}.", stacklevel=5
        )
    return found[0] if found else None


def _by_step(states: Path) -> list[Path]:
    """Return the folders of states, the newest first."""
    return sorted(states.glob("checkpoint-*[0-9]"), key=_step, reverse=True)


def _step(state: Path) -> int:
    return int(state.name.rpartition("-")[2])


def _fault(state: Path) -> str | None:
    """Return what is wrong with a state, or with a checkpoint that was saved before it; None: nothing."""
    try:
        listed = json.loads((state / CHECKSUMS).read_text(encoding="utf-8"))
        own, saved = dict(listed["state"]), {name: dict(sums) for name, sums in listed["saved"].items()}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return f"{CHECKSUMS} is missing or damaged"
    for folder, wanted in {state: own, **{state.parent.parent / name: sums for name, sums in saved.items()}}.items():
        found = checksums(folder)
        # Trainer would read a file that was added to a state; in a checkpoint it may be the user's.
        for name in sorted({*wanted, *(found if folder == state else ())}):
            if found.get(name) != wanted.get(name):
                return f"{folder.name}/{name} is not as it was saved"
    return None


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
