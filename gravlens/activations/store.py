"""Content-addressed on-disk cache of hidden states: hits are reused, corrupt files are moved aside and recomputed.

    gravlens_store.json                                                           marks the folder as a store
    states/<fingerprint of a checkpoint>/<block>.<header>.<sha256>.safetensors    states of some prompts at some layers
    views/<request>.<sha256>.safetensors                                          one whole result, memory-mapped
    digests/<files>.json                                                          digests of weights, by their files
    corrupt/                                                                      what failed its checksum

Files are written under a temporary name and renamed, and a file's name holds the SHA-256 of its content. So a killed
run leaves complete files and scratch files, several processes can write at once, and corruption is detected. The header
has a checksum of its own, because headers alone decide what is missing. Only files with names of these forms, in these
subfolders, are ever removed: a store may share its folder with checkpoints.
"""

import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import current_process
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from gravlens.activations.fingerprint import check_same_content, fingerprint
from gravlens.activations.positions import Query
from gravlens.activations.reader import Plan, Reader, Through, all_finite, read_block
from gravlens.core.errors import GravlensError, reading, said
from gravlens.core.files import (
    TensorWriter,
    map_tensor,
    meta_of,
    sha256_of,
    tensor_bytes,
    write_atomically,
    write_json,
    writing,
)
from gravlens.core.progress import progress
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Resolved, changed_meanwhile, resolve
from gravlens.history.weight_files import remark_on_same
from gravlens.models.placement import Placement
from gravlens.models.swapping import check_one_precision, open_each, precision_of
from gravlens.models.tokenizers import check_vocabulary

KIND = "states"
MARKER = "gravlens_store.json"
FOLDER = re.compile("[0-9a-f]{32}")  # of the states of a checkpoint
FILE = re.compile(r"([0-9a-f]{16}\.[0-9a-f]{16}|[0-9a-f]{32})\.[0-9a-f]{64}\.safetensors")
SCRATCH = re.compile(rf"\.({FILE.pattern}|[0-9a-f]{{32}})\.[0-9a-f]{{8}}")
# Tokens of an executor's task, at least: below that, opening the checkpoint takes more than a tenth of the task. Both
# times grow with the size of the model, so the number serves all of them (docs/scale.md).
TASK_TOKENS = {"cpu": 1 << 16}
TASK_TOKENS_ELSEWHERE = 1 << 22
UNREADABLE = "The files of a store must be readable."
ATTEMPTS = 3  # a corrupt file is only found, and moved aside, when the result is assembled
T = TypeVar("T")
States: TypeAlias = Float[np.ndarray, "row layer d_model"]
Blocks = tuple[tuple[tuple[Query, ...], tuple[int, ...]], ...]  # prompts, and layers to read of them
_ONE_AT_A_TIME = Lock()  # opening a model changes settings of the whole process: two threads would undo each other's


@lru_cache(maxsize=1 << 16)  # every checkpoint asks for the same prompts
def query_key(query: Query) -> str:
    """Hash a prompt's tokens and read positions."""
    return _sha256(query.ids, query.reads)


