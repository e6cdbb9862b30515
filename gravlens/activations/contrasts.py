"""Matched pairs of a harmful and a harmless prompt, and the difference of hidden states within each pair."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from gravlens.activations.positions import Positions, described, queries_of
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.core.errors import GravlensError
from gravlens.history.prompt_formats import check_rows, read_entries, read_rows
from gravlens.history.prompts import Mask, PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.models.tokenizers import sequence_tokenizer

__all__ = ["Contrast", "cache_contrasts", "read_contrast"]


@dataclass(frozen=True)
class Contrast:
    """Matched pairs: the i-th harmful and the i-th harmless prompt belong together.

    Attributes:
        harmful: the prompts x+.
        harmless: the prompts x−, in the same order and with the same system prompt.
    """

    harmful: PromptSet
    harmless: PromptSet

    def __post_init__(self) -> None:
        same = sum(one == other for one, other in zip(self.harmful, self.harmless, strict=False))
        if len(self.harmful) != len(self.harmless) or same or self.harmful.system != self.harmless.system:
            raise GravlensError(
                f"{len(self.harmful)} harmful and {len(self.harmless)} harmless prompts were given, {same} pairs of "
                f"one text, system prompts {self.harmful.system!r} and {self.harmless.system!r}.",
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
        return PromptSet(self.harmful.texts + self.harmless.texts, "contrast", self.harmful.system)

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
        raise GravlensError(
            f"{len(alone)} prompts have no partner: {index} {', '.join(alone[:5])}.",
            "Each prompt of one half must match one prompt of the other.",
            "the two halves of one data set, or index= with the column to match by.",
        )
    return Contrast.of(list(halves[0].values()), [halves[1][key] for key in halves[0]])


def _by_index(source: Any, index: str) -> dict[str, str]:
    entries = read_entries(source)
    rows = check_rows(source, [{index: str(e.row[index])} if index in e.row else e.row for e in entries], index)
    keys = [row[index] for row in rows]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise GravlensError(
            f"{index} {', '.join(twice[:5])} is repeated in one half.", "The index must be unique.", "another index=."
        )
    return dict(zip(keys, (entry.prompt for entry in entries), strict=True))


def cache_contrasts(
    sequence: ModelSequence | Path | str,
    contrast: Contrast,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
) -> Residuals:
    """Read h(x+) − h(x−) of `resid_post` for every checkpoint of a sequence, one row per pair.

    Positions with several rows a prompt are paired in order, one row per pair and position: both prompts of a pair need
    the same number of them, as `"post_instruction"` usually gives.

    Its `locate_vrev` is the mean over pairs of [h_W(x+) − h_W(x−)] − [h_A(x+) − h_A(x−)], the change between witness
    and anchor in the contrast of harmful and harmless, without changes that both share. `follow`, estimators and null
    distributions accept it like states.

    Args:
        sequence: the history.
        contrast: the pairs.
        layers: as for `cache_residuals`.
        positions: as for `cache_residuals`.
        checkpoints: as for `cache_residuals`.

    Returns:
        `Residuals`, values [checkpoint, pair, layer, d_model], residual units; with several rows a pair, `index` is
        (pair, token of the harmful prompt).

    Raises:
        GravlensError: two prompts of a pair that are read at different numbers of positions; whatever `cache_residuals`
            refuses.
    """
    sequence = ModelSequence.of(sequence)
    _check_paired(sequence, contrast, positions)  # before any model is read
    states = cache_residuals(sequence, contrast.both, layers=layers, positions=positions, checkpoints=checkpoints)
    plus, minus = np.split(states.values, 2, axis=1)
    lengths = np.linalg.norm(np.concatenate([plus, minus], axis=-1).astype(np.float64), axis=-1)
    meta = {**states.meta, "contrast": "harmful - harmless", "state_lengths": lengths.mean((0, 1)).tolist()}
    index = None if states.index is None else states.index[: plus.shape[1]]
    return replace(states, values=plus - minus, meta=meta, index=index)


def _check_paired(sequence: ModelSequence, contrast: Contrast, positions: Positions) -> None:
    both = sequence.prompts_of(contrast.both)
    rows = [len(query.reads) for query in queries_of(sequence_tokenizer(sequence, both), both, positions)]
    pairs = zip(contrast, rows[: len(contrast)], rows[len(contrast) :], strict=True)
    for pair, (texts, harmful, harmless) in enumerate(pairs):
        if harmful != harmless:
            raise GravlensError(
                f"positions={described(positions)!r} reads pair {pair} at {harmful} and {harmless} positions "
                f"({texts[0][:40]!r}, {texts[1][:40]!r}).",
                "A difference within a pair needs as many positions of one prompt as of the other.",
                'positions="last", "instruction" (the mean over its tokens) or "post_instruction".',
            )
