"""Reading through a store: what it lacks is read, here or by workers, and what it holds is put together."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import current_process
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from torch import nn

from gravlens.activations.fingerprint import check_same_content, fingerprint
from gravlens.activations.plan import Plan, Through, read_block
from gravlens.activations.positions import Query
from gravlens.activations.reader import Reader
from gravlens.activations.store import Shelf, find_view, query_key, view_writer
from gravlens.core.errors import GravlensError
from gravlens.core.files import map_tensor
from gravlens.core.progress import progress
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Resolved, changed_meanwhile, resolve
from gravlens.models.placement import Placement
from gravlens.models.swapping import open_each, precision_of
from gravlens.models.tokenizers import check_vocabulary

# Tokens of a worker's task, at least: so many that opening the checkpoint, whose time grows with its size as a token's
# does, stays below a tenth of the task (docs/scale.md).
TASK_TOKENS = {"cpu": 1 << 16}
TASK_TOKENS_ELSEWHERE = 1 << 22
ATTEMPTS = 3  # what was damaged is seen, and taken away, only when it is put together
T = TypeVar("T")
Blocks = tuple[tuple[tuple[Query, ...], tuple[int, ...]], ...]
_ONE_AT_A_TIME = Lock()  # of a process: two threads that open models undo each other's settings


@dataclass(frozen=True)
class Stored:
    """A store, and how what it lacks is read."""

    folder: Path
    through: Through
    placement: Placement

    def shelf(self, checkpoint: Checkpoint | Resolved, precision: str) -> Shelf:
        """Where the states of a checkpoint lie; a worker is given one that it resolves itself."""
        checkpoint = resolve(checkpoint, weights=False)
        how = (self.through, precision, *_releases(self.through))
        return Shelf(self.folder / "states" / fingerprint(checkpoint, how, self.folder / "digests")[:32])


def _releases(through: Through) -> Iterator[str]:
    """The libraries that compute states, by their minor release: another may compute them in another way."""
    for library in ("transformers", *(["transformer-lens"] if through == "bridge" else [])):
        yield f"{library} {'.'.join(version(library).split('.')[:2])}"


@dataclass(frozen=True, eq=False)
class Task:
    """What a store lacks of one checkpoint, or some blocks of it.

    Attributes:
        checkpoint: resolved where it is read in this process; a worker, whose disk may be another, resolves it itself.
        shelf: where its states go.
        blocks: prompts and the layers that are lacking.
        prefix: token ids that every prompt begins with.
        store: how the checkpoint is opened.
    """

    checkpoint: Checkpoint | Resolved
    shelf: Shelf
    blocks: Blocks
    prefix: tuple[int, ...]
    store: Stored


def read_through_store(
    plan: Plan, checkpoints: Sequence[Resolved], store: Stored, executor: Executor | None
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """States from a store's folder, memory-mapped, and the precisions that they were computed in.

    Raises:
        GravlensError: the store cannot be written, or loses what is written into it; what `run_all` raises.
    """
    rows: Sequence[Checkpoint | Resolved] = checkpoints
    if executor is not None:
        rows = [_sendable(checkpoint.checkpoint) for checkpoint in checkpoints]
        store = replace(store, folder=store.folder.absolute())
    precisions = [precision_of(checkpoint, store.placement) for checkpoint in checkpoints]
    pairs = zip(rows, precisions, strict=True)
    shelves = run_each([partial(store.shelf, *pair) for pair in pairs], executor, "digests")
    keys = [query_key(query) for query in plan.queries]
    question = hashlib.sha256(json.dumps([[s.folder.name for s in shelves], keys, plan.layers]).encode()).hexdigest()
    view = find_view(store.folder, question)
    for _ in range(ATTEMPTS if view is None else 0):
        if tasks := _lacking(plan, keys, dict(zip(shelves, rows, strict=True)), store):
            run_all(tasks, executor)
        view = _put_together(plan, keys, shelves, store.folder, question)
        if view is not None:
            break
    if view is not None:
        return view, set(precisions)
    raise GravlensError(
        f"The store {store.folder} does not hold what was just written into it.",
        "A store is a folder that nothing else writes into.",
        "another folder; is that disk sound?",
    )


def _lacking(
    plan: Plan, keys: Sequence[str], checkpoints: Mapping[Shelf, Checkpoint | Resolved], store: Stored
) -> list[Task]:
    """The tasks that complete a store; a checkpoint that is there under two names is read once."""
    tasks = []
    for shelf, checkpoint in checkpoints.items():
        missing, blocks = shelf.missing(keys, plan.layers), []
        for block in plan.blocks:
            if rows := [i for i in block if missing[i]]:
                layers = sorted({layer for i in rows for layer in missing[i]})
                blocks.append((tuple(plan.queries[i] for i in rows), tuple(layers)))
        if blocks:
            tasks.append(Task(checkpoint, shelf, tuple(blocks), plan.prefix, store))
    return tasks


def _put_together(
    plan: Plan, keys: Sequence[str], shelves: Sequence[Shelf], folder: Path, question: str
) -> np.ndarray | None:
    """The answer as one file, written file by file; None where something lacks."""
    width, n_layers, n_rows = plan.d_model, len(plan.layers), plan.ends[-1]
    lacks = len(shelves) * len(keys) * n_layers
    with view_writer(folder, question, (len(shelves), n_rows, n_layers, width)) as view:
        for number, shelf in enumerate(shelves):
            for prompt, layers, states in shelf.rows(keys, plan.layers):
                lacks -= len(layers)
                for row, state in zip(plan.rows(prompt), states, strict=True):
                    at = (number * n_rows + row) * n_layers
                    pieces = [(layers[0], state)] if layers == plan.layers else zip(layers, state, strict=True)
                    for layer, piece in pieces:
                        view.write((at + plan.layers.index(layer)) * width, piece)
        return None if lacks else map_tensor(view.finish(), "values")


# --- running tasks --------------------------------------------------------------------------------------------------
def run_all(tasks: Sequence[Task], executor: Executor | None) -> None:
    """Run tasks here, or submit them to an executor, whose workers write files and send nothing back.

    Raises:
        GravlensError: what a worker raised; a worker died.
    """
    if executor is not None:
        parts = [part for task in tasks for part in divided(task)]
        run_each([partial(run_rest, part) for part in parts], executor, "residuals")
        return
    with progress("residuals", total=sum(len(task.blocks) for task in tasks), unit="block") as bar:
        run_tasks(tasks, bar.update)


def divided(task: Task) -> list[Task]:
    """A checkpoint's blocks as tasks of their own where they are long; a last part that is short stays with another."""
    least = least_tokens(task.store.placement.device)
    tokens = [sum(query.end - len(task.prefix) for query in queries) for queries, _ in task.blocks]
    parts = part_sizes(tokens, least)
    ends = [sum(parts[: i + 1]) for i in range(len(parts))]
    return [replace(task, blocks=task.blocks[end - size : end]) for size, end in zip(parts, ends, strict=True)]