def _sha256(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


# --- states of one checkpoint ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class BlockFile:
    """Header of one file of states: keys of its prompts in the order of its rows, and the rows of each prompt."""

    path: Path
    queries: tuple[str, ...]
    rows: tuple[int, ...]
    layers: tuple[int, ...]
    checkpoint: str  # the source that first wrote it: the folder is named by content


@dataclass(frozen=True)
class StateFolder:
    """States of one checkpoint, read in one way."""

    folder: Path

    def files(self) -> list[BlockFile]:
        """Read the headers of all files; corrupt ones are moved aside with a warning."""
        return [one for path in sorted(_own(self.folder, FILE)) if (one := read_header(path))]

    def missing(self, queries: Sequence[str], layers: Sequence[int]) -> list[tuple[int, ...]]:
        """Return, for each prompt, the layers that no file holds."""
        held: dict[str, set[int]] = {}
        for file in self.files():
            for query in file.queries:
                held.setdefault(query, set()).update(file.layers)
        return [tuple(layer for layer in layers if layer not in held.get(query, ())) for query in queries]

    def missing_of(self, blocks: Blocks) -> Blocks:
        """Restrict blocks to the prompts and layers that no file holds."""
        wanted = sorted({layer for _, layers in blocks for layer in layers})
        absent = iter(self.missing([query_key(q) for queries, _ in blocks for q in queries], wanted))
        found = []
        for queries, layers in blocks:
            gaps = [(query, set(layers) & set(next(absent))) for query in queries]
            if rest := tuple(query for query, gap in gaps if gap):
                # All of the block's missing layers for all of these prompts: one pass, one file.
                found.append((rest, tuple(sorted(set.union(*(gap for _, gap in gaps))))))
        return tuple(found)

    def put(self, states: States, *, queries: Sequence[Query], layers: Sequence[int], checkpoint: str) -> None:
        """Write one file."""
        keys, rows = [query_key(query) for query in queries], [len(query.reads) for query in queries]
        meta = {"queries": keys, "rows": rows, "layers": list(layers), "checkpoint": checkpoint}
        content = tensor_bytes(KIND, {"states": states}, meta)
        digests = (_sha256(keys, list(layers))[:16], _header_digest(content), hashlib.sha256(content).hexdigest())
        write_atomically(self.folder / f"{'.'.join(digests)}.safetensors", content)

    def rows(self, queries: Sequence[str], layers: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...], States]]:
        """Yield (index of the prompt, layers, its rows), each once; corrupt files yield nothing."""
        numbers: dict[str, list[int]] = {}
        for number, query in enumerate(queries):
            numbers.setdefault(query, []).append(number)
        left = {query: set(layers) for query in numbers}
        for file in self.files():
            needed = any(left.get(query, set()) & set(file.layers) for query in file.queries)
            # A corrupt file yields nothing: the caller counts what it got, and reads the rest again.
            if not needed or (states := map_verified(file.path, "states")) is None:
                continue
            for query, end, count in zip(file.queries, np.cumsum(file.rows).tolist(), file.rows, strict=True):
                # Two runs may have stored the same states: each is yielded once.
                if new := tuple(layer for layer in file.layers if layer in left.get(query, ())):
                    left[query] -= set(new)
                    columns = [file.layers.index(layer) for layer in new]
                    for number in numbers[query]:
                        yield number, new, states[end - count : end, columns]


# --- corruption -----------------------------------------------------------------------------------------------------
def read_header(path: Path) -> BlockFile | None:
    """Read a file's header and verify its checksum; a corrupt file is moved aside with a warning."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
    except FileNotFoundError:
        return None  # another process has removed it
    except OSError as error:  # too many open files, no permission, a stale handle: no sign of damage
        warnings.warn(f"{path} could not be read ({error.strerror}); its states are computed again.", stacklevel=2)
        return None
    if _header_digest(start) != path.name.split(".")[1]:
        return _set_aside(path)
    meta = meta_of(start, path, KIND)
    queries, rows, layers = (tuple(meta[key]) for key in ("queries", "rows", "layers"))
    return BlockFile(path, queries, rows, layers, meta["checkpoint"])


def _header_digest(content: bytes) -> str:
    return hashlib.sha256(content[: 8 + int.from_bytes(content[:8], "little")]).hexdigest()[:16]


def map_verified(path: Path, name: str) -> np.ndarray | None:
    """Memory-map a tensor of a file after verifying its checksum; a corrupt file is moved aside with a warning."""
    try:
        if is_corrupt(path):
            return _set_aside(path)
        with suppress(OSError):  # a file of another user
            os.utime(path)  # time of last use, for `prune_store`
        return map_tensor(path, name)
    except FileNotFoundError:
        return None  # another process has removed it
    except OSError as error:  # it may be read the next time
        given = f"{path} cannot be read ({error.strerror or error})."
        raise GravlensError(given, UNREADABLE, "its permissions, or another store.") from error


def is_corrupt(path: Path) -> bool:
    """Compare a file's content with the checksum in its name, and look for states that are not finite."""
    if sha256_of(path) != path.name.split(".")[-2]:
        return True
    try:  # states that are not finite are not written, but earlier versions did not look
        return not all_finite(map_tensor(path, "values" if path.parent.name == "views" else KIND))
    except (ValueError, LookupError, TypeError, OverflowError, MemoryError):  # its checksum is right, its form is not
        return True


