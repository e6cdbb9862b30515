"""Process pool: run jobs in spawned processes with a fixed number of threads; all stop at Ctrl-C."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any

import torch

from gravlens.core.progress import progress

Job = Callable[[], Any]
TICK = 2.0  # seconds between updates of a bar's clock: a job may take many minutes
CAN_WAIT = hasattr(signal, "pthread_sigmask")  # not on Windows
_interrupted: list[bool] = []  # in a worker: set by Ctrl-C


@contextmanager
def processes(threads: int, count: int | None) -> Generator[Callable[[str, Sequence[Job]], None]]:
    """Yield a function that runs jobs in `count` processes (default: all cores / `threads`), with a progress bar."""
    count = count or max(1, (os.cpu_count() or 1) // threads)
    before = os.environ.get("OMP_NUM_THREADS")
    # Inherited by the children: OpenMP reads it at the first import of torch, before any code of ours runs there.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    context = multiprocessing.get_context("spawn")  # a fork of a process with OpenMP threads may deadlock
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(threads,))

    def run_all(name: str, jobs: Sequence[Job]) -> None:
        with _ctrl_c_later():
            left: set[Future[Any]] = {pool.submit(_done, job) for job in jobs}
        with progress(name, total=len(left), unit="job", leave=True) as bar:
            while left:
                done, left = wait(left, TICK, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what the job raised
                    bar.update()
                if not done:  # tqdm draws nothing before the first update, so a long job would look like a hang
                    bar.refresh()

    try:
        yield run_all
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


@contextmanager
def _ctrl_c_later() -> Generator[None]:
    """Block SIGINT in processes started here until `_begin`: each would print a traceback of its imports."""
    if not CAN_WAIT:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(threads: int) -> None:
    # A killed parent (SIGTERM, SIGHUP, SIGKILL) shuts no pool down: its workers would run their queue to the end.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"  # only the parent shows a progress bar
    signal.signal(signal.SIGINT, _note)
    if CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        wait_for([parent.sentinel])
        os._exit(1)


def _note(*_: object) -> None:
    """Record Ctrl-C between jobs, or while the modules of the next one are imported."""
    _interrupted.append(True)


def _done(job: Job) -> Any:
    """Run a job unless Ctrl-C was pressed: a worker would continue with queued jobs while the parent waits."""
    if _interrupted:
        raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The modules stay until the process ends: each collection of a Trainer would walk all of them (.3 s).
    gc.freeze()
    try:
        return job()
    except KeyboardInterrupt:
        _interrupted.append(True)
        raise
    finally:
        signal.signal(signal.SIGINT, _note)
