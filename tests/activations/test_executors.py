"""Executors: the states are those without one, workers write them, and a worker that dies loses nothing."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from distributed import Client, LocalCluster
from histories import refused, weights_of
from safetensors.torch import load_file, save_file
from submitit import LocalExecutor

from gravlens.activations import reader as readings
from gravlens.activations import store as stored_readings
from gravlens.activations.positions import queries_of_ids
from gravlens.activations.residuals import cache_residuals
from gravlens.activations.store import StateFolder, divided, part_sizes, run_each
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import Checkpoint, ModelSequence

pytestmark = pytest.mark.long

TEXTS = list(tiny.PROMPTS)
BLOCKS = len(TEXTS)  # of a checkpoint, a prompt each
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> ModelSequence:
    folder = tmp_path_factory.mktemp("history")
    names = ("witness", "anchor", "ft/checkpoint-1")
    folders = [tiny.save(tiny.llama(seed), folder / name) for seed, name in enumerate(names)]
    return ModelSequence.from_folders(witness=folders[0], anchor=folders[1], runs={"seed0": [folders[2]]}, probes=TEXTS)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Each prompt is a block of its own, in the plan that travels with a task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readings, "BLOCK_BYTES", 0)
        patch.setattr(readings, "TOKENS_ELSEWHERE", 0)
        yield


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process opens no model and digests no weights, so whatever is written was written by another."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the driver worked")

    monkeypatch.setattr(stored_readings, "open_each", never)
    monkeypatch.setattr(stored_readings, "fingerprint", never)


@pytest.fixture(scope="module")
def alone(history: ModelSequence, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return np.array(cache_residuals(history, store=tmp_path_factory.mktemp("alone")).values)


@pytest.fixture(scope="module")
def dask() -> Iterator[Client]:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, mp_context=SPAWN) as executor:
        yield executor


def parts(store: Path) -> set[Path]:
    return {path.relative_to(store) for path in store.glob("states/*/*.safetensors")}


def dies_once(flag: Path) -> None:
    """In a worker: after the third file, kill this process; the next process that comes there goes on."""
    put = StateFolder.put

    def deadly(self: StateFolder, *arguments: Any, **named: Any) -> None:
        put(self, *arguments, **named)
        if len(list(self.folder.glob("*.safetensors"))) == 3 and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    StateFolder.put = deadly  # type: ignore[method-assign]


# -- the real libraries ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
def test_processes_write_what_one_process_computes(
    history: ModelSequence, alone: np.ndarray, pool: Executor, tmp_path: Path
) -> None:
    found = cache_residuals(history, store=tmp_path, executor=pool).values
    assert isinstance(found, np.memmap) and np.array_equal(found, alone)
    assert len(parts(tmp_path)) == 3 * BLOCKS


@pytest.mark.usefixtures("idle")
def test_a_store_named_by_a_relative_path_is_found_by_workers_that_were_started_elsewhere(
    history: ModelSequence, alone: np.ndarray, pool: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = os.path.relpath(str(history.anchor.source))
    found = cache_residuals(
        history, checkpoints=[Checkpoint("anchor", Path(folder))], store="states", executor=pool
    ).values
    assert np.array_equal(found[0], alone[1]) and parts(tmp_path / "states")


@pytest.mark.usefixtures("idle")
def test_a_dask_cluster_of_two_workers_goes_on_by_itself_where_one_is_killed(
    history: ModelSequence, alone: np.ndarray, dask: Client, tmp_path: Path
) -> None:
    flag = tmp_path / "killed"
    before = set(dask.run(os.getpid).values())
    dask.run(dies_once, flag)
    found = cache_residuals(history, store=tmp_path / "states", executor=dask.get_executor()).values
    assert (
        flag.exists() and len(before) == 2 and before - set(dask.run(os.getpid).values()) and os.getpid() not in before
    )
    assert np.array_equal(found, alone) and len(parts(tmp_path / "states")) == 3 * BLOCKS


@pytest.mark.usefixtures("idle")
def test_submitits_jobs_write_the_same_and_hand_on_an_error_as_it_was(
    history: ModelSequence, alone: np.ndarray, tmp_path: Path
) -> None:
    executor = LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    wanted = [history.anchor, lacking(history.witness, tmp_path / "lacking")]
    with refused("lack", "q_proj"):
        cache_residuals(history, checkpoints=wanted, store=tmp_path / "states", executor=executor)
    found = cache_residuals(history, checkpoints=wanted[:1], store=tmp_path / "states", executor=executor).values
    assert np.array_equal(found, alone[1:2])


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def lacking(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A checkpoint whose file is whole and lacks a tensor, which is seen when it is opened."""
    tiny.save(tiny.llama(0), folder)
    tensors = load_file(weights_of(folder))
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, weights_of(folder), {"format": "pt"})
    return Checkpoint(checkpoint.name, folder)


