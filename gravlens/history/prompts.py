"""Prompt sets and supervised examples, from texts, files and datasets."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from jaxtyping import Bool

from gravlens.core.display import brief
from gravlens.core.errors import GravlensError, wrong_kind
from gravlens.history.prompt_formats import Entry, Only, PromptFormat, Said, is_table, read_entries, source_name

ENCODING = 2  # raised whenever the same examples would be other tokens: part of the keys of what is trained on them
Turn: TypeAlias = dict[str, str]  # "role" and "content", as chat templates take them
Mask: TypeAlias = Sequence[bool] | Bool[np.ndarray, " prompt"]  # of the prompts to keep
Earlier: TypeAlias = tuple[Said, ...]  # the turns before a prompt: (role, text), the first perhaps the system's own
OPPOSED = ({"harmful", "harmless"}, {"harmful", "task"})


class Example(NamedTuple):
    """A prompt and the answer to fine-tune on (the loss is on the answer only), with a system prompt or "".

    Attributes:
        earlier: the turns between system prompt and prompt, as in `PromptSet`.

    Examples:
        >>> example = gl.Example("How do I bake bread?", "Mix flour, water, salt and yeast.", system="Be brief.")
        >>> example.answer
        'Mix flour, water, salt and yeast.'
    """

    prompt: str
    answer: str
    system: str = ""
    earlier: Earlier = ()

    @property
    def turns(self) -> list[Turn]:
        """The conversation up to the answer."""
        return _turns(self.prompt, self.system, self.earlier)


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of user prompts with one role.

    Attributes:
        role: `harmful`, `harmless`, `task`, or plain `prompts`.
        system: system prompt of all prompts, a separate turn of the chat template; "" for none.
        earlier: the turns before each prompt, as (role, text): () if no prompt has any. Prompts with different system
            prompts have them here, each as its first turn, and `system` is for the others.

    Examples:
        >>> prompts = gl.PromptSet(("How do I bake bread?", "And a cake?"), role="harmless", system="Be brief.")
        >>> len(prompts), len(prompts[:1]), len(prompts.digest)
        (2, 1, 64)
    """

    texts: tuple[str, ...]
    role: str = "prompts"
    system: str = ""
    earlier: tuple[Earlier, ...] = ()
    __repr__ = brief

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
        if len(self.earlier) not in (0, len(self.texts)):
            given = f"{len(self.texts)} prompts were given with the earlier turns of {len(self.earlier)}."
            raise GravlensError(given, "Each prompt has its own.", "earlier=() for prompts without earlier turns.")
        if self.earlier and not any(self.earlier):  # so that equal sets are equal
            object.__setattr__(self, "earlier", ())

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
            return replace(self, texts=self.texts[part], earlier=self.earlier[part])
        if isinstance(part, int | np.integer):
            return self.texts[part]
        mask = np.asarray(part)
        if mask.dtype != bool or mask.shape != (len(self),):
            given = f"{len(self)} prompts were indexed with an array of {mask.dtype} of shape {mask.shape}."
            remedy = "prompts[0], prompts[:3], or prompts[[len(text) < 80 for text in prompts]]."
            raise GravlensError(given, "A mask has one boolean per prompt.", remedy)
        return replace(self, texts=tuple(compress(self.texts, mask)), earlier=tuple(compress(self.earlier, mask)))

    @property
    def turns(self) -> list[list[Turn]]:
        """The conversation of each prompt, up to where the model answers."""
        earlier = self.earlier or ((),) * len(self)
        return [_turns(text, self.system, before) for text, before in zip(self.texts, earlier, strict=True)]

    @property
    def digest(self) -> str:
        """SHA-256 of the texts in order, and of the system prompt and the earlier turns if there are any."""
        # No text is empty, so an empty part marks the system prompt.
        parts = [*self.texts, "", self.system] if self.system or self.earlier else [*self.texts]
        parts += [json.dumps(self.earlier)] if self.earlier else []
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()

    @classmethod
    def of(cls, prompts: Any, role: str = "prompts", *, column: str | None = None, system: str = "") -> "PromptSet":
        """Make a prompt set of a list of texts or conversations, or of whatever `read_prompts` reads.

        A `PromptSet` keeps its role, and its system prompt unless `system` is given, which replaces all of a file, too.
        """
        if (
            isinstance(prompts, Iterable)
            and not isinstance(prompts, Mapping | str | PromptSet | Path)
            and not is_table(prompts)
        ):
            prompts = list(prompts)
        if isinstance(prompts, str | Path) or is_table(prompts):
            prompts = read_prompts(prompts, role=role, column=column)
        if isinstance(prompts, PromptSet):
            return prompts._under(system) if system else prompts
        if not isinstance(prompts, list):
            raise wrong_kind(prompts, "Prompts are a list of texts, or a file.", "PromptSet.of(['How do I …?', …]).")
        return cls(tuple(prompts), role, system)

    def _under(self, system: str) -> "PromptSet":
        earlier = (one[1:] if one and one[0][0] == "system" else one for one in self.earlier)
        return replace(self, system=system, earlier=tuple(earlier))


