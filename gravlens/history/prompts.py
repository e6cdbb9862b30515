"""Prompt sets and supervised examples, and their encoding as token ids and padded batches."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

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

Mask: TypeAlias = Sequence[bool] | Bool[np.ndarray, " prompt"]  # of the prompts to keep
OPPOSED = ({"harmful", "harmless"}, {"harmful", "task"})


class Example(NamedTuple):
    """A prompt and the answer to fine-tune on (the loss is on the answer only), with a system prompt or ""."""

    prompt: str
    answer: str
    system: str = ""


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


def check_system(system: Any) -> str:
    """Return a system prompt, or "" for none; raise for anything else."""
    if not isinstance(system, str) or (system and not system.strip()):
        raise GravlensError(f"The system prompt is {system!r}.", "It is a text that is not blank.", "'' for none.")
    return system


def encode(tokenizer: Any, prompts: PromptSet | Sequence[str]) -> list[list[int]]:
    """Encode each prompt up to its last token, after which the model answers; there is never more than one BOS.

    A tokenizer with a chat template renders the system prompt (if any), a user turn and the generation prompt; one
    without encodes the plain text.
    """
    if tokenizer is None:
        remedy = "pass tokenizer= when it is opened."
        raise GravlensError("This model has no tokenizer.", "Prompts are texts and need one.", remedy)
    prompts = PromptSet.of(prompts)
    if prompts.system:
        _check_takes_system(tokenizer)
    special = not getattr(tokenizer, "chat_template", None)  # a template writes the special tokens itself
    return [_one_bos(tokenizer, _ids(tokenizer, text, special)) for text in rendered(tokenizer, prompts)]


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Encode prompt + answer; return the token ids, and labels that are -100 (no loss) on the prompt."""
    if not isinstance(example, tuple) or len(example) not in (2, 3):  # a plain pair is accepted
        remedy = "Example(prompt, answer), or read_examples(path)."
        raise wrong_kind(example, "An example is a prompt and an answer.", remedy)
    example = Example(*example)
    prompt = encode(tokenizer, PromptSet((example.prompt,), system=example.system))[0]
    # Apart from the prompt: encoded together, a token could span both, and the mask would have no border.
    answer = _ids(tokenizer, example.answer, special=False)
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def rendered(tokenizer: Any, prompts: PromptSet) -> list[str]:
    """Render each prompt by the chat template; without a template, return it unchanged."""
    if not getattr(tokenizer, "chat_template", None):
        return list(prompts)
    return [_rendered(tokenizer, text, prompts.system) for text in prompts]


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=special)["input_ids"]
    except Exception as error:  # a word-level tokenizer without an unknown token raises a bare Exception
        if "UNK" not in str(error).upper():
            raise
        given = f"The vocabulary cannot encode {text[:80]!r}."
        wanted = "Every word needs a token, or the vocabulary a token for unknown words."
        raise GravlensError(given, wanted, "prompts of words in this vocabulary, or another tokenizer.") from error


def _rendered(tokenizer: Any, text: str, system: str) -> str:
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _check_takes_system(tokenizer: Any) -> None:
    """Raise if the chat template would refuse or drop a system prompt."""
    found, marks = "has no chat template", ("gravlens-user", "gravlens-system")
    if getattr(tokenizer, "chat_template", None):
        try:
            # Rendered and searched: some templates skip the system turn without an error.
            lost = [mark for mark in marks if mark not in _rendered(tokenizer, *marks)]
        except Exception as error:  # jinja's, with the template's own message
            found = f"has a chat template that refuses a system turn ({error})"
        else:
            if not lost:
                return
            found = f"has a chat template that leaves out the {lost[0].removeprefix('gravlens-')} turn"
    given = f"A system prompt was given, and this tokenizer {found}."
    wanted = "A system prompt is a turn of the chat template."
    raise GravlensError(given, wanted, "no system prompt, or its text at the start of each prompt.")


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    # A prompt pasted from a rendered one begins with a BOS of its own.
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        ids = ids[1:]
    return ids


class Batch(NamedTuple):
    """Padded prompts: ids, attention mask, and position ids that do not count the padding."""

    input_ids: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    position_ids: Int[Tensor, "prompt pos"]


def pad(ids: Sequence[Sequence[int]], pad_id: int = 0, side: Literal["left", "right"] = "right") -> Batch:
    """Pad prompts to the longest."""
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for row, prompt in enumerate(ids):
        where = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        padded[row, where] = torch.tensor(prompt)
        mask[row, where] = 1  # by length: where pad is the eos token, a mask by token id would hide a real eos
    return Batch(padded, mask, (mask.cumsum(1) - 1).clamp(min=0))


def last_positions(mask: Int[Tensor, "prompt pos"] | Bool[Tensor, "prompt pos"]) -> Int[Tensor, " prompt"]:
    """Return the index of each prompt's last real token, for padding on either side."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