def least_tokens(device: str) -> int:
    """Tokens of a task, at least."""
    return TASK_TOKENS.get(device, TASK_TOKENS_ELSEWHERE)


def part_sizes(tokens: Sequence[int], least: int) -> list[int]:
    """How many blocks in turn make a task of at least so many tokens, given each block's own."""
    sizes, held = [0], 0
    for number, count in enumerate(tokens):
        if held >= least and sum(tokens[number:]) >= least:
            sizes.append(0)
            held = 0
        sizes[-1] += 1
        held += count
    return sizes


def run_rest(task: Task) -> None:
    """Run what lacks of a task now, which is little where a worker before this one was killed."""
    layers = sorted({layer for _, layers in task.blocks for layer in layers})
    keys = {query_key(query): query for queries, _ in task.blocks for query in queries}
    lacks = dict(zip(keys, map(set, task.shelf.missing(list(keys), layers)), strict=True))
    rest = [
        (queries, layers) for queries, layers in task.blocks if any(lacks[query_key(q)] & set(layers) for q in queries)
    ]
    if rest:
        resolved = resolve(task.checkpoint, weights=False)
        if task.store.shelf(resolved, precision_of(resolved, task.store.placement)) != task.shelf:
            raise changed_meanwhile(resolved)
        run_tasks([replace(task, checkpoint=resolved, blocks=tuple(rest))])


