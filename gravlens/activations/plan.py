"""Group prompts into blocks, and read them with one checkpoint after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from gravlens.activations.positions import Query
from gravlens.activations.reader import TOKENS_ELSEWHERE, Reader, batches_of, common_prefix, tokens_for
from gravlens.core.progress import progress
from gravlens.history.sources import Resolved
from gravlens.models.placement import Placement
from gravlens.models.swapping import open_each
from gravlens.models.tokenizers import check_vocabulary

BLOCK_BYTES = 4 << 20  # of states held in memory before they are written
Through = Literal["huggingface", "bridge"]


@dataclass(frozen=True)
class Plan:
    """Prompts in blocks. A block is read and written as a whole, and read again as a whole after a killed run.

    Attributes:
        queries: the prompts.
        layers: the layers to read, ascending.
        d_model: width of the residual stream.
        prefix: token ids that every prompt begins with.
        blocks: indices of prompts, of similar lengths.
    """

    queries: tuple[Query, ...]
    layers: tuple[int, ...]
    d_model: int
    prefix: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @cached_property
    def ends(self) -> list[int]:
        """One past each prompt's last row of the result."""
        return list(accumulate(len(query.reads) for query in self.queries))

    def rows(self, prompt: int) -> range:
        """A prompt's rows of the result."""
        end = self.ends[prompt]
        return range(end - len(self.queries[prompt].reads), end)

    @property
    def index(self) -> Int[np.ndarray, "row 2"] | None:
        """(prompt, token) of each row; None if each prompt is one row."""
        if all(len(query.reads) == 1 for query in self.queries):
            return None
        return np.array([(i, read[-1]) for i, query in enumerate(self.queries) for read in query.reads])

    @classmethod
    def of(cls, queries: Sequence[Query], layers: Sequence[int], d_model: int) -> "Plan":
        """Fill blocks up to BLOCK_BYTES of states, but with at least one full batch of an accelerator.

        Equal prompts stay in one block, so that a killed run leaves whole blocks.
        """
        prefix = common_prefix(queries)
        blocks: list[list[int]] = []
        size = tokens = 0
        for i in sorted(range(len(queries)), key=lambda i: (queries[i].end, queries[i].ids, queries[i].reads)):
            full = size > BLOCK_BYTES and tokens > TOKENS_ELSEWHERE
            if not blocks or (full and queries[i] != queries[blocks[-1][-1]]):
                blocks.append([])
                size = tokens = 0
            blocks[-1].append(i)
            size, tokens = size + 4 * len(queries[i].reads) * len(layers) * d_model, tokens + queries[i].end - prefix
        return cls(tuple(queries), tuple(layers), d_model, queries[0].ids[:prefix], tuple(map(tuple, blocks)))


def read_block(
    reader: Reader, queries: Sequence[Query]
) -> Iterator[tuple[list[int], Float[np.ndarray, "row layer d_model"]]]:
    """Yield indices of prompts and their rows, fp32, batch by batch."""
    for batch in batches_of(queries, prefix=reader.shared, tokens=tokens_for(reader.model)):
        yield batch, reader.read([queries[i] for i in batch]).numpy()


# --- all checkpoints ------------------------------------------------------------------------------------------------
class Found(NamedTuple):
    """States of one batch, read with one checkpoint."""

    checkpoint: int
    rows: list[int]
    states: Float[np.ndarray, "row layer d_model"]
    precision: str


def read_each(plan: Plan, checkpoints: Sequence[Resolved], through: Through, placement: Placement) -> Iterator[Found]:
    """Yield every checkpoint's states batch by batch; one model is open at a time, and no states are kept."""
    opened = open_each(checkpoints, through=through, placement=placement)
    ids = [query.ids for query in plan.queries]
    with progress("residuals", total=len(checkpoints) * len(ids), unit="prompt") as bar:
        for number, (checkpoint, model) in enumerate(opened):
            check_vocabulary(checkpoint, model, ids)
            reader = Reader(model, layers=plan.layers, prefix=plan.prefix)
            for block in plan.blocks:
                for batch, states in read_block(reader, [plan.queries[i] for i in block]):
                    yield Found(number, [row for i in batch for row in plan.rows(block[i])], states, model.precision)
                    bar.update(len(batch))


def read_here(
    plan: Plan, checkpoints: Sequence[Resolved], through: Through, placement: Placement
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """Read all states into memory, with the precisions that they were computed in."""
    values = np.empty((len(checkpoints), plan.ends[-1], len(plan.layers), plan.d_model), np.float32)
    precisions: set[str] = set()
    for number, rows, states, precision in read_each(plan, checkpoints, through, placement):
        values[number, rows] = states
        precisions.add(precision)
    return values, precisions
