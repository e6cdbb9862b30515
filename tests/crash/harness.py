"""Every writing system call of an operation fails once, and kills it once; the next call must end as a calm one does.

    LD_PRELOAD=… python -m crash FOLDER [--at-most 7] [--at-random 10] [--only NAME …]

prints a line of JSON for each case; `cases` of this file runs it so. The process itself only forks: each child is one
run of one operation in a fresh copy of its folder. Outcomes, the worst of the disturbed call and the next one:

    right result   the disturbed call ends as a calm one, or was killed, and the next call ends as a calm one
    clear error    the disturbed call raises a GravlensError of one line, and the next call ends as a calm one
    traceback      any other exception, or no end
    wrong          a value or a file that is neither that of before nor the calm run's
    lost           a file is gone, something beside the operation's own files changed, or the next call fails
"""

import gc
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from crash import shim
from crash.shim import Mode

OUTCOMES = ("right result", "clear error", "traceback", "wrong", "lost")
PATIENCE = 60.0  # seconds that a child may take
Tree = Mapping[str, str]


@dataclass(frozen=True)
class Operation:
    """Something that writes below a folder.

    Attributes:
        area: row of the table.
        name: unique.
        run: the call; what it returns is compared by its `repr`.
        before: fills the folder, once.
        whole: patterns of folders that are complete or absent at any time.
        spared: patterns of files that only save time, and may be missing.
        damaged: what the folder held before is damaged where the call changes it, so it may be gone in between.
    """

    area: str
    name: str
    run: Callable[[Path], Any]
    before: Callable[[Path], Any] = lambda folder: None
    whole: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    damaged: bool = False


@dataclass(frozen=True)
class End:
    """How a child ended: what it returned or raised (`kind` among value, clear error, traceback, killed)."""

    kind: str
    text: str = ""
    calls: Sequence[tuple[str, str]] = ()
    modules: Sequence[str] = field(default=(), repr=False)


