"""Reading through a store: what it lacks is read, here or by workers, and what it holds is put together."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn
from tqdm.auto import tqdm

from gravlens.checkpoints import Checkpoint
from gravlens.errors import GravlensError
from gravlens.fingerprints import fingerprint
from gravlens.passes import Reader
from gravlens.placement import Placement
from gravlens.positions import Query
from gravlens.readings import Plan, Through, read_block
from gravlens.residual_store import Shelf, find_view, query_key, view_writer
from gravlens.swapping import open_each, precision_of
from gravlens.tokenizer import check_vocabulary


@dataclass(frozen=True)
class Stored:
    """A store, and how what it lacks is read."""

    folder: Path
    through: Through
    placement: Placement

    def shelf(self, checkpoint: Checkpoint, precision: str) -> Shelf:
        """Where the states of a checkpoint lie."""
        how = (self.through, precision)
        return Shelf(self.folder / "states" / fingerprint(checkpoint, how, self.folder / "digests")[:32])


@dataclass(frozen=True, eq=False)
class Task:
    """What a store lacks of one checkpoint.

    Attributes:
        checkpoint: a folder or hub id; a model in memory where no executor is used.
        shelf: where its states go.
        blocks: prompts and the layers that are lacking.
        prefix: token ids that every prompt begins with.
        store: how the checkpoint is opened.
    """

    checkpoint: Checkpoint
    shelf: Shelf
    blocks: tuple[tuple[tuple[Query, ...], tuple[int, ...]], ...]
    prefix: tuple[int, ...]
    store: Stored


def read_through_store(
    plan: Plan, checkpoints: Sequence[Checkpoint], store: Stored, executor: Executor | None
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """States from a store's folder, memory-mapped, and the precisions that they were computed in.

    Raises:
        GravlensError: the store cannot be written, or loses what is written into it; what `run_all` raises.
    """
    precisions = [precision_of(checkpoint, store.placement) for checkpoint in checkpoints]
    shelves = [store.shelf(*pair) for pair in zip(checkpoints, precisions, strict=True)]
    keys = [query_key(query) for query in plan.queries]
    question = hashlib.sha256(json.dumps([[s.folder.name for s in shelves], keys, plan.layers]).encode()).hexdigest()
    view = find_view(store.folder, question)
    for _ in range(3):  # what was damaged is seen, and taken away, only when it is put together
        if view is not None:
            return view, set(precisions)
        if tasks := _lacking(plan, keys, dict(zip(shelves, checkpoints, strict=True)), store):
            run_all(tasks, executor)
        view = _put_together(plan, keys, shelves, store.folder, question)
    raise GravlensError(
        f"The store {store.folder} does not hold what was just written into it.",
        "A store is a folder that nothing else writes into.",
        "another folder; is that disk sound?",
    )


def _lacking(plan: Plan, keys: Sequence[str], checkpoints: dict[Shelf, Checkpoint], store: Stored) -> list[Task]:
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
        if lacks:
            return None
        view.finish()
    return find_view(folder, question)


# --- running tasks --------------------------------------------------------------------------------------------------


def run_all(tasks: Sequence[Task], executor: Executor | None) -> None:
    """Run tasks here, or submit each to an executor; its workers write files and send nothing back.

    Raises:
        GravlensError: a model in memory and an executor; a worker died.
    """
    if executor is None:
        with tqdm(total=sum(len(task.blocks) for task in tasks), desc="residuals", unit="block", leave=False) as bar:
            run_tasks(tasks, bar.update)
        return
    for task in tasks:
        _check_sendable(task.checkpoint)
    jobs = [executor.submit(run_tasks, [task]) for task in tasks]
    try:
        for job in tqdm(jobs, desc="residuals", unit="task", leave=False):
            job.result()
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
            job.cancel()


def run_tasks(tasks: Sequence[Task], tick: Callable[[], Any] = lambda: None) -> None:
    """Read what lacks and write it; one model is open at a time, and checkpoints' weights are swapped into it."""
    if not tasks:
        return
    store = tasks[0].store
    opened = open_each([task.checkpoint for task in tasks], through=store.through, placement=store.placement)
    for task, (checkpoint, model) in zip(tasks, opened, strict=True):
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


def _check_sendable(checkpoint: Checkpoint) -> None:
    if isinstance(checkpoint.source, nn.Module):
        raise GravlensError(
            f"{checkpoint.name} is {checkpoint.described}, and an executor was given.",
            "A worker opens its checkpoint itself.",
            "folders (model.save_pretrained), or no executor.",
        )
