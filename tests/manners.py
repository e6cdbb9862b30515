"""What a process shares between all of its code, and who changes it: for test_manners.py and its child processes.

As a script: python tests/manners.py CODE runs CODE and prints, as JSON, what it changed, and the filters and variables.
"""

import functools
import gc
import inspect
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

MADE_BY = ("__init__", "__new__")
LIBRARIES = ("transformers", "huggingface_hub", "peft", "accelerate", "datasets", "matplotlib", "torch", "")


def snapshot() -> dict[str, Any]:
    """Everything process-wide that can be looked at without importing more."""
    return {**_generators(), **_torch(), **_python(), **_logging(), **_libraries()}


def _generators() -> dict[str, Any]:
    cuda = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []
    name, keys, *rest = np.random.get_state()
    return {
        "generator of random": random.getstate(),
        "generator of numpy": (name, keys.tobytes(), *rest),
        "generator of torch": torch.get_rng_state().numpy().tobytes(),
        "generators of CUDA": cuda,
    }


def _torch() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "threads of torch": torch.get_num_threads(),
        "precision of torch": (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "torch.nn.init": tuple(vars(torch.nn.init)[name] for name in ("normal_", "kaiming_uniform_", "uniform_")),
    }


def _python() -> dict[str, Any]:
    mask = os.umask(0o022)
    os.umask(mask)
    return {
        "environment": dict(os.environ),
        "working folder": os.getcwd(),
        "umask": mask,
        "sys.path": [*sys.path],
        "streams": (sys.stdout, sys.stderr, sys.excepthook, sys.displayhook),
        "warning filters": [*warnings.filters],
        "how warnings are shown": warnings.showwarning,
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "numpy's settings": (np.geterr(), np.get_printoptions()),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "threads": _threads(),
        "open files": _open_files(),
    }


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()} - {"tqdm"}


# Fonts that matplotlib keeps once it has drawn with them; states that a result maps into memory, until it is dropped.
KEPT_OPEN = re.compile(r"\.(ttf|otf)$|/views/[^/]*\.safetensors$")


def _open_files() -> list[str]:
    """What the descriptors of this process lead to; empty where the system does not tell."""
    found = []
    for path in Path("/proc/self/fd").glob("*"):
        with suppress(OSError):  # that of the listing itself
            target = os.readlink(path)
            theirs = target.startswith("/proc/") or target == os.devnull or KEPT_OPEN.search(target)
            found += [] if theirs else [target]
    return sorted(found)


def _logging() -> dict[str, Any]:
    loggers = {name: logging.getLogger(name) if name else logging.root for name in LIBRARIES}
    return {
        "loggers": {
            name: (one.level, one.disabled, one.propagate, [*map(id, one.handlers)], [*map(id, one.filters)])
            for name, one in loggers.items()
        },
        "logging.disable": logging.root.manager.disable,
    }


def _libraries() -> dict[str, Any]:
    found: dict[str, Any] = {}
    if state := sys.modules.get("accelerate.state"):
        kinds = (state.AcceleratorState, state.PartialState, state.GradientState)
        told = [repr(dict(kind._shared_state)) for kind in kinds]
        # Whether a loader of an earlier Trainer still lives is the garbage collector's choice.
        found["accelerate's state"] = [re.sub(r"<weakref[^>]*>|None", "-", one) for one in told]
    if hub := sys.modules.get("huggingface_hub.utils"):
        found["bars of huggingface_hub"] = hub.are_progress_bars_disabled()
    if own := sys.modules.get("transformers.utils.logging"):
        found["bars of transformers"] = own.is_progress_bar_enabled()
    if library := sys.modules.get("matplotlib"):
        found["rcParams"] = {name: repr(value) for name, value in dict.items(library.rcParams)}
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        found["figures of pyplot"] = pyplot.get_fignums()
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what is not as before; what a library has only now is its own."""
    found = [name for name, value in before.items() if after[name] != value]
    # One of an earlier call may have ended meanwhile, and transformers does not wait for those that read weights.
    until = time.monotonic() + 3
    while "threads" in found and time.monotonic() < until:
        if _threads() <= before["threads"]:
            found.remove("threads")
        time.sleep(0.01)
    if "open files" in found:
        gc.collect()  # one that nobody holds any more is closed
        more = Counter(_open_files()) - Counter(before["open files"])  # those of an earlier call may be closed now
        found = [name for name in found if name != "open files" or more]
    return found


class Watch:
    """Compare the process before and after each call of watched functions; nested calls are part of the outermost."""

    def __init__(self) -> None:
        self.changes: dict[str, set[str]] = {}
        self._inside = False

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does the same and tells what it changed."""

        @functools.wraps(function)
        def inner(*given: Any, **named: Any) -> Any:
            told = self.changes.setdefault(name, set())
            if self._inside:
                return function(*given, **named)
            self._inside, before = True, snapshot()
            try:
                return function(*given, **named)
            finally:
                self._inside = False
                told |= set(changed(before, snapshot()))

        return inner

    @contextmanager
    def over(self, public: dict[str, Any], holders: dict[str, Any]) -> Iterator[None]:
        """Watch public functions, and the methods of public classes, where their users find them."""
        kept: list[tuple[Any, str, Any]] = []

        def put(holder: Any, attribute: str, value: Any) -> None:
            kept.append((holder, attribute, vars(holder)[attribute]))
            setattr(holder, attribute, value)

        try:
            for name, value in public.items():
                if inspect.isfunction(value):
                    put(holders[name.rpartition(".")[0]], name.rpartition(".")[2], self.watched(name, value))
                    continue
                for attribute, method in [*vars(value).items()]:
                    function = getattr(method, "__func__", method)
                    if inspect.isfunction(function) and (attribute[0] != "_" or attribute in (*MADE_BY, "__call__")):
                        label = name if attribute in MADE_BY else f"{name}.{attribute}"
                        wrapped: Any = self.watched(label, function)
                        bound = isinstance(method, classmethod | staticmethod)
                        put(value, attribute, type(method)(wrapped) if bound else wrapped)
            yield
        finally:
            for holder, attribute, value in reversed(kept):
                setattr(holder, attribute, value)


def main(code: str) -> None:
    """Run code in this fresh process; import and seed nothing but numpy and torch before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = snapshot()
    exec(code, {})
    after = snapshot()
    told = {"changed": changed(before, after), "verbosity": after["loggers"]["transformers"][:3]}
    told |= {"filters": [*map(repr, after["warning filters"])], "environment": after["environment"]}
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