# -- one run -----------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], Any], *, root: Path, kill_after: float = PATIENCE, **armed: Any) -> End:
    """Run in a child process and return how it ended."""
    reading, writing = os.pipe()
    if not (number := os.fork()):
        os.close(reading)
        _child(work, root, armed, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        ready = select.select([pipe], [], [], kill_after)[0]
        if not ready:
            os.kill(number, signal.SIGKILL)
        said = pipe.read()
    os.waitpid(number, 0)
    if said:
        return End(**json.loads(said))
    return End("killed") if ready or kill_after < PATIENCE else End("traceback", f"no end within {PATIENCE:.0f} s")


def _child(work: Callable[[], Any], root: Path, armed: Mapping[str, Any], writing: int) -> None:
    code = 1
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        tempfile.tempdir = str(root / "tmp")
        warnings.simplefilter("ignore")
        end = _ended(work, root, armed)
        os.write(writing, json.dumps(end).encode()) if len(json.dumps(end)) < 4096 else _all(writing, end)
        code = 0
    finally:
        os._exit(code)


def _all(writing: int, end: Mapping[str, Any]) -> None:
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(json.dumps(end).encode())


def _ended(work: Callable[[], Any], root: Path, armed: Mapping[str, Any]) -> dict[str, Any]:
    from gravlens.core.errors import GravlensError

    shim.arm(root, **armed)
    try:
        kind, text = "value", repr(work())
    except GravlensError as error:
        kind, text = (
            "clear error" if error.wanted and error.remedy and "\n" not in str(error) else "traceback",
            str(error),
        )
    except BaseException as error:
        kind, text = "traceback", f"{type(error).__name__}: {error}"
    return {"kind": kind, "text": text, "calls": shim.disarm(), "modules": [] if armed else sorted(sys.modules)}


# -- what lies in a folder ---------------------------------------------------------------------------------------------

# Beside every operation: a neighbour's checkpoint, hidden files, a file in a folder of a usual name.
BYSTANDERS = {
    "neighbour/model.safetensors": b"weights",
    "neighbour/states/0123456789abcdef.safetensors": b"states",
    "checkpoint-2/notes.txt": b"mine",
    ".env": b"KEY=1",
    ".git/HEAD": b"ref",
    "notes.md": b"notes",
}
# What differs between any two runs: durations, the scratch folder that a part's states were read in, and the checksums
# of files that tell of either; the content that a checksum is of is compared itself.
VARYING = re.compile(rb'"seconds_per_step": [0-9.e-]+|/\.[\w-]+\.[a-z0-9_]{8}(?=/)|(?<=": ")[0-9a-f]{64}(?=")')


def tree(folder: Path) -> dict[str, str]:
    """Digests of all visible files; of hidden ones (scratch, resume states) only those of bystanders."""
    return {name: digest for name, digest in _all_files(folder).items() if name in BYSTANDERS or not _hidden(name)}


def _all_files(folder: Path) -> dict[str, str]:
    """Digests of all files, but for the system's temporary ones."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(name): sha256(VARYING.sub(b"", path.read_bytes())).hexdigest()[:16]
        for name, path in files.items()
        if name.parts[0] != "tmp"
    }


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def faults(operation: Operation, every: Tree, before: Tree, calm: Tree) -> tuple[str, str] | None:
    """What may not be in a folder at any time: (outcome, text), or None."""
    now = {name: digest for name, digest in every.items() if name in BYSTANDERS or not _hidden(name)}
    kept = {digest for name, digest in every.items() if _hidden(name)}  # set aside by a call that was killed
    for name in BYSTANDERS:
        if now.get(name) != before[name]:
            return "lost", f"{name}, which is not the operation's, was changed"
    for name in before.keys() & calm.keys() - now.keys():
        if before[name] not in kept and not (operation.damaged and before[name] != calm[name]):
            return "lost", f"{name} is gone"
    for name, digest in now.items():
        if digest not in (before.get(name), calm.get(name)):
            return "wrong", f"{name} is neither what it was nor what it will be"
    for pattern in operation.whole:
        folders = {"/".join(Path(name).parts[: pattern.count("/") + 1]) for name in now}
        for folder in (one for one in folders if Path(one).match(pattern)):
            inside, was, will = ({n: one[n] for n in one if n.startswith(f"{folder}/")} for one in (now, before, calm))
            if inside not in (was, will):
                return "wrong", f"the folder {folder} is neither what it was nor complete"
    return None


def same(operation: Operation, now: Tree, calm: Tree) -> str | None:
    """The first file in which two folders differ; None where there is none."""
    for name in sorted({*now, *calm}):
        if now.get(name) != calm.get(name) and not (
            name not in now and any(Path(name).match(pattern) for pattern in operation.spared)
        ):
            return f"{name} differs from the calm run's"
    return None


# -- cases -------------------------------------------------------------------------------------------------------------


class Bench:
    """An operation with its folder as it was before, and with what a calm run makes of it."""

    def __init__(self, operation: Operation, home: Path) -> None:
        self.operation, self.root, self.template = operation, home / "case", home / "template"
        shutil.rmtree(self.root, ignore_errors=True)
        for name, content in BYSTANDERS.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(content)
        (self.root / "tmp").mkdir()
        made = forked(lambda: operation.before(self.root), root=self.root)
        assert made.kind == "value", f"{operation.name} cannot be prepared: {made.text}"
        shutil.rmtree(self.template, ignore_errors=True)
        self.root.rename(self.template)
        self.before = tree(self.template)
        first, found = self._run(), tree(self.root)
        assert first.kind == "value", f"{operation.name} fails undisturbed: {first.text}"
        for name in first.modules:  # children find imported what this one had to import
            with suppress(Exception):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # Trainer collects garbage: a child would walk, and copy, all that is imported
        start = time.perf_counter()
        self.wanted = self._run()
        self.seconds, self.calm = time.perf_counter() - start, tree(self.root)
        varies = same(operation, found, self.calm) or (first.text != self.wanted.text and "the value")
        assert not varies, f"{operation.name} varies: {varies}"
        assert len(first.calls) == len(self.wanted.calls), f"{operation.name} makes other calls each time"
        assert faults(operation, self.calm, self.before, self.calm) is None
        self._check_seen()

    def _check_seen(self) -> None:
        """Fail unless for each changed file a call on it was counted, or the renaming of a folder above it."""
        paths = {path for _, path in self.wanted.calls}
        renamed = {Path(path) for call, path in self.wanted.calls if call.startswith("rename")}
        changed = [name for name, digest in self.calm.items() if self.before.get(name) != digest]
        unseen = [name for name in changed if name not in paths and not renamed & {*Path(name).parents}]
        assert not unseen, f"{self.operation.name}: no call on {unseen} was counted"

    def _run(self, **further: Any) -> End:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.template, self.root, symlinks=True)
        return self._call(**further)

    def _call(self, **further: Any) -> End:
        return forked(lambda: self.operation.run(self.root), root=self.root, **further)

    def case(self, **further: Any) -> tuple[str, str]:
        """Outcome and text of one disturbed run and the one after it."""
        end = self._run(**further)
        now = tree(self.root)
        if end.kind == "traceback":
            return "traceback", end.text
        if broken := faults(self.operation, _all_files(self.root), self.before, self.calm):
            return broken[0], f"{broken[1]} ({end.kind}{f': {end.text}' if end.text else ''})"
        if end.kind == "value":
            differs = same(self.operation, now, self.calm) or (
                None if end.text == self.wanted.text else "another value"
            )
            return ("right result", "") if differs is None else ("wrong", f"no error, and {differs}")
        following = self._call()
        if following.kind != "value":
            return "traceback" if following.kind == "traceback" else "lost", f"the next call: {following.text}"
        now = tree(self.root)
        differs = same(self.operation, now, self.calm) or (
            None if following.text == self.wanted.text else "another value"
        )
        if differs is not None:
            return "wrong", f"the next call: {differs}"
        return ("right result", "") if end.kind == "killed" else ("clear error", end.text)

    def disturbed(self, at_most: int, modes: Sequence[Mode]) -> Iterator[dict[str, Any]]:
        """Yield at most so many evenly spaced calls in each mode; the error numbers alternate."""
        n_calls = len(self.wanted.calls)
        for mode in modes:
            numbers = range(1, n_calls + 1)
            if mode is Mode.SHORT:
                numbers = [n for n in numbers if "write" in self.wanted.calls[n - 1][0]]
            step = max(1.0, len(numbers) / at_most)
            # in another rhythm for each mode, so that a sparse sample meets other calls
            chosen = [numbers[int((turn + mode / 5) * step)] for turn in range(min(at_most, len(numbers)))]
            for turn, n in enumerate(chosen):
                outcome, text = self.case(n=n, mode=mode, error=shim.ERRORS[turn % len(shim.ERRORS)])
                call, path = self.wanted.calls[n - 1]
                yield self._row(
                    f"{mode.name.lower()} at {n} of {n_calls} ({call} {path})", mode.name.lower(), outcome, text
                )

    def at_random(self, kills: int) -> Iterator[dict[str, Any]]:
        """Killed at random instants."""
        rng = random.Random(0)
        for _ in range(kills):
            after = rng.uniform(0.02, 1.05 * self.seconds)
            outcome, text = self.case(kill_after=after)
            yield self._row(f"killed after {after:.3f} s", "random kill", outcome, text)

    def _row(self, case: str, kind: str, outcome: str, text: str) -> dict[str, Any]:
        done = self.operation
        return {"area": done.area, "operation": done.name, "kind": kind, "case": case, "outcome": outcome, "text": text}


def cases(home: Path, *arguments: str, timeout: float = 3600) -> list[dict[str, Any]]:
    """Run this file with the library preloaded and return its rows."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "crash", str(home), *arguments]
    done = subprocess.run(
        command, env=shim.preloaded(home), cwd=home, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