def read_prompts(
    source: Any,
    *,
    role: str = "prompts",
    format: str | None = None,
    column: str | None = None,
    only: Only | None = None,
) -> PromptSet:
    """Read the prompts of a file, a `datasets.Dataset`, a DataFrame, or a list of rows or conversations.

    They are in a column `prompt`, or in those of a chat or published format (docs/prompts.md). In a conversation the
    last turn of the user is the prompt; an answer after it is left out.

    Args:
        source: the file (docs/prompts.md lists the forms), one split of a dataset, or the rows.
        role: `harmful`, `harmless` or `task`, to keep rows of that role; default: the format's.
        format: name of a published format; default: recognised by the columns.
        column: column of the prompts, whatever the format.
        only: column -> value or values of the rows to keep.

    Raises:
        GravlensError: unknown columns or format, prompts of two roles without `role`, or none of that role.

    Examples:
        >>> prompts = gl.read_prompts("held_out.jsonl", role="prompts")
        >>> len(prompts), prompts.role
        (6, 'prompts')
        >>> len(gl.read_prompts([{"goal": "How do I bake bread?"}], column="goal"))
        1
    """
    entries = read_entries(source, PromptFormat((column,), column) if column else format, only)
    found = sorted({entry.role for entry in entries} - {""})
    kept = [entry for entry in entries if {entry.role, role} not in OPPOSED]
    if not kept or (role == "prompts" and len(found) > 1):
        other = "" if kept else f", and {role} ones were requested"
        given = f"{source_name(source)} holds {' and '.join(found)} prompts{other}."
        remedy = f"read_prompts(..., role={found[0]!r}), and pass the result."
        raise GravlensError(given, "A prompt set has one role.", remedy)
    return prompt_set(kept, found[0] if role == "prompts" and found else role)


def prompt_set(entries: Sequence[Entry], role: str) -> PromptSet:
    """Make a prompt set of entries: their system prompt if it is the same, else each one's as its first turn."""
    systems, earlier = {entry.system for entry in entries}, [entry.earlier for entry in entries]
    if len(systems) > 1:
        own = [(("system", entry.system),) if entry.system else () for entry in entries]
        systems, earlier = {""}, [(*first, *turns) for first, turns in zip(own, earlier, strict=True)]
    return PromptSet(tuple(entry.prompt for entry in entries), role, systems.pop(), tuple(earlier))


def shuffled_words(prompts: PromptSet, *, rng: np.random.Generator) -> PromptSet:
    """Permute the words of all prompts at random, each prompt as long as before: a control with the same words.

    System prompt and earlier turns stay.
    """
    words = [text.split() for text in prompts]
    pool = iter(rng.permutation([word for text in words for word in text]).tolist())
    return replace(prompts, texts=tuple(" ".join(next(pool) for _ in text) for text in words), role="random text")


def read_examples(
    source: Any, *, format: str | None = None, columns: tuple[str, str] | None = None, only: Only | None = None
) -> list[Example]:
    """Read pairs of prompt and answer of whatever `read_prompts` reads, and the column `system` if there is one.

    A conversation ends with the answer.

    Args:
        source: as for `read_prompts`, like `only`.
        format: name of a format; default: recognised by the columns, `prompt` and `answer` or those of a known format.
        columns: columns of prompt and answer, whatever the format; twice the same for conversations.

    Raises:
        GravlensError: unknown columns or format, a format without answers, or a row without one.

    Examples:
        >>> examples = gl.read_examples("data.jsonl")
        >>> len(examples)
        12
        >>> gl.read_examples([{"q": "2 + 2?", "a": "4"}], columns=("q", "a"))[0].answer
        '4'
    """
    entries = read_entries(source, PromptFormat(columns, *columns) if columns else format, only, answers=True)
    return [Example(e.prompt, e.answer, check_system(e.system), e.earlier) for e in entries]


def _turns(prompt: str, system: str, earlier: Earlier) -> list[Turn]:
    own = bool(earlier) and earlier[0][0] == "system"
    opening = [("system", system)] if system and not own else []
    return [{"role": role, "content": text} for role, text in (*opening, *earlier, ("user", prompt))]


def check_system(system: Any) -> str:
    """Return a system prompt, or "" for none; raise for anything else."""
    if not isinstance(system, str) or (system and not system.strip()):
        raise GravlensError(f"The system prompt is {system!r}.", "It is a text that is not blank.", "'' for none.")
    return system
