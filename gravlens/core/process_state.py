"""What a whole process shares, kept as it was found while other libraries are called."""

import os
import random
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging as transformers_logging

# transformers changes functions of torch and the default dtype while it makes a model: two threads would undo, and
# keep, each other's changes.
MODEL_MAKING = threading.RLock()
_COUNTING = threading.Lock()
_HELD = ExitStack()  # what the last block to end restores
_inside = 0


@contextmanager
def quiet() -> Generator[None]:
    """Silence transformers' notices and progress bars inside the block, and leave the process as it was.

    That is: the random generators, the default dtype, the warning filters, the environment, and the level and the bars
    of transformers. Blocks may overlap in several threads; the settings are restored when the last one ends.
    """
    global _inside
    with _COUNTING:
        if not _inside:
            _silence()
        _inside += 1
    with ExitStack() as generators:
        for restore in _generators():
            generators.callback(restore)
        try:
            yield
        finally:
            with _COUNTING:
                _inside -= 1
                if not _inside:
                    _HELD.close()


def _silence() -> None:
    """Silence transformers, and note in `_HELD` how to restore what was found."""
    level, dtype = transformers_logging.get_verbosity(), torch.get_default_dtype()
    filters, variables = [*warnings.filters], dict(os.environ)

    def restore() -> None:
        transformers_logging.set_verbosity(level)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if [*warnings.filters] != filters:
            warnings.filters[:] = filters  # pyright: ignore[reportIndexIssue]
            with warnings.catch_warnings():  # it drops what Python remembers of the other filters
                pass
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)

    _HELD.callback(restore)
    if transformers_logging.is_progress_bar_enabled():
        if are_progress_bars_disabled():  # huggingface_hub's own, which the next but one would enable
            _HELD.callback(disable_progress_bars)
        _HELD.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _generators() -> Iterator[Callable[[], object]]:
    """Yield, for each random generator of the process, how to restore its state."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(legacy)
    yield lambda: torch.set_rng_state(cpu)
    if torch.cuda.is_initialized():
        devices = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(devices)
