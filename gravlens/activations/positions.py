"""Where the residual stream is read: each prompt's tokens, and the positions whose states become rows of a result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from gravlens.core.errors import GravlensError
from gravlens.history.prompts import PromptSet, encode, rendered

AT_ONCE = 256  # prompts that are tokenised before their tokens are packed


@dataclass(frozen=True)
class Answers:
    """Read the mean over the tokens of an answer after each prompt: `texts`, the same for all checkpoints."""

    texts: tuple[str, ...]

    def __init__(self, texts: Sequence[str]) -> None:
        object.__setattr__(self, "texts", tuple(texts))


# One row a prompt: the last token, an offset from the end (−1 is the last), the mean over the instruction's tokens or
# those of an answer. One row a token: those of the template after the instruction, all, or what a function names.
Named: TypeAlias = Literal["last", "instruction", "post_instruction", "all"]
Positions: TypeAlias = Named | int | Answers | Callable[[list[int]], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt's tokens, and where its states are read.

    Attributes:
        ids: token ids.
        reads: for each row of the result, the positions (counted from 0) whose mean it is.
    """

    ids: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]

    @property
    def start(self) -> int:
        """The first position that is read."""
        return min(min(read) for read in self.reads)

    @property
    def end(self) -> int:
        """One past the last position that is read; no token from there on is run."""
        return 1 + max(max(read) for read in self.reads)


def described(positions: Positions) -> str | int:
    """Positions in a word, for what stands beside a result."""
    if isinstance(positions, Answers):
        return "answer"
    return getattr(positions, "__name__", "a function") if callable(positions) else positions


def queries_of(tokenizer: Any, prompts: PromptSet, positions: Positions = "last") -> list[Query]:
    """Tokens and read positions of each prompt, by the tokenizer that all checkpoints are read with.

    Raises:
        GravlensError: positions that a prompt does not have, or that mean nothing with this tokenizer.
    """
    if isinstance(positions, Answers):
        _check_one_each(positions.texts, prompts)
    numbers: dict[int, int] = {}  # one object for each token id, however often it is there
    queries: list[Query] = []
    for start in range(0, len(prompts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        found = _part_of(tokenizer, prompts[part], positions, part)
        queries += [replace(one, ids=tuple(numbers.setdefault(i, i) for i in one.ids)) for one in found]
    return queries


def _part_of(tokenizer: Any, prompts: PromptSet, positions: Positions, part: slice) -> list[Query]:
    ids = encode(tokenizer, prompts)
    if isinstance(positions, Answers):
        return [_after(tokenizer, *pair) for pair in zip(ids, positions.texts[part], strict=True)]
    if positions in ("instruction", "post_instruction"):
        return [_around(tokenizer, prompts, i, one, str(positions)) for i, one in enumerate(ids)]
    return queries_of_ids(ids, positions)


def queries_of_ids(ids: Sequence[Sequence[int]], positions: Positions = "last") -> list[Query]:
    """Read positions of prompts that are token ids already: `"last"`, `"all"`, an offset, or a function."""
    if callable(positions):
        return [_chosen(list(one), positions) for one in ids]
    if positions == "all":
        return [Query(tuple(one), tuple((at,) for at in range(len(one)))) for one in ids]
    offset = offset_of(positions, min(map(len, ids)))
    return [Query(tuple(one), ((len(one) + offset,),)) for one in ids]


def offset_of(positions: Any, shortest: int) -> int:
    """`"last"` or a negative index as a negative index; raises where the shortest prompt does not have it."""
    offset = -1 if positions == "last" else positions
    if not isinstance(offset, int) or isinstance(offset, bool) or offset >= 0 or -offset > shortest:
        raise GravlensError(
            f"positions={positions!r} was given; the shortest prompt has {shortest} tokens.",
            'A position is "last", a negative index from the end that every prompt has, "instruction", '
            '"post_instruction", "all", Answers([…]), or a function of token ids.',
            'positions="last".',
        )
    return offset


def _chosen(ids: list[int], positions: Callable[[list[int]], Sequence[int]]) -> Query:
    """What a function names for one prompt, as it may be: in order, each once, counted from the end where negative."""
    name = getattr(positions, "__name__", "positions")
    given = list(positions(list(ids)))
    if not given or not all(-len(ids) <= at < len(ids) and int(at) == at for at in given):
        raise GravlensError(
            f"{name} gave {given} for a prompt of {len(ids)} tokens.",
            "A function of a prompt's token ids gives the positions to be read, at least one.",
            "lambda ids: [len(ids) - 1], which is the last token.",
        )
    return Query(tuple(ids), tuple((at,) for at in sorted({int(at) % len(ids) for at in given})))


# --- within the template ------------------------------------------------------------------------------------------
_MARK = "\u2983gravlens\u2984"  # stands for the instruction where its place in a template is looked for


def _around(tokenizer: Any, prompts: PromptSet, row: int, ids: list[int], which: str) -> Query:
    """The instruction's own tokens, or the template's after it."""
    start, end, offsets = _place(tokenizer, prompts[row : row + 1])
    offsets = offsets[len(offsets) - len(ids) :]  # a second BOS was taken off
    inside = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > max(a, start))
    after = tuple(i for i, (a, b) in enumerate(offsets) if a >= end and b > a)
    if which == "instruction":
        return Query(tuple(ids), (inside,))
    if not after:
        raise GravlensError(
            f'positions="post_instruction" was given, and nothing comes after {prompts.texts[row][:40]!r}.',
            "These are the tokens of a chat template after the instruction.",
            'positions="last", or a tokenizer with a chat template.',
        )
    return Query(tuple(ids), tuple((at,) for at in after))


def _place(tokenizer: Any, prompt: PromptSet) -> tuple[int, int, list[tuple[int, int]]]:
    """Where the instruction begins and ends in the text that is read, and each token's own place there."""
    text = prompt.texts[0]
    before, _, after = rendered(tokenizer, replace(prompt, texts=(_MARK,)))[0].partition(_MARK)
    whole = rendered(tokenizer, prompt)[0]
    templated = bool(getattr(tokenizer, "chat_template", None))
    try:
        offsets = tokenizer(whole, add_special_tokens=not templated, return_offsets_mapping=True)["offset_mapping"]
    except (NotImplementedError, KeyError) as error:  # a slow one gives none
        raise GravlensError(
            f"A {type(tokenizer).__name__} does not say where its tokens lie in {text[:40]!r}.",
            "The instruction's tokens are told from the template's by their place in the text.",
            'a fast tokenizer (a folder with tokenizer.json), positions="last", or a function.',
        ) from error
    return len(before), len(whole) - len(after), offsets


# --- answers ------------------------------------------------------------------------------------------------------
def _after(tokenizer: Any, ids: list[int], answer: str) -> Query:
    """The mean over an answer's tokens, read after its prompt."""
    more = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not more:
        raise GravlensError(f"The answer {answer!r} has no token.", "An answer is read at its tokens.", "an answer.")
    return Query((*ids, *more), (tuple(range(len(ids), len(ids) + len(more))),))


def _check_one_each(answers: Sequence[str], prompts: PromptSet) -> None:
    if len(answers) != len(prompts):
        raise GravlensError(
            f"{len(answers)} answers were given for {len(prompts)} prompts.",
            "One answer is read after each prompt, the same for all checkpoints.",
            "Answers(generate_answers(open_model(seq.anchor), prompts)), or answers of your own.",
        )