def run_tasks(tasks: Sequence[Task], tick: Callable[[], Any] = lambda: None) -> None:
    """Read what lacks and write it; one model is open at a time, and checkpoints' weights are swapped into it."""
    if not tasks:
        return
    store = tasks[0].store
    opened = open_each([task.checkpoint for task in tasks], through=store.through, placement=store.placement)
    for task, (checkpoint, model) in zip(tasks, opened, strict=True):
        check_same_content(resolve(task.checkpoint))
        check_vocabulary(checkpoint, model, [query.ids for queries, _ in task.blocks for query in queries])
        readers: dict[tuple[int, ...], Reader] = {}  # all blocks lack the same layers, mostly
        for queries, layers in task.blocks:
            if layers not in readers:
                readers[layers] = Reader(model, layers=layers, prefix=task.prefix)
            states = np.empty((sum(len(query.reads) for query in queries), len(layers), model.d_model), np.float32)
            rows = Plan(queries, layers, model.d_model, task.prefix, ()).rows
            for batch, found in read_block(readers[layers], queries):
                states[[row for i in batch for row in rows(i)]] = found
            task.shelf.put(states, queries=queries, layers=layers, checkpoint=checkpoint.described)
            tick()


# --- executors ------------------------------------------------------------------------------------------------------
def run_each(calls: Sequence[Callable[[], T]], executor: Executor | None, what: str) -> list[T]:
    """Results of calls, made here or by an executor's workers; what waits is cancelled however this ends.

    Of what `submit` returns only `result`, `done` and `cancel` are asked for, which jobs of submitit have too.

    Raises:
        GravlensError: what a call raised; a worker died.
    """
    if executor is None:
        return [call() for call in calls]
    jobs: list[Any] = []
    try:
        jobs += [executor.submit(_outcome, call) for call in calls]
        with progress(what, jobs, unit="task") as each:
            return [_sent_back(job.result()) for job in each]
    except GravlensError:
        raise
    except Exception as error:  # each executor has its own names for a worker that died
        raise GravlensError(
            f"A worker of {type(executor).__name__} ended ({(str(error) or type(error).__name__).splitlines()[0]}).",
            "Every task is run to its end; what was written before is whole and stays in the store.",
            "the same call again, with a new executor: it goes on where this one stopped.",
        ) from error
    finally:
        for job in jobs:
            with suppress(Exception):  # a job of Slurm that ended just now
                if not job.done():
                    job.cancel()


def _outcome(call: Callable[[], T]) -> T | GravlensError:
    """What a worker sends back: an error too, which not every executor hands on as it was raised."""
    with _ONE_AT_A_TIME:
        try:
            _check_not_forked()
            return call()
        except GravlensError as error:
            return error


def _check_not_forked() -> None:
    if type(current_process()).__name__ == "ForkProcess":  # where torch's threads do not live on: it would hang
        raise GravlensError(
            "A worker process was forked from one that runs torch.",
            "Workers are started anew.",
            'ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")).',
        )


def _sent_back(outcome: T | GravlensError) -> T:
    if isinstance(outcome, GravlensError):
        raise outcome
    return outcome


def _sendable(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint that a worker opens itself, wherever it was started."""
    if isinstance(checkpoint.source, nn.Module):
        raise GravlensError(
            f"{checkpoint.name} is {checkpoint.described}, and an executor was given.",
            "A worker opens its checkpoint itself.",
            "folders (model.save_pretrained), or no executor.",
        )
    here = Path(checkpoint.source)
    base = None if checkpoint.base is None else _sendable(checkpoint.base)
    source = here.absolute() if here.is_dir() else checkpoint.source
    return replace(checkpoint, source=source, base=base, template="own", tokenizer=None)  # prompts are tokens already
