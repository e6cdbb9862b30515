"""Prompt sets, and the way from a prompt to token ids and read positions."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gravlens.errors import GravlensError


class Example(NamedTuple):
    """One supervised pair of a fine-tuning set."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class PromptSet:
    """An ordered set of user prompts with one role (`harmful`, `harmless`, `task`, or plain `prompts`)."""

    texts: tuple[str, ...]
    role: str = "prompts"

    def __post_init__(self) -> None:
        if not self.texts or not all(isinstance(text, str) and text.strip() for text in self.texts):
            raise GravlensError(
                f"The prompt set ({self.role}) has {len(self.texts)} prompts"
                + (", some of them empty." if self.texts else "."),
                "At least one prompt is needed, each a text that is not blank.",
                "PromptSet.of(['How do I …?', …]) or a JSONL file with a key 'prompt' on each line.",
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __getitem__(self, part: slice) -> "PromptSet":
        return PromptSet(self.texts[part], self.role)

    @property
    def digest(self) -> str:
        """SHA-256 of the texts, in their order."""
        return hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()

    @classmethod
    def of(cls, prompts: "PromptSet | Sequence[str] | Path | str", role: str = "prompts") -> "PromptSet":
        """Make a prompt set of a list of texts or of a file; a `PromptSet` is returned as it is."""
        if isinstance(prompts, PromptSet):
            return prompts
        if isinstance(prompts, str | Path):
            return cls.from_file(prompts, role)
        return cls(tuple(prompts), role)

    @classmethod
    def from_file(cls, path: Path | str, role: str = "prompts") -> "PromptSet":
        """Read `.jsonl` or `.csv` (key or column `prompt`), or `.txt` (one prompt a line)."""
        return cls(tuple(row["prompt"] for row in read_rows(Path(path), "prompt")), role)


def shuffled_words(prompts: PromptSet, *, rng: np.random.Generator) -> PromptSet:
    """Random text with the same words: all prompts' words put in a random order, each prompt as long as it was."""
    words = [text.split() for text in prompts]
    pool = iter(rng.permutation([word for text in words for word in text]).tolist())
    return PromptSet(tuple(" ".join(next(pool) for _ in text) for text in words), "random text")


def read_examples(path: Path | str) -> list[Example]:
    """Read `prompt` and `answer` from a `.jsonl` or `.csv` file."""
    return [Example(row["prompt"], row["answer"]) for row in read_rows(Path(path), "prompt", "answer")]


def read_rows(path: Path, *keys: str) -> list[dict[str, str]]:
    """Read the rows of a `.jsonl`, `.csv` or `.txt` file and hold each against the wanted keys."""
    if not path.is_file():
        raise GravlensError(f"The prompt file {path} does not exist.", "A file is needed.", "check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        lines = text.split("\n")  # splitlines would cut at a U+2028 within a prompt
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines if line.strip()]
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [{"prompt": line} for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise GravlensError(f"{path} is no UTF-8 text ({error}).", "Prompts are text.", "save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise GravlensError(
            f"{path} has a line that is not JSON ({error}).", "JSONL has one object a line.", "mend that line."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise GravlensError(
                f"Row {number} of {path} lacks {' or '.join(map(repr, keys))}.",
                f"Each row needs {' and '.join(map(repr, keys))} as text.",
                "rename the column, or write JSONL with these keys.",
            )
    if not rows:
        raise GravlensError(f"{path} is empty.", "At least one row is needed.", "a file with prompts in it.")
    return rows


# --- from a prompt to token ids ---------------------------------------------------------------------------------


def encode(tokenizer: Any, prompts: PromptSet) -> list[list[int]]:
    """Token ids of each prompt, ready for a reading at its last token.

    A tokenizer with a chat template renders a user turn and the template's generation prompt; one without reads
    the text as it is. Where the tokenizer or its template writes a BOS there is exactly one, never two.
    """
    if tokenizer is None:
        raise GravlensError(
            "This model has no tokenizer.", "Prompts are texts and need one.", "pass tokenizer= when it is opened."
        )
    return [_one_bos(tokenizer, _prompt_ids(tokenizer, text)) for text in rendered(tokenizer, prompts)]


def encode_example(tokenizer: Any, example: Example) -> tuple[list[int], list[int]]:
    """Token ids of prompt + answer, and labels that are -100 on the prompt."""
    prompt = encode(tokenizer, PromptSet((example.prompt,)))[0]
    answer = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def rendered(tokenizer: Any, prompts: PromptSet) -> list[str]:
    """Each prompt as the chat template writes it; as it is where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return list(prompts)
    turns = [[{"role": "user", "content": text}] for text in prompts]
    return [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in turns]


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    # The template writes the special tokens itself.
    return tokenizer(text, add_special_tokens=not getattr(tokenizer, "chat_template", None))["input_ids"]


def _one_bos(tokenizer: Any, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    while len(ids) > 1 and ids[0] == bos and ids[1] == bos:
        ids = ids[1:]
    return ids


class Batch(NamedTuple):
    """Padded prompts: ids, the tokenizer-independent attention mask, and positions that ignore the padding."""

    input_ids: Int[Tensor, "prompt pos"]
    attention_mask: Int[Tensor, "prompt pos"]
    position_ids: Int[Tensor, "prompt pos"]


def pad(ids: Sequence[Sequence[int]], pad_id: int = 0, side: Literal["left", "right"] = "right") -> Batch:
    """Pad to the longest; the mask is made of the lengths, so a genuine pad or eos token is never masked."""
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids), width), dtype=torch.long)
    for row, prompt in enumerate(ids):
        where = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        padded[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    return Batch(padded, mask, (mask.cumsum(1) - 1).clamp(min=0))


def last_positions(mask: Int[Tensor, "prompt pos"] | Bool[Tensor, "prompt pos"]) -> Int[Tensor, " prompt"]:
    """Index of each prompt's last true token, whichever side is padded."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