def _set_aside(path: Path) -> None:
    """Move a file whose content was read and is wrong into `corrupt/`."""
    warnings.warn(f"{path} is corrupt or not finite: it is moved to corrupt/, its states recomputed.", stacklevel=3)
    store = path.parents[1] if path.parent.name == "views" else path.parents[2]
    with writing(store / "corrupt"), suppress(FileNotFoundError):  # another process has moved it
        (store / "corrupt").mkdir(exist_ok=True)
        os.replace(path, store / "corrupt" / path.name)


# --- reading through a store ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Store:
    """A store, and how missing states are computed."""

    folder: Path
    through: Through
    placement: Placement

    def of(self, checkpoint: Checkpoint | Resolved, precision: str) -> StateFolder:
        """Return the folder for the states of a checkpoint, named by its fingerprint."""
        checkpoint = resolve(checkpoint, weights=False)
        # Another minor release of a library may compute other states.
        libraries = ("transformers", *(["transformer-lens"] if self.through == "bridge" else []))
        releases = (f"{library} {'.'.join(version(library).split('.')[:2])}" for library in libraries)
        key = fingerprint(checkpoint, (self.through, precision, *releases), self.folder / "digests")
        return StateFolder(self.folder / "states" / key[:32])


@dataclass(frozen=True, eq=False)
class Task:
    """Blocks of prompts to read of one checkpoint, and where and how."""

    checkpoint: Checkpoint | Resolved  # a worker, which may have another disk, resolves it itself
    states: StateFolder
    blocks: Blocks
    prefix: tuple[int, ...]
    store: Store


