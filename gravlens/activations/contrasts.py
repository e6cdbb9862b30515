"""Matched pairs of a harmful and a harmless prompt, and the difference of hidden states within each pair."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from gravlens.activations.positions import Positions
from gravlens.activations.residuals import Request, Residuals, prepare
from gravlens.core.errors import GravlensError
from gravlens.history.prompt_formats import Entry, Row, check_rows, read_entries, read_rows
from gravlens.history.prompts import Mask, PromptSet, prompt_set
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts

__all__ = ["Contrast", "cache_contrasts", "read_contrast"]


@dataclass(frozen=True)
class Contrast:
    """Matched pairs: the i-th harmful prompt x+ and the i-th harmless prompt x−, under one system prompt."""

    harmful: PromptSet
    harmless: PromptSet

    def __post_init__(self) -> None:
        # A pair of one text is a mistake in the files: its difference is exactly 0.
        same = sum(one == other for one, other in zip(self.harmful.turns, self.harmless.turns, strict=False))
        if len(self.harmful) != len(self.harmless) or same or self.harmful.system != self.harmless.system:
            systems = f"{self.harmful.system!r} and {self.harmless.system!r}"
            raise GravlensError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless prompts were given, {same} pairs of "
                f"one text, system prompts {systems}.",
                "A contrast needs pairs of two different prompts with one system prompt.",
                "Contrast.of(harmful, harmless) with prompts in matching order, or read_contrast.",
            )

    def __len__(self) -> int:
        return len(self.harmful)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self.harmful, self.harmless, strict=True)

    @overload
    def __getitem__(self, part: int | np.integer[Any]) -> tuple[str, str]: ...
    @overload
    def __getitem__(self, part: slice | Mask) -> "Contrast": ...
    def __getitem__(self, part: int | np.integer[Any] | slice | Mask) -> "tuple[str, str] | Contrast":
        """One pair of texts for an integer; a `Contrast` for a slice or a boolean mask."""
        harmful, harmless = self.harmful[part], self.harmless[part]
        if isinstance(harmful, PromptSet) and isinstance(harmless, PromptSet):
            return Contrast(harmful, harmless)
        return str(harmful), str(harmless)

    @property
    def both(self) -> PromptSet:
        """The harmful prompts, then the harmless ones."""
        earlier = [turns for half in (self.harmful, self.harmless) for turns in half.earlier or ((),) * len(half)]
        texts = self.harmful.texts + self.harmless.texts
        return PromptSet(texts, "contrast", self.harmful.system, tuple(earlier))

    @classmethod
    def of(cls, harmful: Prompts, harmless: Prompts) -> "Contrast":
        """Pair two sets of prompts in their order."""
        return cls(PromptSet.of(harmful, "harmful"), PromptSet.of(harmless, "harmless"))


def read_contrast(harmful: Any, harmless: Any = None, *, index: str = "Index") -> Contrast:
    """Read pairs from two files matched by a column, like those of JBB-Behaviors, or from one file of pairs.

    Args:
        harmful: a file or `datasets.Dataset` in a supported format; its order is kept. Without `harmless`: a file with
            columns `harmful` and `harmless`.
        harmless: the other half.
        index: the column to match by.

    Raises:
        GravlensError: an index that is missing, repeated, or in one half only; a prompt matched with itself.
    """
    if harmless is None:
        rows = read_rows(harmful, "harmful", "harmless")
        return Contrast.of([row["harmful"] for row in rows], [row["harmless"] for row in rows])
    halves = [_by_index(source, index) for source in (harmful, harmless)]
    if alone := sorted(halves[0].keys() ^ halves[1].keys()):
        given = f"{len(alone)} prompts have no partner: {index} {', '.join(alone[:5])}."
        wanted = "Each prompt of one half must match one prompt of the other."
        raise GravlensError(given, wanted, "the two halves of one data set, or index= with the column to match by.")
    harmful, harmless = list(halves[0].values()), [halves[1][key] for key in halves[0]]
    return Contrast(prompt_set(harmful, "harmful"), prompt_set(harmless, "harmless"))


def _by_index(source: Any, index: str) -> dict[str, Entry]:
    entries = read_entries(source)
    # Keys are strings: one half may be CSV and the other JSON, with numbers.
    rows = [Row(e.row | {index: str(e.row[index])}, e.row.where) if index in e.row else e.row for e in entries]
    keys = [row[index] for row in check_rows(source, rows, index)]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        given = f"{index} {', '.join(twice[:5])} is repeated in one half."
        raise GravlensError(given, "The index must be unique.", "another index=.")
    return dict(zip(keys, entries, strict=True))


def cache_contrasts(
    sequence: ModelSequence | Path | str,
    contrast: Contrast,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
) -> Residuals:
    """Read h(x+) − h(x−) of `resid_post` for every checkpoint of a sequence, one row per pair.

    Its `locate_vrev` is the mean over pairs of [h_W(x+) − h_W(x−)] − [h_A(x+) − h_A(x−)], the change between witness
    and anchor in the contrast of harmful and harmless, without changes that both share. `follow`, estimators and null
    distributions accept it like states.

    Args:
        positions: as in `cache_residuals`. With several rows per prompt, rows are paired in order and `index` is (pair,
            token of the harmful prompt).

    Raises:
        GravlensError: two prompts of a pair that are read at different numbers of positions; what `cache_residuals`
            raises.
    """
    request = prepare(sequence, contrast.both, layers=layers, positions=positions, checkpoints=checkpoints)
    _check_paired(contrast, request)  # before any model is opened
    states = request.read()
    plus, minus = np.split(states.values, 2, axis=1)
    # Lengths of the states, not of their differences: a drift is judged relative to them.
    lengths = np.linalg.norm(np.concatenate([plus, minus], axis=-1).astype(np.float64), axis=-1)
    meta = {**states.meta, "contrast": "harmful - harmless", "state_lengths": lengths.mean((0, 1)).tolist()}
    index = None if states.index is None else states.index[: plus.shape[1]]
    return replace(states, values=plus - minus, meta=meta, index=index)


def _check_paired(contrast: Contrast, request: Request) -> None:
    rows = [len(query.reads) for query in request.plan.queries]
    pairs = zip(contrast, rows[: len(contrast)], rows[len(contrast) :], strict=True)
    for pair, ((text, other), harmful, harmless) in enumerate(pairs):
        if harmful != harmless:
            texts, positions = f"({text[:40]!r}, {other[:40]!r})", request.meta["positions"]
            given = f"positions={positions!r} reads pair {pair} at {harmful} and {harmless} positions {texts}."
            wanted = "A difference within a pair needs as many positions of one prompt as of the other."
            remedy = 'positions="last", "instruction" (the mean over its tokens) or "post_instruction".'
            raise GravlensError(given, wanted, remedy)
