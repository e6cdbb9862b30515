"""Hidden states that this process has read from folders, in memory: the next call reads only what is missing."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from jaxtyping import Float

from gravlens.activations.fingerprint import known_by_stamps
from gravlens.activations.positions import Query
from gravlens.activations.reader import Plan, Through, read_each
from gravlens.core.errors import GravlensError
from gravlens.history.sources import Resolved
from gravlens.history.weight_files import remark_on_same
from gravlens.models.placement import Placement
from gravlens.models.swapping import check_one_precision

LIMIT = "GRAVLENS_SESSION_MIB"  # environment variable: how much is kept; 0 keeps nothing
DEFAULT_LIMIT = "256"  # states of 112 prompts at 30 layers of width 576 are 7.4 MiB per checkpoint


@dataclass(frozen=True)
class _Entry:
    """States of one prompt and checkpoint by layer, and the precision that they were computed in."""

    states: dict[int, Float[np.ndarray, "row d_model"]]
    precision: str

    @property
    def size(self) -> int:
        return sum(one.nbytes for one in self.states.values())


@dataclass(frozen=True)
class _Gap:
    """What is missing of a checkpoint: a plan, and its rows and columns in the whole result."""

    plan: Plan
    rows: np.ndarray
    columns: np.ndarray


class Session:
    """Least recently used states by checkpoint (`known_by_stamps`) and prompt, bounded in bytes."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, Query], _Entry] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return self._size

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self._size = 0

    def fill(
        self, key: str | None, plan: Plan, out: Float[np.ndarray, "row layer d_model"]
    ) -> tuple[_Gap | None, str | None]:
        """Copy what is kept of a checkpoint into `out`; return what is missing, and the precision of the rest."""
        missing, layers, precision = list[int](), set[int](), None
        for prompt, query in enumerate(plan.queries):
            entry = self._find(key, query)
            states = entry.states if entry else {}
            for column, layer in enumerate(plan.layers):
                if layer in states:
                    out[list(plan.rows(prompt)), column] = states[layer]
            if absent := set(plan.layers).difference(states):
                missing.append(prompt)
                layers |= absent
            precision = entry.precision if entry else precision
        if not missing:
            return None, precision
        rest = Plan.of([plan.queries[i] for i in missing], sorted(layers), plan.d_model)
        rows = np.array([row for i in missing for row in plan.rows(i)])
        return _Gap(rest, rows, np.searchsorted(plan.layers, rest.layers)), precision

    def keep(self, key: str, plan: Plan, states: Float[np.ndarray, "row layer d_model"], precision: str) -> None:
        """Keep copies of a plan's states, and drop what was not used for longest."""
        limit = kept_bytes()
        if states.nbytes > limit:  # all else would be dropped for a part of it
            return
        with self._lock:
            for prompt, query in enumerate(plan.queries):
                old = self._held.pop((key, query), None)
                new = states[list(plan.rows(prompt))]  # indexing with a list copies
                by_layer = {layer: new[:, column] for column, layer in enumerate(plan.layers)}
                entry = _Entry((old.states if old else {}) | by_layer, precision)
                self._held[key, query] = entry
                self._size += entry.size - (old.size if old else 0)
            while self._size > limit:
                self._size -= self._held.popitem(last=False)[1].size

    def _find(self, key: str | None, query: Query) -> _Entry | None:
        with self._lock:
            if key is None or (key, query) not in self._held:
                return None
            self._held.move_to_end((key, query))
            return self._held[key, query]


SESSION = Session()


def kept_bytes() -> int:
    """Return how many bytes of states are kept; GravlensError for a variable that is no number."""
    given = os.environ.get(LIMIT, DEFAULT_LIMIT)
    if not given.strip().isdecimal():
        wanted = "It is the number of MiB of states that are kept in memory."
        raise GravlensError(f"{LIMIT}={given!r} is set.", wanted, f"{LIMIT}={DEFAULT_LIMIT}, or 0 to keep nothing.")
    return int(given) << 20


def read_here(
    plan: Plan, checkpoints: Sequence[Resolved], through: Through, placement: Placement
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """Return all states in memory, and the precisions that they were computed in.

    States of folders that this process has read before are copied; the rest is read.
    """
    values = np.empty((len(checkpoints), plan.ends[-1], len(plan.layers), plan.d_model), np.float32)
    how = (through, repr(placement.where))
    keys = [known_by_stamps(one, how) if kept_bytes() else None for one in checkpoints]
    precisions: dict[str, str] = {}
    gaps: dict[int, _Gap] = {}
    for number, (checkpoint, key) in enumerate(zip(checkpoints, keys, strict=True)):
        gap, precision = SESSION.fill(key, plan, values[number])
        precisions |= {checkpoint.name: precision} if precision else {}
        gaps |= {number: gap} if gap else {}
    check_one_precision(precisions)
    left, plans = list(gaps), [gap.plan for gap in gaps.values()]
    for found in read_each(plans, [checkpoints[number] for number in left], through, placement, precisions):
        gap = gaps[left[found.checkpoint]]
        values[left[found.checkpoint]][np.ix_(gap.rows[found.rows], gap.columns)] = found.states
    for number, gap in gaps.items():
        if (key := keys[number]) is not None:
            read = values[number][np.ix_(gap.rows, gap.columns)]
            SESSION.keep(key, gap.plan, read, precisions[checkpoints[number].name])
    pairs = zip(checkpoints, values, strict=True)
    remark_on_same({checkpoint.name: sha256(states.data).hexdigest() for checkpoint, states in pairs}, "states")
    return values, set(precisions.values())
