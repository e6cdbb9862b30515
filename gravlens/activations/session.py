"""Hidden states that this process has read from folders, kept in memory: the next call reads only what is missing."""

import os
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
from jaxtyping import Float

from gravlens.activations.reader import Plan
from gravlens.core.errors import GravlensError

LIMIT = "GRAVLENS_SESSION_MIB"  # environment variable: how much is kept; 0 keeps nothing
DEFAULT_LIMIT = "256"  # states of 112 prompts at 30 layers of width 576 are 7.4 MiB per checkpoint


class Session:
    """Least recently used states by checkpoint (`known_by_stamps`) and prompt, bounded in bytes (`size`)."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, Any], dict[int, Float[np.ndarray, "row d_model"]]] = OrderedDict()
        self._lock, self.size = threading.Lock(), 0

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self.size = 0

    def fill(self, key: str | None, plan: Plan, out: Float[np.ndarray, "row layer d_model"]) -> list[int]:
        """Copy what is kept of a checkpoint into `out`; return the indices of the prompts that are missing."""
        missing = []
        for prompt, query in enumerate(plan.queries):
            with self._lock:
                held = self._held.get((key, query), {}) if key else {}
                if held:
                    self._held.move_to_end((key or "", query))
            # A pass goes to the deepest layer anyway: a prompt without one of them is read again at all.
            if held.keys() >= set(plan.layers):
                out[list(plan.rows(prompt))] = np.stack([held[layer] for layer in plan.layers], axis=1)
            else:
                missing.append(prompt)
        return missing

    def keep(self, key: str, plan: Plan, states: Float[np.ndarray, "row layer d_model"]) -> None:
        """Keep copies of a plan's states, and drop what was not used for longest."""
        limit = kept_bytes()
        if states.nbytes > limit:  # all else would be dropped for a part of it
            return
        with self._lock:
            for prompt, query in enumerate(plan.queries):
                old = self._held.pop((key, query), {})
                new = states[list(plan.rows(prompt))]  # indexing with a list copies
                self._held[key, query] = old | {layer: new[:, i] for i, layer in enumerate(plan.layers)}
                self.size += _size(self._held[key, query]) - _size(old)
            while self.size > limit:
                self.size -= _size(self._held.popitem(last=False)[1])


SESSION = Session()


def _size(states: dict[int, np.ndarray]) -> int:
    return sum(one.nbytes for one in states.values())


def kept_bytes() -> int:
    """Return the limit of the session cache in bytes; GravlensError if the variable is not a number."""
    given = os.environ.get(LIMIT, DEFAULT_LIMIT)
    if given.strip().isdecimal():
        return int(given) << 20
    wanted = "It is the number of MiB of states that are kept in memory."
    raise GravlensError(f"{LIMIT}={given!r} is set.", wanted, f"{LIMIT}={DEFAULT_LIMIT}, or 0 to keep nothing.")
