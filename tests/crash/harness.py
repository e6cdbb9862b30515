"""Every writing system call of an operation fails once, and kills it once; the next call must end as a calm one does.

    LD_PRELOAD=… python -m crash.harness FOLDER [--every 7] [--at-random 10] [--only NAME …]

prints a line of JSON for each case; `cases` of this file runs it so. The process itself only forks: each child is one
run of one operation in a fresh copy of its folder. Outcomes, the worst of the disturbed call and the next one:

    right result   the disturbed call ends as a calm one, or was killed, and the next call ends as a calm one
    clear error    the disturbed call raises a GravlensError of one line, and the next call ends as a calm one
    traceback      any other exception, or no end
    wrong          a value or a file that is neither that of before nor the calm run's
    lost           a file is gone, something beside the operation's own files changed, or the next call fails
"""

import argparse
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
        kind, text = "clear error" if error.wanted and error.remedy and "\n" not in str(error) else "traceback", str(error)
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
# What differs between any two runs: durations, and the scratch folder that a part's states were read in.
VARYING = re.compile(rb'"seconds_per_step": [0-9.e-]+|/\.[\w-]+\.[a-z0-9_]{8}(?=/)')


def tree(folder: Path) -> dict[str, str]:
    """Digests of all visible files; hidden ones (scratch, resume states) and the system's temporary files are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != "tmp" and (str(name) in BYSTANDERS or not _hidden(name)):
            found[str(name)] = sha256(VARYING.sub(b"", path.read_bytes())).hexdigest()[:16]
    return found


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def faults(operation: Operation, now: Tree, before: Tree, calm: Tree) -> tuple[str, str] | None:
    """What may not be, at any time: (outcome, text), or None."""
    for name in BYSTANDERS:
        if now.get(name) != before[name]:
            return "lost", f"{name}, which is not the operation's, was changed"
    for name in before.keys() & calm.keys() - now.keys():
        if not operation.damaged or before[name] == calm[name]:
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
        first = self._run()
        for name in first.modules:  # children find imported what this one had to import
            with suppress(Exception):
                importlib.import_module(name)
        start = time.perf_counter()
        self.wanted = self._run()
        self.seconds, self.calm = time.perf_counter() - start, tree(self.root)
        assert self.wanted.kind == "value", f"{operation.name} fails undisturbed: {self.wanted.text}"
        again = self._run()
        varies = same(operation, tree(self.root), self.calm) or (again.text != self.wanted.text and "the value")
        assert not varies, f"{operation.name} varies: {varies}"
        assert len(again.calls) == len(self.wanted.calls), f"{operation.name} makes other calls each time"
        assert faults(operation, self.calm, self.before, self.calm) is None
        seen = " ".join(path for _, path in self.wanted.calls)
        unseen = [name for name, digest in self.calm.items() if self.before.get(name) != digest and Path(name).parts[0] not in seen]
        assert not unseen, f"the shim saw no call on {unseen}"

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
        if broken := faults(self.operation, now, self.before, self.calm):
            return broken[0], f"{broken[1]} ({end.kind}{f': {end.text}' if end.text else ''})"
        if end.kind == "value":
            differs = same(self.operation, now, self.calm) or (None if end.text == self.wanted.text else "another value")
            return ("right result", "") if differs is None else ("wrong", f"no error, and {differs}")
        following = self._call()
        if following.kind != "value":
            return "traceback" if following.kind == "traceback" else "lost", f"the next call: {following.text}"
        now = tree(self.root)
        differs = same(self.operation, now, self.calm) or (None if following.text == self.wanted.text else "another value")
        if differs is not None:
            return "wrong", f"the next call: {differs}"
        return ("right result", "") if end.kind == "killed" else ("clear error", end.text)

    def disturbed(self, every: int, modes: Sequence[Mode]) -> Iterator[dict[str, Any]]:
        """Every k-th call in each mode; errors come by turns."""
        for mode in modes:
            # in another rhythm for each mode, so that a sparse sample meets other calls
            for turn, n in enumerate(range(1 + mode % every, len(self.wanted.calls) + 1, every)):
                call, path = self.wanted.calls[n - 1]
                if mode is Mode.SHORT and "write" not in call and call not in ("sendfile", "copy_file_range"):
                    continue
                outcome, text = self.case(n=n, mode=mode, error=shim.ERRORS[turn % len(shim.ERRORS)])
                yield self._row(f"{mode.name.lower()} at {n} ({call} {path})", mode.name.lower(), outcome, text)

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
    command = [sys.executable, "-m", "crash.harness", str(home), *arguments]
    done = subprocess.run(
        command, env=shim.preloaded(home), cwd=home, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Print a line of JSON for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--at-random", type=int, default=0)
    parser.add_argument("--modes", default="fail,kill,full,short")
    given = parser.parse_args()
    from crash.operations import operations

    home = given.home.resolve()
    for operation in operations(home / "inputs"):
        if given.only and operation.name not in given.only:
            continue
        bench = Bench(operation, home)
        print(f"{operation.name}: {len(bench.wanted.calls)} calls, {bench.seconds:.2f} s", file=sys.stderr, flush=True)
        modes = [Mode[name.upper()] for name in given.modes.split(",") if name]
        for row in (*bench.disturbed(given.every, modes), *bench.at_random(given.at_random)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