def test_a_worker_that_is_killed_is_one_error_and_the_same_call_computes_the_rest(
    history: ModelSequence, alone: np.ndarray, tmp_path: Path
) -> None:
    store, flag = tmp_path / "states", tmp_path / "killed"
    with (
        ProcessPoolExecutor(1, mp_context=SPAWN, initializer=dies_once, initargs=(flag,)) as pool,
        refused("ProcessPoolExecutor", "ended"),
    ):
        cache_residuals(history, store=store, executor=pool)
    left = {path: (store / path).stat().st_ino for path in parts(store)}
    assert len(left) == 3 and flag.exists()
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        found = cache_residuals(history, store=store, executor=pool).values
    assert np.array_equal(found, alone)
    assert {path: (store / path).stat().st_ino for path in left} == left and len(parts(store)) == 3 * BLOCKS


def test_an_error_in_a_worker_is_the_error_that_would_have_been_raised_here(
    history: ModelSequence, pool: Executor, tmp_path: Path
) -> None:
    bad = [lacking(history.witness, tmp_path / "lacking")]
    errors = []
    for number, executor in enumerate((None, pool)):
        with pytest.raises(GravlensError) as caught:
            cache_residuals(history, checkpoints=bad, store=tmp_path / str(number), executor=executor)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and "lack" in errors[0]


def test_models_in_memory_are_refused_and_so_is_an_executor_without_a_store(
    history: ModelSequence, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as threads:
        models = ModelSequence.from_models(witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER)
        with refused("witness", "in memory", "executor"):
            cache_residuals(models, TEXTS, store=tmp_path, executor=threads)
        with refused("ThreadPoolExecutor", "no store"):
            cache_residuals(history, executor=threads)


def test_a_forked_worker_is_refused_for_it_would_wait_for_ever() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool, refused("forked"):
        run_each([int], pool, "")


def test_threads_run_one_task_at_a_time(history: ModelSequence, alone: np.ndarray, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        found = cache_residuals(history, store=tmp_path, executor=threads).values
    assert np.array_equal(found, alone)


class Recorded(Executor):
    """Runs at once; remembers what was sent and what came back."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.interrupted_at, self.jobs = interrupted_at, list[Any]()
        self.sent, self.back = list[int](), list[Any]()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **_: Any) -> Future[Any]:
        job: Future[Any] = Future()
        self.sent.append(len(pickle.dumps((function, arguments))))
        if len(self.jobs) == self.interrupted_at:
            job.set_exception(KeyboardInterrupt())
        elif self.interrupted_at is None or len(self.jobs) < self.interrupted_at:
            self.back.append(function(*arguments))
            job.set_result(self.back[-1])
        self.jobs.append(job)
        return job


def test_only_token_ids_are_sent_and_only_digests_come_back(history: ModelSequence, tmp_path: Path) -> None:
    executor = Recorded()
    cache_residuals(history, store=tmp_path, executor=executor)
    assert [type(one) for one in executor.back] == [StateFolder] * 3 + [type(None)] * 3
    assert max(executor.sent) < 4000 + 12 * sum(len(tiny.TOKENIZER(text)["input_ids"]) for text in TEXTS)


def test_an_interrupted_driver_cancels_what_waits() -> None:
    executor = Recorded(interrupted_at=1)
    with pytest.raises(KeyboardInterrupt):
        run_each([partial(int, i) for i in range(4)], executor, "")
    assert [job.cancelled() for job in executor.jobs] == [False, False, True, True]


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [([5], [1]), ([5, 5, 5], [3]), ([9, 9, 9, 9], [2, 2]), ([9, 9, 9, 9, 9], [2, 3]), ([20, 20, 3], [1, 2])],
)
def test_tasks_are_as_small_as_they_may_be_and_none_is_smaller(tokens: list[int], sizes: list[int]) -> None:
    assert part_sizes(tokens, 10) == sizes


def test_a_checkpoint_of_many_tokens_is_several_tasks(
    history: ModelSequence, alone: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stored_readings.TASK_TOKENS, "cpu", 1)
    executor = Recorded()
    found = cache_residuals(history, checkpoints=[history.anchor], store=tmp_path, executor=executor).values
    assert len(executor.jobs) == 1 + BLOCKS and np.array_equal(found[0], alone[1])


def test_what_a_prefix_saves_does_not_count(history: ModelSequence) -> None:
    queries = queries_of_ids([[*range(1, 11), i] for i in range(20)])
    plan = readings.Plan.of(queries, [0], 8)
    blocks = tuple((tuple(plan.queries[i] for i in block), (0,)) for block in plan.blocks)
    store = stored_readings.Store(Path(), "huggingface", stored_readings.Placement())
    task = stored_readings.Task(history.anchor, StateFolder(Path()), blocks, plan.prefix, store)
    assert len(plan.prefix) == 10 and len(blocks) == 20 and [part.blocks for part in divided(task)] == [blocks]