def read_through_store(
    plan: Plan, checkpoints: Sequence[Resolved], store: Store, executor: Executor | None
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """Return states, memory-mapped, and the precisions that they were computed in."""
    mark_store(store.folder)
    sources: Sequence[Checkpoint | Resolved] = checkpoints
    if executor is not None:
        sources = [_sendable(checkpoint.checkpoint) for checkpoint in checkpoints]
        store = replace(store, folder=store.folder.absolute())
    precisions = [precision_of(checkpoint, store.placement) for checkpoint in checkpoints]
    check_one_precision({one.name: precision for one, precision in zip(checkpoints, precisions, strict=True)})
    calls = [partial(store.of, *pair) for pair in zip(sources, precisions, strict=True)]
    folders = run_each(calls, executor, "digests")  # by workers: all weights are read for it
    keys = [query_key(query) for query in plan.queries]
    request = _sha256([states.folder.name for states in folders], keys, plan.layers)
    blocks = tuple((tuple(plan.queries[i] for i in block), plan.layers) for block in plan.blocks)
    views = [path for path in _own(store.folder / "views", FILE) if path.name.startswith(request)]
    found = (map_verified(path, "values") for path in sorted(views))
    view = next((one for one in found if one is not None), None)
    pairs = zip(checkpoints, folders, strict=True)
    remark_on_same({checkpoint.name: states.folder.name for checkpoint, states in pairs}, "weights")
    unique = dict(zip(folders, sources, strict=True))  # one checkpoint under two names is read once
    for _ in range(ATTEMPTS if view is None else 0):
        tasks = [Task(one, states, states.missing_of(blocks), plan.prefix, store) for states, one in unique.items()]
        run_all([task for task in tasks if task.blocks], executor)
        if (view := _assemble(plan, keys, folders, store.folder, request)) is not None:
            break
    if view is None:
        given = f"The store {store.folder} does not hold what was just written into it."
        raise GravlensError(given, "No other program may write into it.", "another folder, and check that disk.")
    return view, set(precisions)


def _assemble(
    plan: Plan, keys: Sequence[str], folders: Sequence[StateFolder], store: Path, request: str
) -> np.ndarray | None:
    """Copy states into one file and memory-map it; None where some are missing."""
    width, n_layers, n_rows = plan.d_model, len(plan.layers), plan.ends[-1]
    missing, shape = len(folders) * len(keys) * n_layers, (len(folders), n_rows, n_layers, width)
    with writing(store), TensorWriter(store / "views", request, "view", "values", shape, {}) as view:
        for number, folder in enumerate(folders):
            for prompt, layers, states in folder.rows(keys, plan.layers):
                missing -= len(layers)
                for row, state in zip(plan.rows(prompt), states, strict=True):
                    at = (number * n_rows + row) * n_layers
                    # One write for a row with all layers, the usual case; with some of them, one for each layer.
                    pieces = [(layers[0], state)] if layers == plan.layers else zip(layers, state, strict=True)
                    for layer, piece in pieces:
                        view.write((at + plan.layers.index(layer)) * width, piece)
        return None if missing else map_tensor(view.finish(), "values")


# --- tasks ----------------------------------------------------------------------------------------------------------
def run_all(tasks: Sequence[Task], executor: Executor | None) -> None:
    """Run tasks here, or submit them to an executor; its workers write files and return nothing."""
    if executor is not None:
        run_each([partial(resume, part) for task in tasks for part in divided(task)], executor, "residuals")
    elif tasks:
        with progress("residuals", total=sum(len(task.blocks) for task in tasks), unit="block") as bar:
            run_tasks(tasks, bar.update)


def divided(task: Task) -> list[Task]:
    """Split a task of many tokens; no part is shorter than `least_tokens`."""
    tokens = [sum(query.end - len(task.prefix) for query in queries) for queries, _ in task.blocks]
    sizes, rest = part_sizes(tokens, least_tokens(task.store.placement.device)), iter(task.blocks)
    return [replace(task, blocks=tuple(islice(rest, size))) for size in sizes]


def least_tokens(device: str) -> int:
    """Return the least number of tokens of a task."""
    return TASK_TOKENS.get(device, TASK_TOKENS_ELSEWHERE)


def part_sizes(tokens: Sequence[int], least: int) -> list[int]:
    """Return how many consecutive blocks make each task, given the tokens of each block."""
    sizes, held = [0], 0
    for number, count in enumerate(tokens):
        if held >= least and sum(tokens[number:]) >= least:
            sizes.append(0)
            held = 0
        sizes[-1] += 1
        held += count
    return sizes


def resume(task: Task) -> None:
    """Run what is still missing of a task: little, if an earlier worker was killed at it."""
    if blocks := task.states.missing_of(task.blocks):
        resolved = resolve(task.checkpoint, weights=False)
        # The driver named the folder by a digest: a checkpoint written since then would fill it with other states.
        if task.store.of(resolved, precision_of(resolved, task.store.placement)) != task.states:
            raise changed_meanwhile(resolved)
        run_tasks([replace(task, checkpoint=resolved, blocks=blocks)])


def run_tasks(tasks: Sequence[Task], tick: Callable[[], Any] = lambda: None) -> None:
    """Read and write states, with one model open at a time."""
    store = tasks[0].store
    opened = open_each([task.checkpoint for task in tasks], through=store.through, placement=store.placement)
    for task, (checkpoint, model) in zip(tasks, opened, strict=True):
        check_same_content(resolve(task.checkpoint))
        check_vocabulary(checkpoint, model, [query.ids for queries, _ in task.blocks for query in queries])
        readers: dict[tuple[int, ...], Reader] = {}  # a reader keeps the prefix's keys and values
        for queries, layers in task.blocks:
            if layers not in readers:
                of = f"{checkpoint.name} ({checkpoint.described})"
                readers[layers] = Reader(model, layers=layers, prefix=task.prefix, of=of)
            plan = Plan(queries, layers, model.d_model, task.prefix, ())
            states = np.empty((plan.ends[-1], len(layers), model.d_model), np.float32)
            for batch, found in read_block(readers[layers], queries):
                states[[row for i in batch for row in plan.rows(i)]] = found
            task.states.put(states, queries=queries, layers=layers, checkpoint=checkpoint.described)
            tick()


# --- executors ------------------------------------------------------------------------------------------------------
def run_each(calls: Sequence[Callable[[], T]], executor: Executor | None, what: str) -> list[T]:
    """Run calls here or on an executor's workers; pending calls are cancelled on any error or interrupt."""
    if executor is None:
        return [call() for call in calls]
    jobs: list[Any] = []  # used are `result`, `done` and `cancel` only, which submitit's have too
    try:
        jobs += [executor.submit(_outcome, call) for call in calls]
        with progress(what, jobs, unit="task") as each:
            return [_raised(job.result()) for job in each]
    except GravlensError:
        raise
    except Exception as error:  # every executor has its own exceptions for a worker that died
        given = f"A worker of {type(executor).__name__} ended ({said(error)})."
        wanted = "All workers must live until their tasks are done; complete files stay in the store."
        raise GravlensError(given, wanted, "the same call with a new executor: it resumes.") from error
    finally:
        for job in jobs:
            with suppress(Exception):  # a Slurm job that has just ended cannot be cancelled
                if not job.done():
                    job.cancel()


def _outcome(call: Callable[[], T]) -> T | GravlensError:
    """Return a worker's error like a result: submitit would raise it as an exception of its own."""
    with _ONE_AT_A_TIME:
        if type(current_process()).__name__ == "ForkProcess":  # torch's thread pool does not survive fork: deadlock
            remedy = 'ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")).'
            return GravlensError("A worker was forked from a process that runs torch.", "Spawn workers.", remedy)
        try:
            return call()
        except GravlensError as error:
            return error


def _raised(outcome: T | GravlensError) -> T:
    if isinstance(outcome, GravlensError):
        raise outcome
    return outcome


def _sendable(checkpoint: Checkpoint) -> Checkpoint:
    """Make a checkpoint's paths absolute and drop its tokenizer: workers get token ids."""
    if isinstance(checkpoint.source, nn.Module):
        given = f"{checkpoint.name} is {checkpoint.described}, and an executor was given."
        raise GravlensError(given, "Workers open folders.", "model.save_pretrained(folder), or no executor.")
    here = Path(checkpoint.source)
    base = None if checkpoint.base is None else _sendable(checkpoint.base)
    source = here.absolute() if here.is_dir() else checkpoint.source
    return replace(checkpoint, source=source, base=base, template="own", tokenizer=None, chat_template_kwargs={})


# --- maintenance ----------------------------------------------------------------------------------------------------
def _own(folder: Path, pattern: re.Pattern[str]) -> Iterator[Path]:
    """Files of a folder that gravlens named; nothing else in it is read or removed."""
    with reading(folder, UNREADABLE, "its permissions, or another store."):
        return iter([path for path in folder.glob("*") if pattern.fullmatch(path.name) and path.is_file()])


def _state_folders(store: Path) -> list[Path]:
    with reading(store, UNREADABLE, "its permissions, or another store."):
        return sorted(one for one in (store / "states").glob("*") if FOLDER.fullmatch(one.name))


def _written(folder: Path, pattern: re.Pattern[str], *, corrupt: bool = False) -> list[Path]:
    """Files of a store; it may share its folder with checkpoints, a .git and an .env."""
    places = [*_state_folders(folder), folder / "views", folder / "digests", *([folder / "corrupt"] if corrupt else [])]
    # A link leads out of the store, perhaps into another one.
    own = [one for one in places if not (one.is_symlink() or (one.parent.name == "states" and one.parent.is_symlink()))]
    return [path for place in own for path in _own(place, pattern)]


def mark_store(folder: Path) -> None:
    """Mark a folder as a store."""
    with writing(folder, Exception):
        if not (folder / MARKER).exists():
            write_json(folder / MARKER, {"gravlens": "activation cache", "layout": 1})


def check_store(folder: Path) -> Path:
    """Return a folder if it is a store, else raise: what is removed in it must be gravlens'."""
    if not os.path.isfile(folder / MARKER):  # unlike Path.is_file it raises nothing
        given, wanted = f"{folder} is not an activation cache.", f"A cache holds {MARKER} since its first use."
        raise GravlensError(given, wanted, "the folder that was given as --store, or as store= of cache_residuals.")
    return folder


def list_store(folder: Path) -> pd.DataFrame:
    """List a store: one row for each checkpoint that was read in one way, and one for the assembled results.

    Columns: `states` (the folder's name), `checkpoint` (source when it was first read), `prompts`, `layers`, `files`,
    `mib`, `used` (time of last write or use).
    """
    rows = []
    for states in _state_folders(check_store(folder)):
        if files := StateFolder(states).files():
            prompts = {query for file in files for query in file.queries}
            layers = {layer for file in files for layer in file.layers}
            counts = {"prompts": len(prompts), "layers": len(layers), **_sizes([file.path for file in files])}
            rows.append({"states": states.name, "checkpoint": files[0].checkpoint, **counts})
    if views := list(_own(folder / "views", FILE)):
        rows.append({"states": "views", "checkpoint": "assembled results, made again on demand", **_sizes(views)})
    return pd.DataFrame(rows, columns=["states", "checkpoint", "prompts", "layers", "files", "mib", "used"])


def _sizes(paths: Sequence[Path]) -> dict[str, Any]:
    stats = [path.stat() for path in paths]
    used = pd.Timestamp(max(stat.st_mtime for stat in stats), unit="s").floor("s")
    return {"files": len(stats), "mib": sum(stat.st_size for stat in stats) / 2**20, "used": used}


def verify_store(folder: Path) -> dict[Path, str]:
    """Verify all checksums: file -> `corrupt`, or why it cannot be read. Nothing is moved or deleted."""
    found = {path: _fault(path) for path in sorted(_written(check_store(folder), FILE))}
    return {path: fault for path, fault in found.items() if fault}


def _fault(path: Path) -> str:
    try:
        return "corrupt" if is_corrupt(path) else ""
    except FileNotFoundError:
        return ""  # another process has removed it
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def prune_store(folder: Path, *, unused_days: float | None = None, dry: bool = False) -> list[Path]:
    """Delete corrupt files, assembled results, and scratch files of killed runs that are an hour old.

    With `unused_days`, states too that were not written or used for this long; `dry` only returns the files.
    """
    now, files = time.time(), _written(check_store(folder), FILE)
    found = {*_written(folder, FILE, corrupt=True)} - {*files}
    found |= {path for path in files if path.parent.name == "views" or _fault(path) == "corrupt"}
    # Younger scratch files may be another process's, which is still writing.
    ages = [(_written(folder, SCRATCH), 3600.0)] + ([] if unused_days is None else [(files, 86400 * unused_days)])
    for paths, age in ages:
        found |= {path for path in paths if path.stat().st_mtime < now - age}
    with ExitStack() as errors:  # one that cannot be deleted is an error once the others are
        for path in () if dry else sorted(found):
            errors.enter_context(writing(path))
            errors.callback(path.unlink, missing_ok=True)
    return sorted(found)
