"""Prompt sets and supervised examples, from texts, files and datasets."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from jaxtyping import Bool

from gravlens.core.errors import GravlensError, wrong_kind
from gravlens.history.prompt_formats import (
    Only,
    PromptFormat,
    check_rows,
    format_of,
    is_table,
    read_entries,
    read_rows,
    source_name,
)

ENCODING = 2  # raised whenever the same examples would be other tokens: part of the keys of what is trained on them
Turn: TypeAlias = dict[str, str]  # "role" and "content", as chat templates take them
Mask: TypeAlias = Sequence[bool] | Bool[np.ndarray, " prompt"]  # of the prompts to keep
OPPOSED = ({"harmful", "harmless"}, {"harmful", "task"})


class Example(NamedTuple):
    """A prompt and the answer to fine-tune on (the loss is on the answer only), with a system prompt or ""."""

    prompt: str
    answer: str
    system: str = ""

    @property
    def turns(self) -> list[Turn]:
        """The conversation up to the answer."""
        return _turns(self.prompt, self.system)


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of user prompts with one role.

    Attributes:
        role: `harmful`, `harmless`, `task`, or plain `prompts`.
        system: system prompt of all prompts, a separate turn of the chat template; "" for none.
    """

    texts: tuple[str, ...]
    role: str = "prompts"
    system: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):  # its letters would be taken for prompts
            given = f"The text {self.texts[:40]!r} was given as a prompt set."
            raise GravlensError(given, "A prompt set holds a tuple of texts.", "PromptSet.of([text]).")
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            bad = ", some of them blank or not text" if self.texts else ""
            wanted = "At least one prompt is needed, each a text that is not blank."
            remedy = "PromptSet.of(['How do I …?', …]) or a JSONL file with a key 'prompt' on each line."
            raise GravlensError(f"The prompt set ({self.role}) has {len(self.texts)} prompts{bad}.", wanted, remedy)
        check_system(self.system)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    @overload
    def __getitem__(self, part: int | np.integer[Any]) -> str: ...
    @overload
    def __getitem__(self, part: slice | Mask) -> "PromptSet": ...
    def __getitem__(self, part: int | np.integer[Any] | slice | Mask) -> "str | PromptSet":
        """Return the text of one prompt for an integer; a `PromptSet` for a slice or a boolean mask."""
        if isinstance(part, slice):
            return replace(self, texts=self.texts[part])
        if isinstance(part, int | np.integer):
            return self.texts[part]
        mask = np.asarray(part)
        if mask.dtype != bool or mask.shape != (len(self),):
            given = f"{len(self)} prompts were indexed with an array of {mask.dtype} of shape {mask.shape}."
            remedy = "prompts[0], prompts[:3], or prompts[[len(text) < 80 for text in prompts]]."
            raise GravlensError(given, "A mask has one boolean per prompt.", remedy)
        return replace(self, texts=tuple(compress(self.texts, mask)))

    @property
    def turns(self) -> list[list[Turn]]:
        """The conversation of each prompt, up to where the model answers."""
        return [_turns(text, self.system) for text in self.texts]

    @property
    def digest(self) -> str:
        """SHA-256 of the texts in order, and of the system prompt if there is one."""
        # No text is empty, so an empty part marks the system prompt.
        parts = [*self.texts, "", self.system] if self.system else self.texts
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()

    @classmethod
    def of(cls, prompts: Any, role: str = "prompts", *, column: str | None = None, system: str = "") -> "PromptSet":
        """Make a prompt set of a list of texts, or of a file or `datasets.Dataset` as `read_prompts` does.

        A `PromptSet` keeps its role, and its system prompt unless `system` is given.
        """
        if isinstance(prompts, PromptSet):
            return replace(prompts, system=system) if system else prompts
        if isinstance(prompts, str | Path) or is_table(prompts):
            return replace(read_prompts(prompts, role=role, column=column), system=system)
        if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
            raise wrong_kind(prompts, "Prompts are a list of texts, or a file.", "PromptSet.of(['How do I …?', …]).")
        return cls(tuple(prompts), role, system)


def read_prompts(
    source: Any,
    *,
    role: str = "prompts",
    format: str | None = None,
    column: str | None = None,
    only: Only | None = None,
) -> PromptSet:
    """Read the prompts of a file or a `datasets.Dataset`: a column `prompt`, or a published format (docs/prompts.md).

    Args:
        source: `.jsonl`, `.csv`, `.json` (an array), `.txt` (one prompt per line), or one split of a dataset.
        role: `harmful`, `harmless` or `task`, to keep rows of that role; default: the format's.
        format: name of a published format; default: recognised by the columns.
        column: column of the prompts, whatever the format.
        only: column -> value or values of the rows to keep.

    Raises:
        GravlensError: unknown columns or format, prompts of two roles without `role`, or none of that role.
    """
    entries = read_entries(source, PromptFormat((column,), column) if column else format, only)
    found = sorted({entry.role for entry in entries} - {""})
    kept = [entry for entry in entries if {entry.role, role} not in OPPOSED]
    if not kept or (role == "prompts" and len(found) > 1):
        other = "" if kept else f", and {role} ones were requested"
        given = f"{source_name(source)} holds {' and '.join(found)} prompts{other}."
        remedy = f"read_prompts(..., role={found[0]!r}), and pass the result."
        raise GravlensError(given, "A prompt set has one role.", remedy)
    return PromptSet(tuple(entry.prompt for entry in kept), found[0] if role == "prompts" and found else role)


def shuffled_words(prompts: PromptSet, *, rng: np.random.Generator) -> PromptSet:
    """Permute the words of all prompts at random, each prompt as long as before: a control with the same words."""
    words = [text.split() for text in prompts]
    pool = iter(rng.permutation([word for text in words for word in text]).tolist())
    return replace(prompts, texts=tuple(" ".join(next(pool) for _ in text) for text in words), role="random text")


def read_examples(
    source: Any, *, format: str | None = None, columns: tuple[str, str] | None = None, only: Only | None = None
) -> list[Example]:
    """Read pairs of prompt and answer of a file or a `datasets.Dataset`, and its column `system` if it has one.

    Args:
        source: as for `read_prompts`, like `only`.
        format: name of a published format; default: columns `prompt` and `answer`, or those of a known format.
        columns: columns of prompt and answer, whatever the format.

    Raises:
        GravlensError: unknown columns or format, a format without answers, or a row without one.
    """
    rows = read_rows(source)
    shape = format_of(source, rows, PromptFormat(columns, *columns) if columns else format)
    if not shape.answer:
        given = f"{source_name(source)} has prompts and no answers (columns {', '.join(shape.columns)})."
        wanted = "An example is a prompt and an answer."
        raise GravlensError(given, wanted, "a file with columns 'prompt' and 'answer', or columns=(prompt, answer).")
    check_rows(source, rows, shape.prompt, shape.answer)
    entries = read_entries(source, shape, only)
    # A missing value is None in a Dataset and "" in a CSV file.
    return [Example(e.prompt, e.row[shape.answer], check_system(e.row.get("system") or "")) for e in entries]


def _turns(prompt: str, system: str) -> list[Turn]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": prompt}]


def check_system(system: Any) -> str:
    """Return a system prompt, or "" for none; raise for anything else."""
    if not isinstance(system, str) or (system and not system.strip()):
        raise GravlensError(f"The system prompt is {system!r}.", "It is a text that is not blank.", "'' for none.")
    return system
